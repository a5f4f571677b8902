"""What the figure of many tasks computes from its records."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.style
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures import base
from deltacontrol.paper_figures.figures import many_tasks
from deltacontrol.theory.errors import InputError
from tests.paper_figures.synthetic import GRIDS


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [
        Record(f"{number:016x}", "fine-tuning", e.config, result, {}, "completed")
        for number, (e, result, _) in enumerate(GRIDS["many_tasks"]())
    ]


@pytest.fixture(scope="module")
def table(records: list[Record]) -> pd.DataFrame:
    return many_tasks.table(records)


def changed(records: list[Record], task: str, method: str, **result: float | None) -> list[Record]:
    """The records, one with another result."""
    return [
        replace(r, result=r.result | result)
        if (r.config["task"], r.config["deltas"][0]["name"]) == (task, method)
        else r
        for r in records
    ]


def test_points_gaps_and_ranks_are_those_of_the_records(records, table) -> None:
    rows = table.set_index(["task", "method"])
    for record in records:
        row = rows.loc[(record.config["task"], record.config["deltas"][0]["name"])]
        assert row["points"] == 100 * record.result[row["metric"]]
        assert row["gap"] == row["points"] - rows.loc[(record.config["task"], "full"), "points"]
    assert set(table.loc[table["metric"] == "pearson", "category"]) == {"regression"}
    count = table["method"].nunique()
    assert count == 8 and len(table) == len(records)
    ranks = table.groupby("task")["rank"]
    assert (ranks.sum() == count * (count + 1) / 2).all() and ranks.min().ge(1).all()
    best = table.loc[table.groupby("task")["points"].idxmax(), "rank"]
    assert best.lt(2.5).all()


def test_methods_that_are_level_share_a_rank_and_neither_wins(records) -> None:
    same = records
    for method in ("full", "lora"):
        same = changed(same, "movie", method, accuracy=1.0)
    table = many_tasks.table(same)
    rows = table[table["task"] == "movie"].set_index("method")
    assert rows.loc[["full", "lora"], "rank"].tolist() == [1.5, 1.5]
    lines = many_tasks.curves(same)
    won = lines[lines["what"] == "share won"].set_index(["method", "of"])["value"]
    points = many_tasks._points(table)
    for one, other in (("full", "lora"), ("prompt", "bitfit")):
        level = float((points[one] == points[other]).mean())
        assert won[(one, other)] + won[(other, one)] + level == pytest.approx(1.0, abs=1e-12)
    cells = many_tasks.summary(table).set_index("method")["above / level / below"]
    counts = [int(part) for part in cells["LoRA"].split(" / ")]
    assert sum(counts) == table["task"].nunique() and counts[1] >= 1


def test_a_run_without_a_metric_has_the_points_of_a_constant_answer(records, table) -> None:
    assert "the points of a constant answer" not in many_tasks.caption(table)
    worse = changed(records, "movie", "prompt", accuracy=None, majority_share=0.52)
    worse = changed(worse, "intensity", "prefix", pearson=None)
    found = many_tasks.table(worse).set_index(["task", "method"])
    assert found.loc[("movie", "prompt"), "points"] == 52.0
    assert found.loc[("intensity", "prefix"), "points"] == 0.0
    text = many_tasks.caption(found.reset_index())
    assert f"2 of {len(records)} runs diverged or give no correlation" in text


def test_published_averages_stand_beside_ours(table) -> None:
    found = many_tasks.agreement(table)
    means = many_tasks._points(table).mean()
    assert means[list(many_tasks.PUBLISHED_ORDER)].is_monotonic_decreasing  # as they were made
    assert found[0].ours.startswith("τ 1.00 [") and found[0].agrees is not False
    assert found[1].says == "adapter > BitFit > prompt"
    turned = table.assign(method=table["method"].replace({"full": "prompt", "prompt": "full"}))
    assert many_tasks.agreement(turned)[0].agrees is False
    # Pairs beside sentiment: four corpora have both, too few for an interval.
    both = table[table["category"].isin(["pair", "sentiment"])]
    points = both.pivot(index=["corpus", "category", "task"], columns="method", values="points")
    less = (points["prompt"] - points["houlsby"]).groupby(["corpus", "category"]).mean().unstack()
    expected = (less["pair"] - less["sentiment"]).dropna()
    assert found[-1].ours == f"{expected.mean():+.1f}" and found[-1].agrees is None
    assert sorted(expected.index) == ["amazon", "movie", "nyt", "tweets"]
    # Without one of two kinds of tasks nothing is said of their difference.
    without = table[table["category"] != "pair"]
    assert many_tasks.agreement(without)[-1].agrees is None


def test_what_full_fine_tuning_learns_is_above_a_constant_answer(table) -> None:
    full = table[(table["method"] == "full") & (table["category"] == "spam")].iloc[0]
    assert many_tasks._learnt(table)["spam"] == full["points"] - full["constant"]
    assert f"{full['points'] - full['constant']:.1f} (spam)" in many_tasks.caption(table)


def _diamonds(ax: Axes) -> list[tuple[float, float]]:
    return [
        (float(np.asarray(line.get_xdata())[0]), float(np.asarray(line.get_ydata())[0]))
        for line in ax.lines
        if line.get_marker() == "D"
    ]


def test_what_is_drawn_is_what_the_curves_say(records, table) -> None:
    lines = many_tasks.curves(records)
    gaps = lines[lines["what"] == "mean gap"].set_index(["method", "of"])["value"]
    for name, rows in table.groupby("method"):
        of_corpora = rows.groupby("corpus")["gap"].mean()
        assert gaps[(name, "all")] == pytest.approx(of_corpora.mean(), abs=1e-12)
        for category, own in rows.groupby("category"):
            assert gaps[(name, category)] == pytest.approx(own["gap"].mean(), abs=1e-12)
    with matplotlib.style.context(["default", base.STYLE]):
        picture = many_tasks.draw(table, lines)
        picture.canvas.draw()
    strips = picture.axes[0].collections
    drawn = sorted(np.concatenate([np.asarray(s.get_offsets())[:, 0] for s in strips]))
    assert drawn == sorted(table.loc[table["method"] != "full", "gap"])
    names = [label.get_text() for label in picture.axes[0].get_yticklabels()]
    shown = many_tasks.looks(table["method"])
    for ax, what in ((picture.axes[0], "mean gap"), (picture.axes[1], "mean rank")):
        means = lines[(lines["what"] == what) & (lines["of"] == "all")].set_index("method")["value"]
        marks = {names[round(float(y))]: float(x) for x, y in _diamonds(ax)}
        wanted = {shown[m].label: v for m, v in means.items() if what == "mean rank" or m != "full"}
        assert marks == wanted
    cells = [[t.get_text() for t in ax.texts] for ax in picture.axes[2:]]
    assert len(cells[0]) == 8 * table["category"].nunique() and len(cells[1]) == 64


def test_an_incomplete_grid_is_refused(records) -> None:
    with pytest.raises(InputError, match="1 tasks lack a method"):
        many_tasks.table(records[:-1])
    without = [r for r in records if r.config["deltas"][0]["name"] != "full"]
    with pytest.raises(InputError, match="all lack full"):
        many_tasks.table(without)
    strange = [replace(records[0], config=records[0].config | {"task": "mine"}), *records[1:]]
    with pytest.raises(InputError, match="which the study has not"):
        many_tasks.table(strange)
