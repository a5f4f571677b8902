"""The estimator of a dimension against curves whose crossing is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from deltacontrol.theory.dimension.estimate import (
    Baseline,
    DimensionVerdict,
    crossing,
    estimate_dimension,
)
from deltacontrol.theory.errors import InputError

GRID = np.array([10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0])


def straight(d: np.ndarray) -> np.ndarray:
    """Performance that is linear in log d: 0.5 at d = 10, 0.9 at d = 1000."""
    return 0.5 + 0.2 * np.log10(d / 10)


def observed(seeds: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    d = np.repeat(GRID, seeds)
    return d, straight(d) + noise * random.standard_normal(len(d))


def test_a_straight_line_is_crossed_exactly() -> None:
    d, y = observed(3, 0.0)
    found = estimate_dimension(d, y, 0.75)
    assert found.dimension == pytest.approx(10 ** (1 + 0.25 / 0.2), rel=1e-12)
    # The seeds agree, so the interval is a point.
    assert (found.low, found.high) == pytest.approx([found.dimension] * 2, rel=1e-12)
    assert found.verdict is DimensionVerdict.ESTIMATED and str(found) == "178 [178, 178]"


def test_the_fit_is_isotonic_regression_of_all_runs() -> None:
    random = np.random.default_rng(1)
    d = np.array([10, 10, 20, 40, 40, 40, 80, 160, 160], dtype=float)
    y = random.standard_normal(len(d))
    found = estimate_dimension(d, y, 0.0)
    expected = IsotonicRegression().fit(np.log(d), y).predict(np.log(found.dimensions))
    np.testing.assert_allclose(found.fit, expected, atol=1e-12)


def test_a_dip_is_pooled_and_does_not_move_an_earlier_crossing() -> None:
    dimensions = np.array([1.0, 10.0, 100.0, 1000.0])
    found = estimate_dimension(dimensions, [0.0, 0.6, 0.4, 1.0], 0.25)
    assert found.fit == pytest.approx((0.0, 0.5, 0.5, 1.0))
    assert found.dimension == pytest.approx(10**0.5)
    assert crossing(dimensions, np.array(found.fit), 0.5) == pytest.approx(10.0)


def test_a_baseline_is_a_share_of_its_mean() -> None:
    d, y = observed(2, 0.0)
    found = estimate_dimension(d, y, Baseline((0.8, 0.9), share=0.9))
    assert found.target == pytest.approx(0.765)
    assert found.dimension == pytest.approx(10 ** (1 + 0.265 / 0.2))
    # The curve's seeds agree and the baseline's do not: the interval is the baseline's alone.
    assert found.low < found.dimension < found.high


@pytest.mark.parametrize(
    ("target", "chance", "verdict", "text", "words"),
    [
        (0.70, 0.5, DimensionVerdict.ESTIMATED, "95 [", "reaches the target 0.7 at"),
        (1.30, 0.5, DimensionVerdict.ABOVE_BUDGET, "> 3,000", "not reached up to"),
        (0.30, None, DimensionVerdict.BELOW_SMALLEST, "<= 10", "reaches the target 0.3 already"),
        (0.995, 0.5, DimensionVerdict.INCONCLUSIVE, "> 3,000]?", "beyond the largest"),
        (0.501, 0.5, DimensionVerdict.INCONCLUSIVE, "[<= 10, ", "below the smallest"),
        (0.70, 0.7, DimensionVerdict.INCONCLUSIVE, "]?", "no more than guessing"),
    ],
)
def test_verdicts(
    target: float, chance: float | None, verdict: DimensionVerdict, text: str, words: str
) -> None:
    d, y = observed(3, 0.01)
    found = estimate_dimension(d, y, target, chance=chance)
    assert found.verdict is verdict and text in str(found) and words in found.reason
    json.dumps(found.to_dict(), allow_nan=False)


def test_one_seed_gives_no_interval() -> None:
    d, y = observed(1, 0.01)
    found = estimate_dimension(d, y, 0.7)
    assert found.verdict is DimensionVerdict.INCONCLUSIVE and "add seeds" in found.reason
    assert found.draws == () and (found.low, found.high) == (0.0, math.inf)
    assert math.isnan(found.spread) and str(found).endswith("?")


def test_the_spread_is_the_pooled_standard_deviation() -> None:
    d, y = observed(3, 0.02, seed=4)
    deviations = y.reshape(-1, 3).var(1, ddof=1)
    assert estimate_dimension(d, y, 0.7).spread == pytest.approx(math.sqrt(deviations.mean()))


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "share"), [(2, 0.9), (3, 1.0)])
def test_the_interval_covers_the_truth_as_often_as_it_says(seeds: int, share: float) -> None:
    """Of 300 experiments, the noise in curve and baseline: 90 % up to three standard errors."""
    truth, trials, hits = 10 ** (1 + 0.25 / 0.2), 300, 0
    for trial in range(trials):
        d, y = observed(seeds, 0.02, seed=1000 + trial)
        noise = 0.02 * np.random.default_rng(trial).standard_normal(seeds)
        baseline = Baseline(tuple(0.75 / share + noise), share)
        found = estimate_dimension(d, y, baseline, num_draws=200, seed=trial)
        hits += found.low <= truth <= found.high
    error = 3 * math.sqrt(0.9 * 0.1 / trials)
    assert 0.9 - error <= hits / trials <= 0.9 + error


def test_the_interval_narrows_with_the_root_of_the_number_of_seeds() -> None:
    widths = []
    for seeds in (4, 64):
        d, y = observed(seeds, 0.02, seed=2)
        found = estimate_dimension(d, y, 0.75)
        widths.append(math.log(found.high / found.low))
    assert widths[0] / widths[1] == pytest.approx(4.0, rel=0.35)


@pytest.mark.parametrize(
    ("d", "y", "target", "words"),
    [
        ([], [], 0.5, "no runs"),
        ([10, 20], [0.1], 0.5, "one of each"),
        ([10, 20], [0.1, math.nan], 0.5, "item 1 is nan"),
        ([0, 20], [0.1, 0.2], 0.5, "expected finite"),
        ([10, 20], [0.1, 0.2], math.nan, "target is nan"),
    ],
)
def test_bad_input_is_refused(d: list, y: list, target: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        estimate_dimension(d, y, target)


def test_a_baseline_without_a_number_is_refused() -> None:
    with pytest.raises(InputError, match="item 1 is nan"):
        Baseline((0.5, math.nan))
