"""The threshold of a cross-entropy: solved subspaces, the quadratic limit, and what is refused."""

from __future__ import annotations

import math

import cvxpy
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import cross_entropy

from deltacontrol.theory.dimension.cone_threshold import cross_entropy_threshold
from deltacontrol.theory.dimension.gaussian_width import QuadraticLoss
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.model_curvature import softmax_factor

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem(count: int, classes: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the logits, logits and labels."""
    R = normal(count * classes, size, seed=1) * torch.arange(1, size + 1, dtype=F64) ** -0.5
    labels = torch.arange(count) % classes
    return R, 0.3 * normal(count, classes, seed=2), labels


def least(R: Tensor, logits: Tensor, labels: Tensor, P: Tensor) -> float:
    """The least cross-entropy in a subspace."""
    rows = R @ P

    def value(z: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.tensor(z, requires_grad=True)
        loss = cross_entropy(logits + (rows @ at).view_as(logits), labels)
        (gradient,) = torch.autograd.grad(loss, at)
        return float(loss.detach()), gradient.numpy()

    return float(minimize(value, np.zeros(P.shape[1]), jac=True, method="L-BFGS-B").fun)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_half_of_solved_subspaces_succeed(classes: int) -> None:
    R, logits, labels = problem(24, classes, 60)
    target = 0.35 * float(cross_entropy(logits, labels))
    found = cross_entropy_threshold(R @ R.mT, logits, labels, target, draws=40)
    dimensions = range(max(1, round(found.dimension) - 6), round(found.dimension) + 7, 3)
    shares = []
    for d in dimensions:
        hits = [least(R, logits, labels, normal(60, d, seed=9 + s)) <= target for s in range(40)]
        shares.append(float(np.mean(hits)))
    # Where the shares cross one half, between dimensions by a straight line.
    crossing = float(np.interp(0.5, shares, list(dimensions)))
    assert shares[0] < 0.5 < shares[-1]
    assert abs(crossing - found.dimension) < 1 + 4 * found.standard_error


def test_a_short_way_is_a_quadratic_one() -> None:
    """Just below the start, the loss is its second-order expansion: d* of the ridge formula.

    The expansion needs a small fall and many dimensions at once: all eigenvalues are alike, and
    the gradient is small against them.
    """
    count = 40
    R, logits = normal(2 * count, 120, seed=1), torch.zeros(count, 2, dtype=F64)
    labels = torch.arange(count) % 2
    kernel = R @ R.mT
    factor, s = softmax_factor(logits, labels)
    left = torch.block_diag(*factor).mT
    values, vectors = torch.linalg.eigh(left @ kernel @ left.mT)
    values = values.clamp_min(0)
    weights = values * (vectors.mT @ s.flatten()).square()
    loss = QuadraticLoss(values, torch.ones_like(values), values, weights)
    start = math.log(2)
    # Up to a fall of one third the expansion of log(1 + exp(-z)) at zero is exact to 1 %.
    predicted = loss.threshold(start / 3).dimension
    found = cross_entropy_threshold(kernel, logits, labels, start * 2 / 3, draws=60)
    assert found.dimension == pytest.approx(predicted, abs=1.5 + 4 * found.standard_error)
    assert found.rank == count


def test_a_solver_that_fails_says_what_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise cvxpy.SolverError("Solver 'CLARABEL' failed")

    monkeypatch.setattr(cvxpy.Problem, "solve", fail)
    R, logits, labels = problem(5, 2, 8)
    with pytest.raises(InputError, match="'CLARABEL' failed; take fewer rows"):
        cross_entropy_threshold(R @ R.mT, logits, labels, 0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": 5.0}, "the start's"),
        ({"target": -1.0}, "between 0"),
        ({"draws": 1}, "2 or more"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels"),
    ],
)
def test_what_cannot_be_is_refused(change: dict, words: str) -> None:
    R, logits, labels = problem(5, 2, 8)
    arguments = {"labels": labels, "target": 0.1} | change
    with pytest.raises(InputError, match=words):
        cross_entropy_threshold(R @ R.mT, logits, **arguments)
