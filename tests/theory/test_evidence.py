"""Intervals of evidence against closed forms, SciPy, and their coverage."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.evidence import Evidence, Interval


def test_students_interval_is_that_of_scipy() -> None:
    values = [0.3, 0.9, 0.4, 0.7, 0.55]
    found = Evidence.mean(values, "seed")
    for confidence in (0.5, 0.95, 0.999):
        expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
        assert found.bounds(confidence) == pytest.approx(tuple(expected), rel=1e-12)
    assert found.value == pytest.approx(np.mean(values))
    assert "5 seeds" in found.text
    assert "2 corpora" in Evidence.mean([1.0, 2.0], "corpus").text


def test_a_geometric_mean_has_the_interval_of_its_logarithms() -> None:
    values = [0.01, 0.3, 0.02, 1.5]
    found = Evidence.geometric_mean(values, "problem")
    assert found.value == pytest.approx(stats.gmean(values))
    logs = stats.ttest_1samp(np.log(values), 0).confidence_interval(0.9)
    assert found.bounds(0.9) == pytest.approx((math.exp(logs.low), math.exp(logs.high)))
    scaled = Evidence.geometric_mean([7 * x for x in values], "problem")
    assert scaled.bounds() == pytest.approx(tuple(7 * x for x in found.bounds()))


@pytest.mark.parametrize(("successes", "count"), [(0, 20), (3, 20), (20, 20), (1, 1)])
def test_a_share_has_the_exact_interval(successes: int, count: int) -> None:
    low, high = Evidence.share(successes, count, "step").bounds()
    tail = stats.binom
    # Clopper & Pearson: at each end the observed count has the probability 2.5 %.
    if successes:
        assert tail.sf(successes - 1, count, low) == pytest.approx(0.025)
    else:
        assert low == 0
    if successes < count:
        assert tail.cdf(successes, count, high) == pytest.approx(0.025)
    else:
        assert high == 1


def test_no_ascent_of_twenty_allows_fourteen_in_a_hundred_at_95_percent_one_sided() -> None:
    assert Evidence.share(0, 20, "step").bounds(0.9)[1] == pytest.approx(1 - 0.05 ** (1 / 20))


def test_resampling_draws_units_whole_and_again_the_same() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=40)
    y = x + 0.5 * random.normal(size=40)

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a, b)[0, 1])

    found = Evidence.resampled(correlation, [x, y], "site", seed=3)
    assert found == Evidence.resampled(correlation, [x, y], "site", seed=3)
    assert found.value == pytest.approx(correlation(x, y))
    own = stats.bootstrap(
        (x, y), correlation, paired=True, vectorized=False, method="percentile",
        rng=np.random.default_rng(1), n_resamples=4000,
    ).confidence_interval  # fmt: skip
    assert found.bounds() == pytest.approx((own.low, own.high), abs=0.02)
    shuffled = Evidence.resampled(correlation, [x, y[::-1]], "site", seed=3)
    assert shuffled.bounds()[0] < 0 < shuffled.bounds()[1]  # pairs stay together


def test_the_mean_of_many_is_covered_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = {0.8: 0, 0.95: 0}
    for _ in range(2000):
        found = Evidence.mean(random.normal(1.0, 2.0, 6).tolist(), "seed")
        for confidence in covered:
            low, high = found.bounds(confidence)
            covered[confidence] += low <= 1.0 <= high
    for confidence, count in covered.items():
        low, high = Evidence.share(count, 2000, "sample").bounds(0.999)
        assert low <= confidence <= high


def test_the_detectable_distance_is_told_four_times_of_five() -> None:
    random = np.random.default_rng(1)
    told, least = 0, []
    for _ in range(2000):
        found = Evidence.mean(random.normal(0.0, 1.0, 40).tolist(), "seed")
        assert found.interval is not None
        least.append(found.interval.detectable())
    distance = float(np.mean(least))
    for _ in range(2000):
        low, _ = Evidence.mean(random.normal(distance, 1.0, 40).tolist(), "seed").bounds()
        told += low > 0
    assert told / 2000 == pytest.approx(0.8, abs=0.03)


def test_the_worst_of_cases_is_exact_and_no_number_stays_none() -> None:
    found = Evidence.worst({"a": 1e-15, "b": 3e-15}, note="x", details={"more": 1})
    assert (found.value, found.cases, found.bounds()) == (3e-15, 2, (3e-15, 3e-15))
    assert found.details == {"a": 1e-15, "b": 3e-15, "more": 1}
    assert Evidence.worst({"a": 1.0, "b": 2.0}, least=True).value == 1.0
    assert math.isnan(Evidence.worst({"a": 1.0, "b": math.nan}).value)
    assert "worst of 2 cases" in found.text


def test_infinite_draws_give_infinite_ends() -> None:
    found = Evidence.of_draws(2.0, [1.0, 2.0, 3.0, math.inf], "draw", 4)
    assert found.bounds(0.99)[1] == math.inf


def test_evidence_survives_json() -> None:
    for found in (
        Evidence.mean([1.0, 2.0], "seed", assumptions={"converged": np.bool_(True)}),
        Evidence.share(1, 3, "step", details={"x": np.float32(0.5)}),
        Evidence(3.0),
    ):
        assert Evidence(**json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Evidence.mean([1.0], "seed"), "needs two"),
        (lambda: Evidence.share(3, 2, "step"), "3 successes of 2"),
        (lambda: Evidence.geometric_mean([1.0, 0.0], "problem"), "positive finite"),
        (lambda: Evidence.worst({}), "no case"),
        (lambda: Evidence.resampled(lambda a: 0.0, [[1.0]], "x"), "at least 5"),
        (lambda: Evidence.of_draws(0.0, [math.nan, math.nan, 1.0], "x", 3), "2 of 3 draws"),
        (lambda: Interval("normal", "x", 3, (1.0,)), "interval"),  # type: ignore[arg-type]
        (lambda: Interval("t", "x", 3, (1.0, 2.0, 3.0)).at(1.0), "between 0 and 1"),
        (lambda: Evidence(0.0, details={"x": object()}), "details hold"),
    ],
)
def test_what_is_no_evidence_is_refused(make, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


def test_a_bootstrap_of_few_units_is_as_wide_as_students_interval():
    """At a false bound as many samples pass as the interval says, not several times that."""
    random, passed = np.random.default_rng(1), 0
    for _ in range(400):
        found = Evidence.resampled(np.mean, [random.normal(size=8)], "x", resamples=400)
        passed += found.bounds()[1] < 0
    assert passed <= 20  # 2.5 % are 10; plain percentiles give about 24


@pytest.mark.parametrize(
    ("method", "count", "data"),
    [
        ("t", 100, (1.0, 2.0)),
        ("geometric", 2, (1.0, -2.0)),
        ("binomial", 4, (5.0,)),
        ("binomial", 4, (2.5,)),
        ("bootstrap", 5, (1.0, 3.0, 2.0)),
    ],
)
def test_data_that_do_not_fit_their_interval_are_refused(method, count, data):
    with pytest.raises(InputError, match=f"an interval by {method}"):
        Interval(method, "x", count, data)


def test_numbers_near_the_largest_have_an_interval():
    assert Interval("t", "x", 2, (1e200, -1e200)).at()[1] > 1e200
    assert Interval("geometric", "x", 2, (1e-300, 1e300)).at() == (0.0, math.inf)


def test_five_rows_are_drawn_again_at_least():
    with pytest.raises(InputError, match="at least 5"):
        Evidence.resampled(np.mean, [[1.0, 2.0, 3.0, 4.0]], "x")


@pytest.mark.parametrize("draws", [[], [0.5]])
def test_what_was_not_repeated_says_so(draws: list[float]) -> None:
    with pytest.raises(InputError, match=r"draws of the unit 'training' give no interval.*add"):
        Evidence.of_draws(0.5, draws, "training", 1)
