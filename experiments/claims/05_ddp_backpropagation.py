"""Claim 5: DDP without cross terms is a stage-wise Newton step, and in the end back-propagation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

ITERATIONS = 10
STEP_SIZE = 0.1


def _predict() -> dict[str, Any]:
    """The steps coincide: their distance is zero up to rounding."""
    return {"relative_difference": 0.0, "iterations": ITERATIONS}


def _problems() -> dict[str, Any]:
    """Exact problems, each with controls at which every block of the Hessian is positive."""
    import torch

    from deltacontrol.theory.control.costs import CrossEntropyCost, SquaredErrorCost
    from deltacontrol.theory.control.problem import ControlProblem
    from deltacontrol.theory.control.systems import LowRankDynamics, ResidualNetwork

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    regression = ControlProblem(
        ResidualNetwork.random(6, width=5, hidden=8, control_size=4, seed=1),
        SquaredErrorCost(normal(7, 5), weight_decay=3.0),
        normal(7, 5),
    )
    labels = torch.arange(7) % 5
    classification = ControlProblem(
        regression.dynamics, CrossEntropyCost(labels, weight_decay=1.0), normal(7, 5)
    )
    lora = ControlProblem(
        LowRankDynamics([normal(5, 5) / 3 for _ in range(3)], rank=2),
        SquaredErrorCost(normal(7, 5), weight_decay=10.0),
        normal(7, 5),
    )
    found = {"residual": regression, "classifier": classification, "low rank": lora}
    return {
        name: (problem, tuple(0.3 * normal(m) for m in problem.dynamics.control_sizes))
        for name, problem in found.items()
    }


def _swept(problem: Any, u: Any, **changes: Any) -> Any:
    """The open-loop steps of one backward sweep of DDP."""
    from deltacontrol.theory.solvers.quadratic_model import QuadraticModel, sweep

    model = QuadraticModel.of(problem, u, problem.evaluate(u), second_order=True)
    return tuple(k[0] for k in sweep(model, **changes).k)


def _stagewise_newton(problem: Any, u: Any) -> Any:
    """``-(∇²_{u_t} J)⁻¹ ∇_{u_t} J`` for each step, by automatic differentiation of ``J`` alone."""
    import torch

    steps = []
    for t, u_t in enumerate(u):

        def alone(z: Any, t: int = t) -> Any:
            return problem.objective((*u[:t], z, *u[t + 1 :]))

        block, gradient = torch.func.hessian(alone)(u_t), torch.func.grad(alone)(u_t)
        steps.append(-torch.linalg.solve(block, gradient))
    return tuple(steps)


def _descent(problem: Any, u: Any) -> Any:
    """The step of `torch.optim.SGD` with gradients by automatic differentiation."""
    import torch

    leaves = [control.clone().requires_grad_() for control in u]
    optimiser = torch.optim.SGD(leaves, lr=STEP_SIZE)
    problem.objective(tuple(leaves)).backward()
    optimiser.step()
    return tuple(leaf.detach() - control for leaf, control in zip(leaves, u, strict=True))


def _worst(problem: Any, u: Any, reference: Any, **changes: Any) -> float:
    """The largest relative difference of the steps along the iterates of the reference."""
    import torch

    worst = 0.0
    for _ in range(ITERATIONS):
        expected = reference(problem, u)
        found = torch.cat(_swept(problem, u, **changes))
        flat = torch.cat(expected)
        worst = max(worst, float((found - flat).norm() / flat.norm()))
        # Half of Newton's step keeps the blocks positive.
        length = 0.5 if reference is _stagewise_newton else 1.0
        u = tuple(control + length * step for control, step in zip(u, expected, strict=True))
    return worst


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """Sweeps against autograd and SGD, ten iterations each, three problems."""
    newton = {
        name: _worst(problem, u, _stagewise_newton, cross=False)
        for name, (problem, u) in _problems().items()
    }
    descent = {
        name: _worst(problem, u, _descent, cross=False, step_size=STEP_SIZE)
        for name, (problem, u) in _problems().items()
    }
    return Evidence(
        value=max(*newton.values(), *descent.values()) - prediction["relative_difference"],
        details={"stage-wise Newton": newton, "gradient descent": descent},
        note="residual regression and classification, low-rank layers; worst of ten iterations",
    )


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """The same sweeps with their cross terms; the open-loop part alone already differs."""
    newton = {
        name: _worst(problem, u, _stagewise_newton) for name, (problem, u) in _problems().items()
    }
    descent = {
        name: _worst(problem, u, _descent, step_size=STEP_SIZE)
        for name, (problem, u) in _problems().items()
    }
    return Evidence(
        value=min(*newton.values(), *descent.values()) - prediction["relative_difference"],
        details={"stage-wise Newton": newton, "gradient descent": descent},
        note="Q_ux kept; smallest difference of the problems",
    )


CLAIM = Claim(
    id=5,
    name="ddp-backpropagation",
    title="DDP without cross terms is back-propagation",
    statement=(
        "with Q_ux = 0 the DDP step is Newton's of every control alone; with Q_uu = I/η too it is "
        "gradient descent by back-propagation"
    ),
    source="Liu, Chen, Theodorou, ICLR 2021 (DDPNOpt), Proposition 2",
    notebook="05_ddp_backpropagation",
    threshold=Threshold("<=", 1e-10, "largest relative difference of the steps, float64"),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
)
