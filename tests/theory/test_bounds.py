"""Bounds: their inversions against brute force, their probabilities against exact enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, hypergeom

from deltacontrol.theory.bounds import (
    binary_kl,
    code_length,
    countable_class_bound,
    gaussian_kl,
    kl_inverse,
    maurer_constant,
    monte_carlo_bound,
    pac_bayes_bound,
    quantise,
)
from deltacontrol.theory.errors import InputError


def test_the_divergence_of_two_coins() -> None:
    assert binary_kl(0.3, 0.3) == 0
    assert binary_kl(0, 0.5) == pytest.approx(math.log(2), rel=1e-15)
    assert binary_kl(0.5, 0.25) == pytest.approx(0.5 * math.log(4 / 3), rel=1e-14)
    assert math.isinf(binary_kl(0.5, 1.0)) and math.isinf(binary_kl(0.5, 0.0))


@settings(max_examples=60, deadline=None)
@given(q=st.floats(0, 1), c=st.floats(1e-4, 3))
def test_the_inversion_is_the_largest_p_of_a_fine_grid(q: float, c: float) -> None:
    found = kl_inverse(q, c)
    grid = np.linspace(q, 1, 20001)
    inside = [p for p in grid[:: len(grid) // 400] if binary_kl(q, p) <= c]
    assert q <= max(inside) <= found <= 1
    if found < 1:
        assert binary_kl(q, max(q, found - 2e-12)) <= c <= binary_kl(q, found)


def test_the_inversion_at_its_ends() -> None:
    assert kl_inverse(0.0, 0.3) == pytest.approx(1 - math.exp(-0.3), rel=1e-10)
    assert kl_inverse(0.4, 0.0) == pytest.approx(0.4, abs=2e-12)
    assert kl_inverse(1.0, 0.1) == kl_inverse(0.2, math.inf) == kl_inverse(0.0, 80.0) == 1.0


@pytest.mark.parametrize("true", [0.03, 0.2, 0.5, 0.9])
def test_a_bound_fails_at_most_as_often_as_it_says(true: float) -> None:
    """Exactly, over all counts of errors: rows that are independent, and rows of a population."""
    n, delta = 60, 0.05
    k = np.arange(n + 1)
    too_low = [countable_class_bound(i / n, 0.0, n, delta) < true for i in k]
    assert 0 < binom.pmf(k, n, true)[too_low].sum() <= delta or true == 0.03
    population = 100
    errors = round(true * population)
    low = [countable_class_bound(i / n, 0.0, n, delta) < errors / population for i in k]
    assert hypergeom.pmf(k, population, errors, n)[low].sum() <= delta
    # The mean of exp(n kl) is what the PAC-Bayes bound rests on.
    chances = binom.pmf(k, n, true)
    moment = sum(chances[i] * math.exp(n * binary_kl(i / n, true)) for i in k)
    assert moment <= maurer_constant(n) * (1 + 1e-12)


@pytest.mark.parametrize("errors", [0, 3, 40])
def test_it_is_little_above_the_exact_binomial_tail(errors: int) -> None:
    n, code, delta = 400, 30.0, 0.05
    exact = beta.isf(delta * math.exp(-code), errors + 1, n - errors)
    found = countable_class_bound(errors / n, code, n, delta)
    assert exact <= found <= 1.1 * exact


def test_a_longer_code_and_fewer_rows_loosen_the_bound_up_to_vacuity() -> None:
    bounds = [countable_class_bound(0.1, code, 1000, 0.05) for code in (0.0, 50.0, 500.0, 1e5)]
    assert bounds == sorted(bounds) and bounds[-1] == 1.0
    assert countable_class_bound(0.1, 50, 100, 0.05) > bounds[1]


@pytest.mark.parametrize("n", [1, 2, 8, 100, 10_000])
def test_the_constant_lies_between_its_bounds(n: int) -> None:
    assert math.sqrt(n) <= maurer_constant(n) <= 2 * math.sqrt(n) * (1 + 1e-12)
    if n <= 8:
        direct = sum(math.comb(n, k) * (k / n) ** k * (1 - k / n) ** (n - k) for k in range(n + 1))
        assert maurer_constant(n) == pytest.approx(direct, rel=1e-13)


def test_pac_bayes_pays_the_divergence_and_the_constant() -> None:
    n, delta, divergence = 500, 0.02, 12.0
    expected = (divergence + math.log(maurer_constant(n) / delta)) / n
    assert binary_kl(0.2, pac_bayes_bound(0.2, divergence, n, delta)) == pytest.approx(expected)


@pytest.mark.parametrize("parts", [(0.2, 0.2), (0.05, 0.35)])
def test_draws_of_unequal_coins_keep_their_level(parts: tuple[float, float]) -> None:
    """15 draws of one coin and 15 of another: exact over all pairs of counts."""
    m, delta, mean = 15, 0.1, sum(parts) / 2
    one, two = (binom.pmf(np.arange(m + 1), m, p) for p in parts)
    missed = sum(
        one[i] * two[j]
        for i, j in itertools.product(range(m + 1), repeat=2)
        if monte_carlo_bound((i + j) / (2 * m), 2 * m, delta) < mean
    )
    assert 0 < missed <= delta


def test_the_gaussian_divergence_is_that_of_torch() -> None:
    z = torch.randn(7, dtype=torch.float64)
    one = torch.distributions.Normal(z, torch.full_like(z, 0.3))
    two = torch.distributions.Normal(torch.zeros_like(z), torch.full_like(z, 1.7))
    expected = float(torch.distributions.kl_divergence(one, two).sum())
    assert gaussian_kl(z, 0.3, 1.7) == pytest.approx(expected, rel=1e-13)
    assert gaussian_kl(torch.zeros(4), 2.0, 2.0) == 0


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_the_code_is_a_distribution_over_sequences(levels: int) -> None:
    total = sum(
        math.exp(-code_length(torch.tensor(sequence), levels))
        for sequence in itertools.product(range(levels), repeat=5)
    )
    assert total == pytest.approx(1, rel=1e-12)


def test_the_code_is_the_product_of_what_an_adaptive_coder_expects() -> None:
    sequence, levels = [2, 0, 0, 1, 0, 2], 3
    counts, nats = [0] * levels, 0.0
    for index in sequence:
        nats -= math.log((counts[index] + 0.5) / (sum(counts) + levels / 2))
        counts[index] += 1
    assert code_length(torch.tensor(sequence), levels) == pytest.approx(nats, rel=1e-13)


@pytest.mark.parametrize("levels", [2, 3, 8, 33])
def test_rounding_is_the_nearest_level_of_the_best_scale(levels: int) -> None:
    z = 0.02 * torch.randn(200)
    found = quantise(z, levels)
    grid = torch.linspace(-found.scale, found.scale, levels, dtype=torch.float64)
    assert found.vector.dtype == z.dtype and len(found.vector.unique()) <= levels
    nearest = grid[(z.double()[:, None] - grid).abs().argmin(1)]
    torch.testing.assert_close(found.vector.double(), nearest, rtol=1e-6, atol=1e-9)
    assert found.code < 200 * math.log(levels) + levels * math.log(201) + math.log(128)
    finer = quantise(z, 2 * levels - 1)
    assert (finer.vector - z).norm() < (found.vector - z).norm()


def test_few_levels_of_a_concentrated_vector_cost_little() -> None:
    z = torch.zeros(1000)
    z[:5] = 1.0
    assert quantise(z, 3).code < 0.1 * 1000 * math.log(3)
    torch.testing.assert_close(quantise(z, 3).vector, z)


def test_arguments_out_of_range_are_named() -> None:
    for call, words in (
        (lambda: kl_inverse(1.2, 0.1), "q is 1.2"),
        (lambda: kl_inverse(0.2, math.nan), "divergence is nan"),
        (lambda: countable_class_bound(0.1, -1.0, 10, 0.05), "code is -1.0"),
        (lambda: countable_class_bound(0.1, 1.0, 0, 0.05), "0 rows"),
        (lambda: pac_bayes_bound(0.1, 1.0, 10, 0.0), "delta is 0.0"),
        (lambda: gaussian_kl(torch.zeros(2), 0.0, 1.0), "deviations are 0.0"),
        (lambda: quantise(torch.zeros(3), 1), "levels is 1"),
        (lambda: quantise(torch.tensor([math.nan]), 3), "finite"),
        (lambda: code_length(torch.tensor([3]), 3), "between 0 and 2"),
    ):
        with pytest.raises(InputError, match=words):
            call()
