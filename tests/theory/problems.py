"""Control problems with known answers, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.theory.control.costs import CrossEntropyCost, QuadraticCost, SquaredErrorCost
from deltacontrol.theory.control.problem import Box, ControlProblem, Controls, Cost, Dynamics
from deltacontrol.theory.control.systems import LinearDynamics, LowRankDynamics, ResidualNetwork

F64 = torch.float64


@dataclass(frozen=True)
class Case:
    """A problem, how to make it, and what is known about it.

    `exact` gives the optimal controls in closed form, `linear_quadratic` says that `kkt` applies,
    and `strongly_convex` that all solvers must find the same controls.
    """

    name: str
    make: Callable[[], ControlProblem]
    per_example: bool = False
    linear_quadratic: bool = False
    strongly_convex: bool = True
    exact: Callable[[], Controls] | None = None

    def start(self, problem: ControlProblem, scale: float = 0.0) -> Controls:
        """Zero controls, or random ones of the given scale."""
        zeros = problem.zero_controls(per_example=self.per_example, dtype=F64)
        generator = torch.Generator().manual_seed(5)
        return tuple(scale * torch.randn(u.shape, generator=generator, dtype=F64) for u in zeros)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def positive(size: int, seed: int, least: float) -> Tensor:
    """A symmetric matrix with eigenvalues of at least `least`."""
    root = normal(size, size, seed=seed)
    return root @ root.mT / max(size, 1) + least * torch.eye(size, dtype=F64)


SCALAR_HORIZON = 5


def scalar() -> ControlProblem:
    """``x_{t+1} = x_t + u_t``, ``J = 1/2 sum u_t^2 + 1/2 x_L^2``, ``x_0 = 3``."""
    one = torch.ones(1, 1, dtype=F64)
    return ControlProblem(
        LinearDynamics.constant(SCALAR_HORIZON, one, one),
        QuadraticCost.constant(SCALAR_HORIZON, Q=0 * one, R=one, Qf=one),
        x0=torch.tensor([3.0], dtype=F64),
    )


def scalar_exact() -> Controls:
    """``u_t = -x_L`` for all t, hence ``x_L = x_0/(1 + L)``."""
    return (torch.tensor([-3.0 / (1 + SCALAR_HORIZON)], dtype=F64),) * SCALAR_HORIZON


INTEGRATOR_HORIZON = 5
INTEGRATOR_WEIGHT = 2.0


def double_integrator() -> ControlProblem:
    """Bring position and velocity to rest with the least energy and a terminal penalty."""
    A = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=F64)
    B = torch.tensor([[0.5], [1.0]], dtype=F64)
    cost = QuadraticCost.constant(
        INTEGRATOR_HORIZON,
        Q=torch.zeros(2, 2, dtype=F64),
        R=torch.ones(1, 1, dtype=F64),
        Qf=INTEGRATOR_WEIGHT * torch.eye(2, dtype=F64),
    )
    dynamics = LinearDynamics.constant(INTEGRATOR_HORIZON, A, B)
    return ControlProblem(dynamics, cost, x0=torch.tensor([1.0, -0.5], dtype=F64))


def double_integrator_exact() -> Controls:
    """``u = -C'(CC' + I/w)^{-1} A^L x_0`` with columns ``(L - 1 - t + 1/2, 1)`` of ``C``."""
    steps = torch.arange(INTEGRATOR_HORIZON, dtype=F64)
    C = torch.stack([INTEGRATOR_HORIZON - 1 - steps + 0.5, torch.ones_like(steps)])
    free = torch.tensor([1.0 - 0.5 * INTEGRATOR_HORIZON, -0.5], dtype=F64)
    gram = C @ C.mT + torch.eye(2, dtype=F64) / INTEGRATOR_WEIGHT
    return tuple((-C.mT @ torch.linalg.solve(gram, free)).reshape(-1, 1))


VARYING_SIZES = (3, 4, 4, 2, 3)
VARYING_CONTROLS = (2, 0, 3, 1)


def varying(batch: int | None) -> ControlProblem:
    """Sizes that change, a step without control, cross and affine terms everywhere."""
    sizes, controls = VARYING_SIZES, VARYING_CONTROLS
    steps = range(len(controls))
    dynamics = LinearDynamics(
        A=[0.6 * normal(sizes[t + 1], sizes[t], seed=t) for t in steps],
        B=[normal(sizes[t + 1], controls[t], seed=10 + t) for t in steps],
        c=[normal(sizes[t + 1], seed=20 + t) for t in steps],
    )
    cost = QuadraticCost(
        Q=[positive(sizes[t], 30 + t, 1.0) for t in steps],
        R=[positive(controls[t], 40 + t, 1.0) for t in steps],
        N=[0.2 * normal(sizes[t], controls[t], seed=50 + t) for t in steps],
        q=[normal(sizes[t], seed=60 + t) for t in steps],
        r=[normal(controls[t], seed=70 + t) for t in steps],
        Qf=positive(sizes[-1], 80, 0.5),
        qf=normal(sizes[-1], seed=81),
    )
    shape = (sizes[0],) if batch is None else (batch, sizes[0])
    return ControlProblem(dynamics, cost, x0=normal(*shape, seed=90))


def residual_network() -> ControlProblem:
    """Tanh layers, squared error; enough weight decay that one minimum remains."""
    dynamics = ResidualNetwork.random(5, width=4, hidden=6, control_size=3, seed=1)
    cost = SquaredErrorCost(normal(7, 4, seed=2), weight_decay=1.0)
    return ControlProblem(dynamics, cost, x0=normal(7, 4, seed=3))


def residual_classifier() -> ControlProblem:
    """The same layers with cross-entropy and one label that does not count."""
    dynamics = ResidualNetwork.random(4, width=5, hidden=6, control_size=3, seed=4)
    labels = torch.tensor([0, 3, -100, 1, 4, 2])
    return ControlProblem(dynamics, CrossEntropyCost(labels, 0.5), x0=normal(6, 5, seed=5))


def low_rank() -> ControlProblem:
    """Bilinear layers as in LoRA: not convex in the controls."""
    dynamics = LowRankDynamics([0.5 * normal(3, 4, seed=6), 0.5 * normal(4, 3, seed=7)], rank=2)
    cost = SquaredErrorCost(normal(5, 3, seed=8), weight_decay=0.3)
    return ControlProblem(dynamics, cost, x0=normal(5, 3, seed=9))


CASES = (
    Case("scalar", scalar, linear_quadratic=True, exact=scalar_exact),
    Case(
        "double-integrator",
        double_integrator,
        linear_quadratic=True,
        exact=double_integrator_exact,
    ),
    Case("varying", lambda: varying(None), linear_quadratic=True),
    Case("varying-batch", lambda: varying(6), linear_quadratic=True),
    Case("varying-per-example", lambda: varying(3), per_example=True, linear_quadratic=True),
    Case("residual", residual_network),
    Case("residual-per-example", residual_network, per_example=True),
    Case("classifier", residual_classifier),
    Case("low-rank", low_rank, strongly_convex=False),
)


class Embedding(Dynamics):
    """Token numbers to vectors without a control, then a residual layer, then logits."""

    def __init__(self, vocabulary: int = 11, width: int = 4) -> None:
        self.horizon = 3
        self.control_sizes = (0, width, width)
        self.table = normal(vocabulary, width, seed=100)
        self.weight = normal(width, width, seed=101)

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        if t == 0:
            return self.table[x]
        if t == 1:
            return x + torch.tanh(x @ self.weight + (u if u.ndim == 1 else u[:, None]))
        return x.mean(1) * (1 + u)


def embedding_problem() -> ControlProblem:
    tokens = torch.arange(15).reshape(3, 5) % 11
    return ControlProblem(Embedding(), CrossEntropyCost(torch.tensor([0, 1, 3]), 0.1), tokens)


class Forgetful(Dynamics):
    """Step 1 ignores its state, step 2 its control: gradients there are zero, not errors."""

    horizon = 4
    control_sizes = (2, 2, 2, 2)

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        if t == 1:
            return u.sin() + torch.zeros_like(x).detach()
        if t == 2:
            return x.square()
        return x.tanh() + u


class TerminalOnly(Cost):
    """``Phi(x) = 1/2 ||x||^2``."""

    def terminal(self, x: Tensor) -> Tensor:
        return 0.5 * x.square().sum()


def forgetful_problem() -> ControlProblem:
    return ControlProblem(Forgetful(), TerminalOnly(), x0=normal(2, seed=110))


class Pendulum(Dynamics):
    """``theta'' = u - sin(theta)`` by the symplectic Euler method; the state is (angle, speed)."""

    def __init__(self, horizon: int, dt: float) -> None:
        self.horizon, self.dt = horizon, dt
        self.control_sizes = (1,) * horizon

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        angle, speed = x[..., :1], x[..., 1:]
        speed = speed + self.dt * (u - torch.sin(angle))
        return torch.cat([angle + self.dt * speed, speed], -1)


def pendulum() -> ControlProblem:
    """Swing up from rest, hanging, to rest, upright; the controls are cheap but not free."""
    horizon = 25
    upright = torch.tensor([torch.pi, 0.0], dtype=F64)
    weight = 10.0 * torch.eye(2, dtype=F64)
    cost = QuadraticCost(
        Q=[torch.zeros(2, 2, dtype=F64)] * horizon,
        R=[0.1 * torch.ones(1, 1, dtype=F64)] * horizon,
        Qf=weight,
        qf=-weight @ upright,
    )
    return ControlProblem(Pendulum(horizon, 0.16), cost, torch.zeros(2, dtype=F64))


def deep_residual_network(
    width: int, control_size: int | None = None, horizon: int = 12, seed: int = 0
) -> ControlProblem:
    """One example, normal start and target, weight decay 1e-2: far from convex.

    The target lies near the edge of what the bounded layers reach, so that they saturate and the
    residual stays large.
    """
    size = width if control_size is None else control_size
    dynamics = ResidualNetwork.random(horizon, width, width, size, seed=seed)
    x0, target = normal(2, width, seed=1000 + seed)
    return ControlProblem(dynamics, SquaredErrorCost(target, weight_decay=1e-2), x0)


def reachable_residual_network(width: int, batch: int | None = None) -> ControlProblem:
    """Twelve layers, weight decay 1e-2; the target is what unknown controls give, plus noise."""
    dynamics = ResidualNetwork.random(12, width=width, hidden=width, control_size=width)
    shape = (width,) if batch is None else (batch, width)
    x0 = normal(*shape, seed=1)
    hidden = tuple(0.5 * normal(width, seed=100 + t) for t in range(12))
    there = ControlProblem(dynamics, SquaredErrorCost(x0), x0).rollout(hidden)[-1]
    target = there + 0.1 * normal(*shape, seed=2)
    return ControlProblem(dynamics, SquaredErrorCost(target, weight_decay=1e-2), x0)


def boxed(problem: ControlProblem, low: float, high: float) -> ControlProblem:
    """The same problem with bounds on the controls."""
    return ControlProblem(problem.dynamics, problem.cost, problem.x0, Box(low, high))
