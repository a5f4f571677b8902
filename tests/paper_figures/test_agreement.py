"""Published results beside ours: ranges decide, and one table holds all."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from deltacontrol.paper_figures import source
from deltacontrol.paper_figures.agreement import (
    Agreement,
    no_gain,
    on_side,
    same_order,
    same_side,
    same_size,
)
from deltacontrol.paper_figures.clusters import Clusters, Estimate
from deltacontrol.theory.errors import InputError

NAN = float("nan")


@pytest.mark.parametrize(
    ("low", "high", "above", "agrees"),
    [
        (1.1, 3.0, True, True),
        (0.2, 0.9, True, False),
        (0.9, 3.0, True, None),
        (0.2, 0.9, False, True),
        (1.1, 3.0, False, False),
        (0.9, 1.1, False, None),
        (NAN, NAN, False, None),
        (1.0, 2.0, True, None),
    ],
)
def test_a_whole_range_on_one_side_decides(
    low: float, high: float, above: bool, agrees: bool | None
) -> None:
    assert on_side(Estimate(0.5 * (low + high), low, high), 1.0, above=above) is agrees


@pytest.mark.parametrize(
    ("published", "low", "high", "agrees"),
    [
        (2.0, 0.1, 3.0, True),
        (2.0, -3.0, -0.1, False),
        (2.0, -0.1, 3.0, None),
        (-2.0, -3.0, -0.1, True),
        (-2.0, 0.1, 3.0, False),
        (-2.0, float("nan"), float("nan"), None),
    ],
)
def test_a_whole_interval_on_one_side_decides_a_sign(published, low, high, agrees) -> None:
    found = same_side("row", "says", published, Estimate(0.5 * (low + high), low, high))
    assert found.agrees is agrees


@pytest.mark.parametrize(
    ("low", "high", "agrees"),
    [(0.6, 1.4, True), (1.6, 2.4, False), (1.4, 1.6, None), (-2.0, 0.4, False), (0.4, 1.0, None)],
)
def test_a_size_agrees_within_its_margin(low: float, high: float, agrees: bool | None) -> None:
    found = same_size("row", "says", 1.0, Estimate(0.5 * (low + high), low, high), 0.5)
    assert found.agrees is agrees and found.published == "+1.0 (our margin 0.5)"


@pytest.mark.parametrize(
    ("low", "high", "agrees"),
    [(-1.0, 0.9, True), (1.1, 2.0, False), (0.5, 2.0, None), (-1.0, 1.5, None)],
)
def test_no_gain_means_below_the_margin(low: float, high: float, agrees: bool | None) -> None:
    # A gain that is surely there but below the margin is none.
    assert no_gain("row", "says", -0.3, Estimate(0.0, low, high), 1.0).agrees is agrees
    assert no_gain("row", "says", -0.3, Estimate(0.5, 0.2, 0.9), 1.0).agrees is True


def test_an_order_is_judged_by_the_means_of_whole_clusters() -> None:
    random = np.random.default_rng(0)
    levels = random.normal(70, 5, 10)[:, None]
    points = pd.DataFrame(levels + [3.0, 2.0, 1.0] + random.normal(0, 0.1, (10, 3)))
    points.columns = ["a", "b", "c"]
    clusters = Clusters([f"{i:02d}" for i in range(10)])
    assert same_order("row", ("a", "b", "c"), points, clusters).agrees is True
    reverse = same_order("row", ("c", "b", "a"), points, clusters)
    assert reverse.agrees is False and reverse.says == "c > b > a"
    # One exchange among neighbours is another order, however large τ is.
    exchanged = same_order("row", ("b", "a", "c"), points, clusters)
    assert exchanged.agrees is False and "τ 0.33" in exchanged.ours
    with pytest.raises(InputError, match="an order of a cannot be held against a, b, c"):
        same_order("row", ("a",), points, clusters)
    with pytest.raises(InputError, match="two methods or more, all of them there"):
        same_order("row", ("a", "d"), points, clusters)
    same = points.assign(b=points["a"] + np.tile([3.0, -3.0], 5))
    assert same_order("row", ("b", "a"), same, clusters).agrees is None


def test_a_number_without_a_range_is_shown_alone() -> None:
    assert Estimate(1.25).text(1, "+") == "+1.2"


def test_the_table_counts_and_explains(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    found = [
        Agreement("one", "a|b", "+1.0", "+2.0", True),
        Agreement("one", "c", "+1.0", "+9.0", False, "Because of this."),
        Agreement("two", "d", "1", "0", None),
    ]
    monkeypatch.setattr(source, "agreements", lambda: found)
    text = source.markdown()
    assert text.startswith("Of 3 published results in 2 experiments, 1 agrees, 1 disagrees, 1")
    assert source.sentence(found[:1] * 2) == "Of 2 published results in 1 experiment, 2 agree."
    assert "a\\|b" in text and "**one: c.** Because of this." in text
    path = tmp_path / "README.md"
    path.write_text(f"before\n{source.BEGIN}BEFORE\n{source.END}\nafter\n", encoding="utf-8")
    assert source.update(path) and text in path.read_text(encoding="utf-8")
    assert "BEFORE" not in path.read_text(encoding="utf-8")


def test_a_figure_without_published_results_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="solvers has no published results"):
        source.agreements(["solvers"])
