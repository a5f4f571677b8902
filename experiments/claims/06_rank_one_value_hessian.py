"""Claim 6: a rank-one terminal Hessian stays rank one through layers linear in the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

DEPTH, WIDTH, CONTROL, BATCH = 8, 6, 3, 5
RELATIVE = 1e-10


def _predict() -> dict[str, Any]:
    """``rank V_t ≤ rank V_{t+1}`` at every layer, hence one throughout."""
    return {"rank": 1}


def _normal(*shape: int, seed: int):
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _one_logit(tracking: float):
    """``Phi = 1/2 (g'x - 1)²``, ``l = 1/2 ||u||² + tracking/2 ||x||²``."""
    import torch

    from deltacontrol.theory.control.costs import QuadraticCost

    g = _normal(WIDTH, seed=1)
    return QuadraticCost(
        Q=[tracking * torch.eye(WIDTH, dtype=torch.float64)] * DEPTH,
        R=[torch.eye(CONTROL, dtype=torch.float64)] * DEPTH,
        Qf=torch.outer(g, g),
        qf=-g,
    )


def _linear():
    from deltacontrol.theory.control.systems import LinearDynamics

    return LinearDynamics(
        A=_normal(DEPTH, WIDTH, WIDTH, seed=2) / WIDTH**0.5,
        B=_normal(DEPTH, WIDTH, CONTROL, seed=3),
    )


def _binary_classifier():
    """The same layers and a readout without control to two logits, whose Hessian has rank one."""
    from deltacontrol.theory.control.systems import LinearDynamics

    layers = _linear()
    return LinearDynamics(
        A=[*layers.A, _normal(2, WIDTH, seed=4)], B=[*layers.B, _normal(2, 0, seed=5)]
    )


def _ranks(dynamics: Any, cost: Any, *, second_order: bool = True) -> list[int]:
    """The largest numerical rank of ``V_t`` over the examples, for ``t = 0..L``.

    The controls are one per example, away from the optimum. What counts as zero is less than 1e-10
    of the largest singular value.
    """
    import torch

    from deltacontrol.theory.control.problem import ControlProblem
    from deltacontrol.theory.solvers.quadratic_model import QuadraticModel, sweep

    problem = ControlProblem(dynamics, cost, _normal(BATCH, WIDTH, seed=6))
    u = tuple(0.1 * _normal(BATCH, m, seed=7 + t) for t, m in enumerate(dynamics.control_sizes))
    now = problem.evaluate(u)
    model = QuadraticModel.of(problem, u, now, second_order=second_order)
    ranks = []
    for V in sweep(model).V:
        values = torch.linalg.svdvals(V)
        ranks.append(int((values > RELATIVE * values[:, :1]).sum(-1).max()))
    return ranks


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """Second-order sweeps through linear layers; the largest rank of all."""
    import torch

    from deltacontrol.theory.control.costs import CrossEntropyCost
    from deltacontrol.theory.control.systems import ResidualNetwork

    labels = torch.arange(BATCH) % 2
    network = ResidualNetwork.random(DEPTH, WIDTH, 8, CONTROL, seed=8)
    found = {
        "squared error of one logit": _ranks(_linear(), _one_logit(0.0)),
        "two-class cross-entropy": _ranks(
            _binary_classifier(), CrossEntropyCost(labels, weight_decay=1.0)
        ),
    }
    gauss_newton = _ranks(network, _one_logit(0.0), second_order=False)
    return Evidence(
        value=max(max(ranks) for ranks in found.values()),
        details={**found, "Gauss-Newton through tanh layers": gauss_newton},
        note="numerical rank at 1e-10 per example, 8 layers of width 6, one control per example",
    )


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """Each assumption broken in turn; the smallest of the ranks that are reached at ``t = 0``."""
    from deltacontrol.theory.control.costs import SquaredErrorCost
    from deltacontrol.theory.control.systems import ResidualNetwork

    network = ResidualNetwork.random(DEPTH, WIDTH, 8, CONTROL, seed=8)
    found = {
        "tracking cost": _ranks(_linear(), _one_logit(0.1)),
        "tanh layers": _ranks(network, _one_logit(0.0)),
        "control multiplies the state": _ranks(*_bilinear()),
        "full-rank terminal cost": _ranks(
            _linear(),
            SquaredErrorCost(_normal(BATCH, WIDTH, seed=9), weight_decay=1.0),
        ),
    }
    return Evidence(
        value=min(ranks[0] for ranks in found.values()),
        details=found,
        note="smallest rank at the first layer among four broken assumptions",
    )


def _bilinear():
    """Layers linear in the state whose control multiplies it, and one logit at the end."""
    import torch

    from deltacontrol.theory.control.costs import QuadraticCost
    from deltacontrol.theory.control.systems import LowRankDynamics

    dynamics = LowRankDynamics(list(_normal(DEPTH, WIDTH, WIDTH, seed=2) / WIDTH**0.5), rank=1)
    g = _normal(WIDTH, seed=1)
    eye = torch.eye(2 * WIDTH, dtype=torch.float64)
    zero = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    cost = QuadraticCost([zero] * DEPTH, [100 * eye] * DEPTH, Qf=torch.outer(g, g), qf=-g)
    return dynamics, cost


CLAIM = Claim(
    id=6,
    name="rank-one-value-hessian",
    title="A rank-one terminal Hessian stays rank one",
    statement=(
        "through layers x ↦ A_t x + b_t(u) with a state-free running cost, rank V_xx does not grow "
        "in DDP's backward sweep, so a terminal Hessian φ'' g gᵀ stays rank one per example"
    ),
    source="Liu, Chen, Theodorou, ICLR 2021 (DDPNOpt), Proposition 3",
    notebook="06_rank_one_value_hessian",
    threshold=Threshold("<=", 1.0, "largest numerical rank of V_xx over layers and examples"),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
)
