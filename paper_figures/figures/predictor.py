"""Predictions before training, held against the study of many tasks.

`deltacontrol.experiments.studies.foretelling.judgement` says how they are judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.studies.foretelling import judgement
from deltacontrol.experiments.studies.foretelling.judgement import (
    COMBINATION,
    Outcome,
    Outcomes,
    best,
    between,
    cost_share,
    judge,
    kind,
    predictors,
    rate_error,
    spoken,
)
from deltacontrol.paper_figures import collect
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates
from deltacontrol.paper_figures.marks import letter, looks, method
from deltacontrol.theory.evidence import Evidence

TITLE = "Predictions before training, and what came"
STUDY = "foretelling"

COLORS = {"theory": "#0072B2", "learnt": "#D55E00", "baseline": "#777777"}
COMBINED = "#009E73"
INK = "#222222"


@cache
def outcomes() -> Outcomes:
    """The committed results of the study of many tasks.

    Raises:
        InputError: they are not committed.
    """
    return {
        (str(record.config["task"]), method(record.config["deltas"])): Outcome.of(record)
        for record in collect.committed("many_tasks")
        if "accuracy" in record.result
    }


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per task, predictor and method: score, loss, points, cost and rate."""
    check_replicates(records, [record.config["task"] for record in records])
    return judgement.table(records, outcomes())


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """By predictor its calibration, each number with an interval over corpora."""
    frame = table(records)
    rows = []
    for predictor in predictors(frame):
        judged = judge(frame, predictor)
        for what, evidence in judged.items():
            low, high = evidence.bounds()
            rows.append(
                {"predictor": predictor, "what": what, "value": evidence.value,
                 "low": low, "high": high}
            )  # fmt: skip
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a predictor."""
    rows = []
    for predictor in predictors(table):
        judged = judge(table, predictor)
        rows.append(
            {
                "predictor": predictor,
                "kind": kind(predictor),
                "methods": str(spoken(table, predictor)),
                "rank correlation": _text(judged["correlation"], 2),
                "regret (points)": _text(judged["regret"], 1),
                "best first (%)": _text(judged["top 1"], 0, 100),
                "best in 3 (%)": _text(judged["top 3"], 0, 100),
                "cost of training all (%)": f"{100 * cost_share(table, predictor):.2g}",
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Correlation, regret and hits by predictor; predicted rates against searched ones."""
    figure = Figure(figsize=(PAGE_WIDTH, 3.6), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[1.0, 1.0, 1.0, 1.25])
    panels = (
        ("correlation", "rank correlation"),
        ("regret", "regret (points)"),
        ("top 3", "best in 3"),
    )
    order = predictors(table)
    for ax, (what, label) in zip(axes, panels, strict=False):
        found = curves[curves["what"] == what].set_index("predictor")
        for place, name in enumerate(order):
            value, low, high = (float(found[c][name]) for c in ("value", "low", "high"))
            color = COMBINED if name == COMBINATION else COLORS[kind(name)]
            ax.plot([low, high], [place, place], color=color, marker="|", markersize=4)
            ax.plot([value], [place], "o", color=color, markersize=3.5)
        ax.set_yticks(range(len(order)), order if ax is axes[0] else [])
        ax.set_ylim(len(order) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.set_title(label)
    axes[0].axvline(0, color=INK, linewidth=0.8, zorder=0)
    _draw_rates(axes[3], table)
    letter(axes)
    handles, labels = axes[3].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, fontsize=6)
    return figure


def caption(table: pd.DataFrame) -> str:
    """Whether theory beats the baselines, and how it was measured."""
    first = table.iloc[0]
    return (
        f"{verdict(table)} {TITLE}: {table['task'].nunique()} tasks of "
        f"{table['corpus'].nunique()} corpora, {table['method'].nunique()} methods on "
        f"{first['model']}, predictions from {first['rows']} rows or fewer; blue: from "
        "a method's start alone, green: these combined, and red: orders, both learnt from the "
        "other "
        "half of the corpora, grey: baselines. "
        "Intervals (95 %) draw corpora. (a) Spearman's correlation of scores and test losses over "
        "methods. (b) Accuracy that is lost by taking the method with the best score. (c) How "
        "often the best method is among the three best scores. (d) Predicted learning rates "
        "against those that a search chose for the category; in the mean "
        f"{_text(rate_error(table), 1)} octaves off."
    )


def verdict(table: pd.DataFrame) -> str:
    """One sentence: the combination and the best baseline, paired over corpora."""
    judged = {name: judge(table, name) for name in predictors(table)}
    theirs = best(judged, "baseline", "learnt")
    low, high = between(table, COMBINATION, theirs).bounds()
    word = "beats" if low > 0 else "falls behind" if high < 0 else "cannot be told from"
    return (
        "What is computed at a method's start, combined, foretells the order of methods with rank "
        f"correlation {_text(judged[COMBINATION]['correlation'], 2)}, which {word} the best "
        f"baseline ({theirs}, {_text(judged[theirs]['correlation'], 2)})."
    )


def _text(evidence: Evidence, digits: int, scale: float = 1.0) -> str:
    values = (evidence.value, *evidence.bounds())
    shown = [f"{scale * value:.{digits}f}" for value in values]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _draw_rates(ax: Axes, table: pd.DataFrame) -> None:
    rows = judgement.rates(table)
    for name, look in looks(rows["method"]).items():
        own = rows[rows["method"] == name]
        jitter = 2 ** (0.25 * (np.arange(len(own)) / max(len(own) - 1, 1) - 0.5))
        ax.plot(own["searched_rate"] * jitter, own["rate"], look.marker, color=look.color,
                markersize=2.5, linestyle="", label=look.label)  # fmt: skip
    ends = [
        rows[["rate", "searched_rate"]].min().min(),
        rows[["rate", "searched_rate"]].max().max(),
    ]
    ax.plot(ends, ends, color=INK, linewidth=0.8, zorder=0)
    ax.set(xscale="log", yscale="log", xlabel="searched rate", ylabel="predicted", title="rates")
