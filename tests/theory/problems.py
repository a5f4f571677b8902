"""The problems of `deltacontrol.theory.control.solved_problems`, and more that only tests need."""

from __future__ import annotations

import torch
from torch import Tensor

from deltacontrol.theory.control.costs import CrossEntropyCost, QuadraticCost, SquaredErrorCost
from deltacontrol.theory.control.problem import Box, ControlProblem, Cost, Dynamics
from deltacontrol.theory.control.solved_problems import (  # noqa: F401 - tests take all problems from here
    PROBLEMS,
    double_integrator,
    low_rank,
    residual_classifier,
    residual_network,
    scalar,
    scalar_exact,
    varying,
)
from deltacontrol.theory.control.solved_problems import KnownProblem as Case  # noqa: F401
from deltacontrol.theory.control.solved_problems import _normal as normal
from deltacontrol.theory.control.solved_problems import _positive as positive  # noqa: F401
from deltacontrol.theory.control.systems import ResidualNetwork

F64 = torch.float64


CASES = tuple(known for known in PROBLEMS if known.make().box is None)


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
