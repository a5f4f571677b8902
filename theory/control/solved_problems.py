"""Control problems whose optimal controls are known, for tests of solvers.

::

    for known in exact_problems():
        problem = known.make()
        solution = solve(problem, MySolver(), known.start(problem), max_steps=1000, tol=1e-9)
        print(known.name, known.error(solution.controls))

===================  ==============================================  ===============================
problem              what                                            the answer
===================  ==============================================  ===============================
scalar               least energy, one state                         closed form
scalar-box           the same with bounds on the controls            closed form, bounds active
double-integrator    position and velocity to rest                   closed form
varying              linear-quadratic, all terms, sizes that change  dense linear system
varying-batch        the same, one control for six examples          dense linear system
varying-per-example  the same, a control for each of three examples  dense linear system
residual-known       tanh layers, squared error                      by construction of the target
===================  ==============================================  ===============================

`PROBLEMS` has these and others whose answer is not known in advance (tanh layers, cross-entropy,
bilinear layers as in LoRA). There a solver is judged by `ControlProblem.residual`; where
``strongly_convex`` holds, two controls of residuals ``r`` and ``s`` differ by at most
``(r + s)/lambda_min`` of the Hessian of ``J``.

All tensors are float64; a problem is the same in each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.theory.control.costs import CrossEntropyCost, QuadraticCost, SquaredErrorCost
from deltacontrol.theory.control.problem import Box, ControlProblem, Controls
from deltacontrol.theory.control.systems import LinearDynamics, LowRankDynamics, ResidualNetwork

__all__ = [
    "PROBLEMS",
    "KnownProblem",
    "dense_optimum",
    "double_integrator",
    "exact_problems",
    "low_rank",
    "random_linear_quadratic",
    "residual_classifier",
    "residual_known",
    "residual_network",
    "scalar",
    "scalar_box",
    "varying",
]

_F64 = torch.float64


@dataclass(frozen=True)
class KnownProblem:
    """A control problem, how to make it, and what is known about it.

    Attributes:
        name: of the problem.
        make: makes the problem.
        per_example: whether each example has controls of its own, ``(batch, m_t)``.
        linear_quadratic: linear dynamics, quadratic cost, no bounds: one linear system gives the
            optimum.
        strongly_convex: ``J`` has one stationary point, which every solver must find.
        exact: the optimal controls, or None where they are not known in advance.
        formula: how the answer is found.
        source: where the formula is from.
    """

    name: str
    make: Callable[[], ControlProblem]
    per_example: bool = False
    linear_quadratic: bool = False
    strongly_convex: bool = True
    exact: Callable[[], Controls] | None = None
    formula: str = ""
    source: str = ""

    def start(self, problem: ControlProblem, scale: float = 0.0) -> Controls:
        """Zero controls, or random ones of the given scale, the same in each call."""
        zeros = problem.zero_controls(per_example=self.per_example, dtype=_F64)
        generator = torch.Generator().manual_seed(5)
        return tuple(scale * torch.randn(u.shape, generator=generator, dtype=_F64) for u in zeros)

    def error(self, controls: Controls) -> float:
        """``||u - u*|| / ||u*||`` over all controls.

        Raises:
            ValueError: the answer is not known.
        """
        if self.exact is None:
            raise ValueError(f"the optimal controls of {self.name} are not known in advance")
        exact = _flat(self.exact())
        return float((_flat(controls) - exact).norm() / exact.norm())


def exact_problems(*, linear_quadratic: bool = False, box: bool = False) -> Iterator[KnownProblem]:
    """The problems whose optimal controls are known.

    Args:
        linear_quadratic: only the linear-quadratic ones, for solvers of nothing else.
        box: those with bounds on the controls as well, for solvers that keep them.

    Example:
        >>> from deltacontrol.theory import Riccati, solve
        >>> for known in exact_problems(linear_quadratic=True):
        ...     problem = known.make()
        ...     start = known.start(problem)
        ...     solution = solve(problem, Riccati(), start, max_steps=2, tol=1e-9)
        ...     print(known.name, known.error(solution.controls) <= 1e-12)
        scalar True
        double-integrator True
        varying True
        varying-batch True
        varying-per-example True
    """
    for known in PROBLEMS:
        if known.exact is None or (linear_quadratic and not known.linear_quadratic):
            continue
        if box or known.make().box is None:
            yield known


def dense_optimum(problem: ControlProblem, *, per_example: bool = False) -> Controls:
    """The minimum of a quadratic ``J``: ``u* = -H^{-1} grad J(0)`` with the dense Hessian ``H``.

    For linear dynamics, a quadratic cost and few controls: ``H`` has as many rows as there are
    control entries in all steps together. One step of iterative refinement follows.

    Args:
        problem: a linear-quadratic problem without a box.
        per_example: whether each example has controls of its own.
    """
    zeros = problem.zero_controls(per_example=per_example, dtype=_F64)

    def objective(z: Tensor) -> Tensor:
        return problem.objective(_like(z, zeros))

    z = _flat(zeros)
    hessian = torch.func.hessian(objective)(z)
    for _ in range(2):
        z = z - torch.linalg.solve(hessian, torch.func.grad(objective)(z))
    return _like(z, zeros)


SCALAR_HORIZON = 5
SCALAR_LOW = -0.4


def scalar() -> ControlProblem:
    """``x_{t+1} = x_t + u_t``, ``J = 1/2 sum u_t^2 + 1/2 x_L^2``, ``x_0 = 3``, five steps."""
    one = torch.ones(1, 1, dtype=_F64)
    return ControlProblem(
        LinearDynamics.constant(SCALAR_HORIZON, one, one),
        QuadraticCost.constant(SCALAR_HORIZON, Q=0 * one, R=one, Qf=one),
        x0=torch.tensor([3.0], dtype=_F64),
    )


def scalar_exact() -> Controls:
    """``u_t = -x_L`` for all t, hence ``x_L = x_0/(1 + L)``."""
    return (torch.tensor([-3.0 / (1 + SCALAR_HORIZON)], dtype=_F64),) * SCALAR_HORIZON


def scalar_box() -> ControlProblem:
    """`scalar` with ``u_t >= -0.4``, which is active at each step."""
    free = scalar()
    return ControlProblem(free.dynamics, free.cost, free.x0, Box(low=SCALAR_LOW))


def scalar_box_exact() -> Controls:
    """The steps are alike and ``J`` is convex, so the bound holds where `scalar_exact` is below."""
    return tuple(u.clamp(min=SCALAR_LOW) for u in scalar_exact())


INTEGRATOR_HORIZON = 5
INTEGRATOR_WEIGHT = 2.0


def double_integrator() -> ControlProblem:
    """Bring position and velocity to rest with the least energy and a terminal penalty."""
    A = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=_F64)
    B = torch.tensor([[0.5], [1.0]], dtype=_F64)
    cost = QuadraticCost.constant(
        INTEGRATOR_HORIZON,
        Q=torch.zeros(2, 2, dtype=_F64),
        R=torch.ones(1, 1, dtype=_F64),
        Qf=INTEGRATOR_WEIGHT * torch.eye(2, dtype=_F64),
    )
    dynamics = LinearDynamics.constant(INTEGRATOR_HORIZON, A, B)
    return ControlProblem(dynamics, cost, x0=torch.tensor([1.0, -0.5], dtype=_F64))


def double_integrator_exact() -> Controls:
    """``u = -C'(CC' + I/w)^{-1} A^L x_0`` with columns ``(L - 1 - t + 1/2, 1)`` of ``C``."""
    steps = torch.arange(INTEGRATOR_HORIZON, dtype=_F64)
    C = torch.stack([INTEGRATOR_HORIZON - 1 - steps + 0.5, torch.ones_like(steps)])
    free = torch.tensor([1.0 - 0.5 * INTEGRATOR_HORIZON, -0.5], dtype=_F64)
    gram = C @ C.mT + torch.eye(2, dtype=_F64) / INTEGRATOR_WEIGHT
    return tuple((-C.mT @ torch.linalg.solve(gram, free)).reshape(-1, 1))


VARYING_SIZES = (3, 4, 4, 2, 3)
VARYING_CONTROLS = (2, 0, 3, 1)


def varying(batch: int | None) -> ControlProblem:
    """Sizes that change, a step without control, cross and affine terms everywhere."""
    sizes, controls = VARYING_SIZES, VARYING_CONTROLS
    steps = range(len(controls))
    dynamics = LinearDynamics(
        A=[0.6 * _normal(sizes[t + 1], sizes[t], seed=t) for t in steps],
        B=[_normal(sizes[t + 1], controls[t], seed=10 + t) for t in steps],
        c=[_normal(sizes[t + 1], seed=20 + t) for t in steps],
    )
    cost = QuadraticCost(
        Q=[_positive(sizes[t], 30 + t, 1.0) for t in steps],
        R=[_positive(controls[t], 40 + t, 1.0) for t in steps],
        N=[0.2 * _normal(sizes[t], controls[t], seed=50 + t) for t in steps],
        q=[_normal(sizes[t], seed=60 + t) for t in steps],
        r=[_normal(controls[t], seed=70 + t) for t in steps],
        Qf=_positive(sizes[-1], 80, 0.5),
        qf=_normal(sizes[-1], seed=81),
    )
    shape = (sizes[0],) if batch is None else (batch, sizes[0])
    return ControlProblem(dynamics, cost, x0=_normal(*shape, seed=90))


def random_linear_quadratic(
    sizes: list[int], controls: list[int], seed: int, batch: int | None = None, scale: float = 0.8
) -> ControlProblem:
    """A linear-quadratic problem with all terms; ``[Q N; N' R]`` is positive definite.

    `dense_optimum` gives its answer.

    Args:
        sizes: ``n_0..n_L``.
        controls: ``m_0..m_{L-1}``.
        seed: of its entries.
        batch: the number of examples; None for one state without a batch axis.
        scale: of the entries of ``A_t``, standard normal before.
    """
    steps = range(len(controls))
    dynamics = LinearDynamics(
        A=[scale * _normal(sizes[t + 1], sizes[t], seed=seed + 10 * t) for t in steps],
        B=[_normal(sizes[t + 1], controls[t], seed=seed + 10 * t + 1) for t in steps],
        c=[_normal(sizes[t + 1], seed=seed + 10 * t + 2) for t in steps],
    )
    weights = [_positive(sizes[t] + controls[t], seed + 10 * t + 3, 0.5) for t in steps]
    cost = QuadraticCost(
        Q=[W[:n, :n] for W, n in zip(weights, sizes, strict=False)],
        R=[W[n:, n:] for W, n in zip(weights, sizes, strict=False)],
        N=[W[:n, n:] for W, n in zip(weights, sizes, strict=False)],
        q=[_normal(sizes[t], seed=seed + 10 * t + 4) for t in steps],
        r=[_normal(controls[t], seed=seed + 10 * t + 5) for t in steps],
        Qf=_positive(sizes[-1], seed + 6, 0.1),
        qf=_normal(sizes[-1], seed=seed + 7),
    )
    shape = (sizes[0],) if batch is None else (batch, sizes[0])
    return ControlProblem(dynamics, cost, x0=_normal(*shape, seed=seed + 8))


def residual_network() -> ControlProblem:
    """Tanh layers, squared error; enough weight decay that one minimum remains."""
    dynamics = ResidualNetwork.random(5, width=4, hidden=6, control_size=3, seed=1)
    cost = SquaredErrorCost(_normal(7, 4, seed=2), weight_decay=1.0)
    return ControlProblem(dynamics, cost, x0=_normal(7, 4, seed=3))


def residual_known() -> ControlProblem:
    """The same layers, with the target under which `residual_known_exact` is stationary.

    ``grad J(u*) = F'(x_L - y)/N + w u* = 0``, F the Jacobian of the N final states in the controls:
    ``y = x_L + N w (F')^+ u*``, with the least change of the target that does it.
    """
    free, exact = residual_network(), residual_known_exact()
    weight_decay = 1.0

    def final(z: Tensor) -> Tensor:
        return free.rollout(_like(z, exact))[-1].reshape(-1)

    z = _flat(exact)
    jacobian = torch.func.jacrev(final)(z)
    shift = torch.linalg.lstsq(jacobian.mT, weight_decay * z[:, None], driver="gelsd").solution
    batch = len(free.x0)
    target = (final(z) + batch * shift[:, 0]).reshape(free.x0.shape)
    cost = SquaredErrorCost(target, weight_decay=weight_decay)
    return ControlProblem(free.dynamics, cost, free.x0)


def residual_known_exact() -> Controls:
    """The controls that are chosen: normal, of scale 0.03."""
    return tuple(0.03 * _normal(3, seed=200 + t) for t in range(5))


def residual_classifier() -> ControlProblem:
    """The same layers with cross-entropy and one label that does not count."""
    dynamics = ResidualNetwork.random(4, width=5, hidden=6, control_size=3, seed=4)
    labels = torch.tensor([0, 3, -100, 1, 4, 2])
    return ControlProblem(dynamics, CrossEntropyCost(labels, 0.5), x0=_normal(6, 5, seed=5))


def low_rank() -> ControlProblem:
    """Bilinear layers as in LoRA: not convex in the controls."""
    dynamics = LowRankDynamics([0.5 * _normal(3, 4, seed=6), 0.5 * _normal(4, 3, seed=7)], rank=2)
    cost = SquaredErrorCost(_normal(5, 3, seed=8), weight_decay=0.3)
    return ControlProblem(dynamics, cost, x0=_normal(5, 3, seed=9))


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=_F64)


def _positive(size: int, seed: int, least: float) -> Tensor:
    """A symmetric matrix with eigenvalues of at least ``least``."""
    root = _normal(size, size, seed=seed)
    return root @ root.mT / max(size, 1) + least * torch.eye(size, dtype=_F64)


def _flat(controls: Controls) -> Tensor:
    return torch.cat([u.detach().reshape(-1) for u in controls])


def _like(z: Tensor, controls: Controls) -> Controls:
    parts = z.split([u.numel() for u in controls])
    return tuple(part.reshape(u.shape) for part, u in zip(parts, controls, strict=True))


_DENSE = "u* = -H^{-1} grad J(0), H the Hessian of J"
_BRYSON = "Bryson & Ho, Applied Optimal Control (1975), ch. 2"

PROBLEMS = (
    KnownProblem(
        "scalar",
        scalar,
        linear_quadratic=True,
        exact=scalar_exact,
        formula="u_t = -x_0/(1 + L)",
        source=_BRYSON,
    ),
    KnownProblem(
        "scalar-box",
        scalar_box,
        exact=scalar_box_exact,
        formula="u_t = max(-x_0/(1 + L), low)",
        source=_BRYSON,
    ),
    KnownProblem(
        "double-integrator",
        double_integrator,
        linear_quadratic=True,
        exact=double_integrator_exact,
        formula="u = -C'(CC' + I/w)^{-1} A^L x_0",
        source=_BRYSON,
    ),
    KnownProblem(
        "varying",
        lambda: varying(None),
        linear_quadratic=True,
        exact=lambda: dense_optimum(varying(None)),
        formula=_DENSE,
        source="Nocedal & Wright, Numerical Optimization (2006), sec. 16.2: the reduced system",
    ),
    KnownProblem(
        "varying-batch",
        lambda: varying(6),
        linear_quadratic=True,
        exact=lambda: dense_optimum(varying(6)),
        formula=_DENSE,
        source="as varying",
    ),
    KnownProblem(
        "varying-per-example",
        lambda: varying(3),
        per_example=True,
        linear_quadratic=True,
        exact=lambda: dense_optimum(varying(3), per_example=True),
        formula=_DENSE,
        source="as varying",
    ),
    KnownProblem("residual", residual_network),
    KnownProblem(
        "residual-known",
        residual_known,
        exact=residual_known_exact,
        formula="the target is y = x_L(u*) + N w (F')^+ u*, F = dx_L/du at u*",
        source="a manufactured solution; Roache, Verification and Validation (1998), ch. 3",
    ),
    KnownProblem("residual-per-example", residual_network, per_example=True),
    KnownProblem("classifier", residual_classifier),
    KnownProblem("low-rank", low_rank, strongly_convex=False),
)
