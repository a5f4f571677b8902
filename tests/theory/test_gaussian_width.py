"""The escape threshold: exact falls, closed forms, and exact solves in random subspaces."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.dimension.gaussian_width import (
    EscapeThreshold,
    QuadraticLoss,
    published_threshold,
)
from deltacontrol.theory.dimension.random_subspaces import (
    MeasuredThreshold,
    falls,
    measured_threshold,
)
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.krylov import quadrature, spectral_density
from deltacontrol.theory.linear.operator import SymmetricMatrix

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def power_law(n: int, exponent: float) -> tuple[Tensor, Tensor]:
    return torch.arange(1, n + 1, dtype=F64) ** -exponent, normal(n, seed=1)


def test_falls_are_those_of_the_normal_equations() -> None:
    values, x = power_law(12, 1.5)
    generator = torch.Generator().manual_seed(5)
    P = torch.randn(12, 9, generator=generator, dtype=F64)
    found = falls(values, values * x, 9, seed=5)
    for d in range(1, 10):
        sub = P[:, :d]
        b = sub.T @ (values * x)
        exact = 0.5 * b @ torch.linalg.solve(sub.T @ (values[:, None] * sub), b)
        assert float(found[d - 1]) == pytest.approx(float(exact), rel=1e-10)


def test_all_directions_give_the_whole_fall() -> None:
    values, x = power_law(12, 1.0)
    loss = QuadraticLoss.exact(values, x)
    whole = float(0.5 * (values * x.square()).sum())
    assert loss.largest_fall == pytest.approx(whole, rel=1e-12)
    assert float(falls(values, values * x, 12, seed=0)[-1]) == pytest.approx(whole, rel=1e-10)


def test_an_isotropic_loss_has_the_circular_cones_threshold() -> None:
    """A ball of radius r seen from R: the cone of sin(a) = r/R has dimension D sin^2 a."""
    values, x = torch.ones(50, dtype=F64), normal(50)
    loss = QuadraticLoss.exact(values, x)
    found = loss.threshold(0.8 * loss.largest_fall)
    assert found.dimension == pytest.approx(50 * 0.8, rel=1e-9)
    assert found.width == pytest.approx(math.sqrt(2 * 50 * 0.8 * 0.2), rel=1e-9)
    assert found.kappa == pytest.approx(0.25, rel=1e-9)


def test_flat_directions_change_neither_the_threshold_nor_its_width() -> None:
    values, x = power_law(30, 1.0)
    loss = QuadraticLoss.exact(values, x)
    wide = QuadraticLoss.exact(torch.cat([values, torch.zeros(500, dtype=F64)]), normal(530))
    wide = QuadraticLoss(wide.values, wide.counts, loss.gradient_values, loss.gradient_weights)
    one, other = (found.threshold(0.5 * loss.largest_fall) for found in (loss, wide))
    assert one.dimension == pytest.approx(other.dimension, rel=1e-12)
    assert one.width == pytest.approx(other.width, rel=1e-12)


def test_the_published_formula_is_exact_without_flat_directions_and_too_large_with_them() -> None:
    values, x = torch.ones(40, dtype=F64), normal(40)
    loss = QuadraticLoss.exact(values, x)
    target = 1e-3 * loss.largest_fall
    ours = loss.threshold(loss.largest_fall - target).dimension
    assert published_threshold(values, x, target) == pytest.approx(ours, rel=2e-3)
    # Displacement along flat directions adds to R and to nothing that matters.
    flat = torch.cat([values, torch.zeros(400, dtype=F64)])
    moved = torch.cat([x, 10 * normal(400, seed=2)])
    target = 0.3 * loss.largest_fall
    ours = QuadraticLoss.exact(flat, moved).threshold(0.7 * loss.largest_fall).dimension
    assert ours == pytest.approx(0.7 * 40, rel=1e-9)
    assert published_threshold(flat, moved, target) > 1.3 * ours


def test_kappa_and_dimension_are_inverse() -> None:
    loss = QuadraticLoss.exact(*power_law(100, 1.0))
    found = loss.threshold(0.6 * loss.largest_fall)
    assert loss.kappa(found.dimension) == pytest.approx(found.kappa, rel=1e-9)
    assert loss.expected_fall(found.dimension) == pytest.approx(0.6 * loss.largest_fall, rel=1e-9)


@pytest.mark.parametrize(("exponent", "share"), [(1.0, 0.8), (2.0, 0.95)])
def test_exact_solves_succeed_where_predicted(exponent: float, share: float) -> None:
    """Mean within four standard errors and a dimension; the width within its sampling error."""
    values, x = power_law(250, exponent)
    loss = QuadraticLoss.exact(values, x)
    fall = share * loss.largest_fall
    found = loss.threshold(fall)
    drawn = measured_threshold(values, values * x, fall, 250, range(80)).dimensions
    error = found.width / math.sqrt(80)
    # A nested draw crosses at the next whole number, half a dimension late on average.
    assert abs(statistics.mean(drawn) - 0.5 - found.dimension) < 4 * error + 1
    # The standard deviation of 80 normal numbers has a relative error of 8 %.
    assert abs(statistics.stdev(drawn) / found.width - 1) < 4 * 0.08


def test_lanczos_gives_the_same_threshold_within_its_standard_error() -> None:
    values, x = power_law(300, 1.5)
    basis, _ = torch.linalg.qr(normal(300, 300))
    W = basis @ torch.diag(values) @ basis.T
    gradient = (basis @ (values * x))[None]
    operator = SymmetricMatrix(W)
    exact = QuadraticLoss.exact(values, x)
    found = QuadraticLoss.estimated(
        spectral_density(operator, 60, probes=20), quadrature(operator, gradient, 60)
    )
    fall = 0.7 * exact.largest_fall
    one, other = found.threshold(fall), exact.threshold(fall)
    assert 0 < one.standard_error < 0.1 * one.dimension
    assert abs(one.dimension - other.dimension) < 4 * one.standard_error
    assert one.kappa == pytest.approx(other.kappa, rel=1e-6)


def test_probabilities_and_quantiles() -> None:
    found = EscapeThreshold(100.0, 10.0, 1.0)
    assert found.probability(100) == 0.5
    assert found.probability(110) == pytest.approx(0.841345, abs=1e-6)
    assert found.probability(found.quantile(0.9)) == pytest.approx(0.9)


def test_the_interval_of_a_median_covers_it_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        drawn = torch.randn(25, generator=generator, dtype=F64).sort().values
        low, high = MeasuredThreshold(tuple(drawn.tolist())).interval()
        hits += low <= 0 <= high
    # Exactly 0.957 for 25 draws; four standard errors of 400 trials are 0.04.
    assert 0.957 - 0.04 < hits / 400 < 0.957 + 0.04
    measured = MeasuredThreshold((1.0, 2.0, 4.0, float("inf")))
    assert measured.median == 3.0 and measured.share(2) == 0.5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q: q.threshold(2 * q.largest_fall), "at most"),
        (lambda q: q.kappa(11.0), "rank 10"),
        (lambda q: QuadraticLoss(q.values, q.counts[:2], q.values, q.values), "one\n? ?length"),
        (lambda q: QuadraticLoss(q.values, -q.counts, q.values, q.values), "negative"),
        (lambda q: QuadraticLoss.exact(q.values, 0 * q.values), "gradient is zero"),
        (lambda q: falls(0 * q.values, q.values, 2, 0), "flat directions"),
        (lambda q: falls(q.values, q.values, 11, 0), "1 to 10"),
    ],
)
def test_what_cannot_be_is_refused(call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(QuadraticLoss.exact(*power_law(10, 1.0)))
