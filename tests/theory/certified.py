"""Problems whose gap in a ball is known: by a dense eigenvalue problem, a KKT system, or cvxpy."""

from __future__ import annotations

from dataclasses import dataclass

import cvxpy
import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from deltacontrol.theory.control.costs import CrossEntropyCost
from deltacontrol.theory.control.dynamics import Dynamics
from deltacontrol.theory.control.problem import ControlProblem, Controls
from tests.theory.dense import flat, hessian, kkt, unflatten
from tests.theory.lq_problems import parts, random_problem, with_terms
from tests.theory.problems import normal

F64 = torch.float64
NAMES = ("linear-quadratic", "negative curvature", "logistic")


class Head(Dynamics):
    """``z = W x`` with the control ``W``: outputs that are affine in the controls."""

    horizon = 1

    def __init__(self, width: int, classes: int) -> None:
        self.shape = (classes, width)
        self.control_sizes = (classes * width,)

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        return x @ u.reshape(self.shape).mT


@dataclass(frozen=True, eq=False)
class Exact:
    """A problem, controls, a radius, and the best step in the ball by another method."""

    problem: ControlProblem
    controls: Controls
    radius: float
    best: Tensor
    affine: bool = False

    @property
    def gap(self) -> float:
        """What that step gains, shortened into the ball: certainly not more than can be gained."""
        step = self.best * min(1.0, self.radius / float(self.best.norm()))
        ahead = unflatten(flat(self.controls) + step, self.controls)
        return float(self.problem.objective(self.controls) - self.problem.objective(ahead))


def exact(number: int) -> Exact:
    """A random problem: linear-quadratic, with negative curvature, and logistic in turn."""
    draw = np.random.default_rng(number)
    made = (linear_quadratic, negative_curvature, logistic)[number % 3]
    return made(draw, number)


def linear_quadratic(draw: np.random.Generator, seed: int) -> Exact:
    problem, u = _sized(draw, seed)
    there = flat(kkt(problem, False)[0]) - flat(u)
    radius = float(draw.choice([0.1, 0.5, 0.9, 2.0]) * there.norm())
    if radius >= float(there.norm()):
        return Exact(problem, u, radius, there)
    return Exact(problem, u, radius, trust_region(*_second_order(problem, u), radius))


def negative_curvature(draw: np.random.Generator, seed: int) -> Exact:
    problem, u = _sized(draw, seed)
    weights, depth = parts(problem)[1].Q, float(draw.uniform(2, 6))
    H, g = _second_order(problem, u)
    while torch.linalg.eigvalsh(H)[0] >= 0:
        lowered = [Q - depth * torch.eye(len(Q), dtype=F64) for Q in weights]
        problem, depth = with_terms(problem, Q=lowered), 2 * depth
        H, g = _second_order(problem, u)
    radius = float(draw.choice([0.01, 0.3, 1.0, 10.0]))
    return Exact(problem, u, radius, trust_region(H, g, radius))


def logistic(draw: np.random.Generator, seed: int) -> Exact:
    rows, width, classes = (int(n) for n in draw.integers((5, 2, 2), (12, 9, 5)))
    decay = float(draw.choice([0.0, 1e-3, 0.1]))
    x0, labels = normal(rows, width, seed=seed), torch.arange(rows) % classes
    problem = ControlProblem(Head(width, classes), CrossEntropyCost(labels, decay), x0)
    u = (float(draw.choice([0.0, 0.3])) * normal(classes * width, seed=seed + 1),)
    radius = float(draw.choice([0.01, 0.3, 3.0]))
    W = cvxpy.Variable((classes, width))
    z, targets = x0.numpy() @ W.T, np.eye(classes)[labels.numpy()]
    loss = (cvxpy.sum(cvxpy.log_sum_exp(z, axis=1)) - cvxpy.sum(cvxpy.multiply(targets, z))) / rows
    start = u[0].reshape(classes, width).numpy()
    ball = cvxpy.norm(W - start, "fro") <= radius
    program = cvxpy.Problem(cvxpy.Minimize(loss + decay / 2 * cvxpy.sum_squares(W)), [ball])
    program.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    assert W.value is not None
    return Exact(problem, u, radius, torch.from_numpy((W.value - start).reshape(-1)), affine=True)


def trust_region(H: Tensor, g: Tensor, radius: float) -> Tensor:
    """The least ``g's + 1/2 s'Hs`` on the ball, from the eigenvalues of one matrix.

    The multiplier of the ball is the rightmost eigenvalue of ``[-H, gg'/r^2; I, -H]`` (Adachi,
    Iwata, Nakatsukasa & Takeda, SIAM J. Optim. 27(1), 2017, theorem 3.2).
    """
    if torch.linalg.eigvalsh(H)[0] > 0:
        s = -torch.linalg.solve(H, g)
        if s.norm() <= radius:
            return s
    eye = torch.eye(len(g), dtype=F64)
    matrix = torch.cat([torch.cat([-H, torch.outer(g, g) / radius**2], 1), torch.cat([eye, -H], 1)])
    multiplier = float(np.max(scipy.linalg.eigvals(matrix.numpy()).real))
    return -torch.linalg.solve(H + multiplier * eye, g)


def _sized(draw: np.random.Generator, seed: int) -> tuple[ControlProblem, Controls]:
    horizon = int(draw.integers(2, 6))
    sizes = draw.integers(1, 5, horizon + 1).tolist()
    controls = draw.integers(1, 4, horizon).tolist()
    problem = random_problem(sizes, controls, seed=100 * seed, batch=int(draw.integers(1, 4)))
    u = tuple(normal(m, seed=seed + t) for t, m in enumerate(controls))
    return problem, u


def _second_order(problem: ControlProblem, u: Controls) -> tuple[Tensor, Tensor]:
    return hessian(problem, u), flat(problem.gradient(u))
