"""Judging predictions, on numbers whose answers are known."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from deltacontrol.experiments.predicting.calibration import (
    Foretold,
    calibrate,
    octaves,
    over_corpora,
    rank_correlation,
    regret,
    split_by_corpus,
    top_share,
)
from deltacontrol.theory.errors import InputError


def test_the_rank_correlation_is_spearmans_with_ties() -> None:
    random = np.random.default_rng(0)
    correlate: Any = spearmanr  # its result's fields have no types
    for _ in range(20):
        a, b = random.integers(0, 5, 9).astype(float), random.integers(0, 5, 9).astype(float)
        expected = float(correlate(a, b).statistic)
        assert rank_correlation(a.tolist(), b.tolist()) == pytest.approx(expected, abs=1e-12)
    assert rank_correlation([1, 2, 3], [5, 6, 7]) == 1 == -rank_correlation([1, 2, 3], [7, 6, 5])
    assert rank_correlation([1, 1, 1], [5, 6, 7]) == 0


def test_regret_is_the_loss_given_away() -> None:
    assert regret([1, 2, 3], [0.2, 0.5, 0.9]) == 0
    assert regret([3, 2, 1], [0.2, 0.5, 0.9]) == pytest.approx(0.7)
    assert regret([1, 1, 2], [0.2, 0.5, 0.1]) == pytest.approx(0.35 - 0.1)


def test_hits_with_ties_are_means_over_all_orders() -> None:
    scores, losses = [2.0, 1.0, 2.0, 2.0, 3.0], [0.1, 0.5, 0.4, 0.3, 0.2]
    sorted_scores = sorted(scores)
    orders = [o for o in permutations(range(5)) if [scores[i] for i in o] == sorted_scores]
    for count in range(1, 6):
        expected = np.mean([0 in order[:count] for order in orders])
        assert top_share(scores, losses, count) == pytest.approx(expected)
    assert top_share([1, 1, 1], [0.1, 0.1, 0.2], 1) == pytest.approx(2 / 3)


def test_rates_are_compared_in_octaves() -> None:
    assert octaves(1e-3, 4e-3) == pytest.approx(-2)
    with pytest.raises(InputError, match="positive"):
        octaves(0.0, 1e-3)


def test_an_interval_is_over_corpora_however_many_tasks_one_has() -> None:
    corpora = ["a", "b", "c", "d", "e", "f"]
    values = [0.1, 0.4, 0.3, 0.9, 0.5, 0.2]
    found = over_corpora(values, corpora)
    assert found.value == pytest.approx(np.mean(values))
    assert found.interval is not None
    assert (found.interval.unit, found.interval.count) == ("corpus", 6)
    # Tasks that are copies of one another tell nothing more.
    again = over_corpora([*values, 0.1, 0.1, 0.1], [*corpora, "a", "a", "a"])
    assert again.value == pytest.approx(found.value) and again.bounds() == found.bounds()
    with pytest.raises(InputError, match="bootstrap"):
        over_corpora([0.1, 0.2], ["a", "b"])


def test_no_corpus_is_on_both_sides() -> None:
    corpora = [name for name in "abcdefg" for _ in range(3)]
    learnt, judged = split_by_corpus(corpora, 0.5, seed=3)
    assert sorted([*learnt, *judged]) == list(range(21))
    assert not {corpora[i] for i in learnt} & {corpora[i] for i in judged}
    assert len(learnt) == 3 * 4 and split_by_corpus(corpora, 0.5, seed=3) == (learnt, judged)
    for share in (0.01, 0.99):
        assert all(split_by_corpus(["a", "b"], share))
    for share, names in ((0.0, ["a", "b"]), (1.0, ["a", "b"]), (0.5, ["a", "a"])):
        with pytest.raises(InputError, match="two corpora or more"):
            split_by_corpus(names, share)


def made_up(sign: float) -> list[Foretold]:
    """Of a predictor that is always right, or always wrong."""
    losses = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    scores = {name: sign * loss for name, loss in losses.items()} | {"e": math.nan, "f": 0.0}
    return [Foretold(f"task {i}", f"corpus {i // 2}", scores, losses) for i in range(12)]


def test_what_is_always_right_and_always_wrong() -> None:
    right, wrong = calibrate(made_up(1.0)), calibrate(made_up(-1.0))
    assert (right.correlation.value, wrong.correlation.value) == (1.0, -1.0)
    assert (right.regret.value, wrong.regret.value) == pytest.approx((0.0, 0.3))
    assert (right.top_one.value, wrong.top_one.value) == (1.0, 0.0)
    assert (right.top_three.value, wrong.top_three.value) == (1.0, 0.0)


def test_what_has_no_order_is_refused() -> None:
    with pytest.raises(InputError, match="1 methods have a score and a loss"):
        _ = Foretold("t", "c", {"a": 1.0, "b": math.nan}, {"a": 1.0, "b": 2.0}).pairs
    for pair in (([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, math.nan], [1.0, 2.0])):
        with pytest.raises(InputError, match="two methods or more"):
            rank_correlation(*pair)
    with pytest.raises(InputError, match="count is 0"):
        top_share([1, 2], [1, 2], 0)
