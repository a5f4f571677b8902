"""Linear-quadratic problems, and their parts."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.control.solved_problems import random_linear_quadratic as random_problem  # noqa: F401 - tests take it from here
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.lq import LQPolicy, riccati
from tests.theory.dense import flat
from tests.theory.problems import normal

F64 = torch.float64


ONE = torch.ones(1, 1, dtype=F64)
QUADRATIC = ("A", "B", "Q", "R", "Qf", "N")


def parts(problem: ControlProblem) -> tuple[LinearDynamics, QuadraticCost]:
    dynamics, cost = problem.dynamics, problem.cost
    assert isinstance(dynamics, LinearDynamics) and isinstance(cost, QuadraticCost)
    return dynamics, cost


def with_terms(problem: ControlProblem, **terms: Any) -> ControlProblem:
    """The problem with other terms of its cost."""
    cost = dataclasses.replace(parts(problem)[1], **terms)
    return dataclasses.replace(problem, cost=cost)


def quadratic(problem: ControlProblem) -> tuple:
    dynamics, cost = parts(problem)
    return dynamics.A, dynamics.B, cost.Q, cost.R, cost.Qf, cost.N


def policy_of(problem: ControlProblem) -> LQPolicy:
    dynamics, cost = parts(problem)
    return riccati(*quadratic(problem), c=dynamics.c, q=cost.q, r=cost.r, qf=cost.qf)


def relative(a: Controls, b: Controls) -> float:
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


def batch_terms(*lead: int, horizon: int = 5, n: int = 4, m: int = 2) -> dict[str, Tensor]:
    root = normal(horizon, *lead, n + m, n + m, seed=30)
    weight = root @ root.mT / (n + m) + 0.5 * torch.eye(n + m, dtype=F64)
    last = normal(*lead, n, n, seed=31)
    return {
        "A": 0.5 * normal(horizon, *lead, n, n, seed=32),
        "B": normal(horizon, *lead, n, m, seed=33),
        "Q": weight[..., :n, :n],
        "R": weight[..., n:, n:],
        "N": weight[..., :n, n:],
        "Qf": last @ last.mT,
        "c": normal(horizon, *lead, n, seed=34),
        "q": normal(horizon, *lead, n, seed=35),
        "r": normal(horizon, *lead, m, seed=36),
        "qf": normal(*lead, n, seed=37),
    }
