"""Intervals over corpora: the same as over tasks where each has its own, and wide enough."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from deltacontrol.paper_figures.clusters import Clusters, Estimate
from deltacontrol.theory.evidence import Evidence


def test_with_one_task_a_corpus_it_is_the_bootstrap_of_tasks() -> None:
    values = np.random.default_rng(0).normal(size=12)
    clusters = Clusters([f"{i:02d}" for i in range(12)])
    found = clusters.estimate(clusters.means(values[:, None])[:, 0])
    plain = Evidence.resampled(np.mean, [values], "corpus")
    assert found.value == pytest.approx(plain.value, abs=1e-14)
    assert (found.low, found.high) == pytest.approx(plain.bounds(), abs=1e-12)


def test_means_are_of_whole_corpora() -> None:
    """Against the mean over the tasks of each draw, written out."""
    labels = ["b", "a", "a", "c", "c", "c"]
    values = np.arange(12.0).reshape(6, 2) ** 2
    clusters, taken = Clusters(labels, draws=20), np.random.default_rng(0).integers(0, 3, (20, 3))
    rows = {"a": [1, 2], "b": [0], "c": [3, 4, 5]}
    assert np.allclose(clusters.means(values)[0], values.mean(0))
    for draw, found, alike in zip(
        taken,
        clusters.means(values)[1:],
        Clusters(labels, draws=20, alike=True).means(values)[1:],
        strict=True,
    ):
        chosen = [rows["abc"[i]] for i in draw]
        assert np.allclose(found, values[np.concatenate(chosen)].mean(0))
        assert np.allclose(alike, np.mean([values[some].mean(0) for some in chosen], axis=0))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Ten corpora that differ: intervals over tasks would miss the mean far more often."""
    random, labels = np.random.default_rng(1), np.repeat(list("abcdefghij"), 8)
    hits = {"corpora": 0, "tasks": 0}
    count = 300
    for number in range(count):
        values = np.repeat(random.normal(size=10), 8) + random.normal(size=80)
        for name, unit in (("corpora", labels), ("tasks", [f"{i:02d}" for i in range(80)])):
            clusters = Clusters(list(unit), draws=600, seed=number)
            found = clusters.estimate(clusters.means(values[:, None])[:, 0])
            hits[name] += found.low <= 0.0 <= found.high
    assert binomtest(hits["corpora"], count, 0.95).pvalue > 0.01, hits
    assert hits["tasks"] < 0.75 * count


def test_few_corpora_give_no_interval() -> None:
    clusters = Clusters(["a", "b", "c", "d"])
    found = clusters.estimate(clusters.means(np.ones((4, 1)))[:, 0])
    assert found.value == 1.0 and math.isnan(found.low) and found.text() == "1.0"
    assert Estimate(1.25, -0.5, 2.0).text(2, "+") == "+1.25 [-0.50, +2.00]"
