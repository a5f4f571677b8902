"""Deltas beside full fine-tuning on more than a hundred tasks, which nine corpora share.

Points are 100 × accuracy, and 100 × Pearson correlation for regressions: one scale of 0 to 100 on
which both mean "all right" at its top. A run that diverged, or whose outputs are constant, has the
points of a constant answer: the share of the majority class, or no correlation. Ranks and wins do
not depend on the scale. Intervals draw corpora, not tasks: `deltacontrol.paper_figures.clusters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.studies.many_tasks.grid import questions
from deltacontrol.paper_figures.agreement import Agreement, same_order, same_side
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates
from deltacontrol.paper_figures.clusters import Clusters, Estimate
from deltacontrol.paper_figures.marks import joined, looks, method, number
from deltacontrol.theory.errors import InputError

TITLE = "Deltas and full fine-tuning on tasks of many kinds"
STUDY = "many_tasks"

REFERENCE = "full"
# Ding et al., Nature Machine Intelligence 5, 2023: the order of performance with T5-base over the
# tasks of their study, and averages of Table 2 (GLUE, RoBERTa-large, full data, no template).
PUBLISHED_ORDER = ("full", "lora", "houlsby", "prefix", "prompt")
PUBLISHED_AVERAGES = {"houlsby": 87.4, "bitfit": 86.6, "prompt": 77.7}  # the best first
# The same table: prompt tuning less the adapter, the mean of MRPC, STS-B, QQP, MNLI, QNLI and RTE,
# which are pairs, and on SST-2.
PUBLISHED_PROMPT = {"pair": -8.77, "sentiment": -0.5}
INK, DOT, BOX = "#222222", "#0072B2", "#DADADA"


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run: its points, their distance from full fine-tuning's, its rank on the task.

    Raises:
        InputError: a task is none of the study's, or lacks a method that others have.
    """
    labels = [(str(r.config["task"]), method(r.config["deltas"])) for r in records]
    check_replicates(records, labels)
    rows = []
    for record, (task, name) in zip(records, labels, strict=True):
        if task not in questions():
            raise InputError(f"run {record.id} is of the task {task}, which the study has not")
        result, question = record.result, questions()[task]
        metric = "pearson" if "pearson" in result else "accuracy"
        constant = 0.0 if metric == "pearson" else number(result["majority_share"])
        found = number(result[metric])
        rows.append(
            {
                "category": question.category,
                "corpus": question.corpus,
                "task": task,
                "method": name,
                "metric": metric,
                "points": 100 * (constant if np.isnan(found) else found),
                "constant": 100 * constant,
                "told": bool(~np.isnan(found)),
                "num_evaluated": result["num_evaluated"],
                "learning_rate": record.config["learning_rate"],
                "model": record.config["model"],
                "steps": record.config["steps"],
                "batch_size": record.config["batch_size"],
                "max_length": record.config["max_length"],
                "trainable_share": result["trainable_share"],
                "status": record.status,
                "run": record.id,
            }
        )
    frame = _ordered(pd.DataFrame(rows))
    lacking = _points(frame).isna().any(axis=1)
    if lacking.any() or REFERENCE not in set(frame["method"]):
        raise InputError(
            f"{int(lacking.sum())} tasks lack a method that others have, or all lack {REFERENCE}; "
            "run the whole grid"
        )
    reference = frame[frame["method"] == REFERENCE].set_index("task")["points"]
    frame["gap"] = frame["points"] - frame["task"].map(reference)
    frame["rank"] = frame.groupby("task")["points"].rank(ascending=False)
    return frame


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """Every number that is drawn as a bar, an interval or a cell."""
    frame = table(records)
    points = _points(frame)
    rows: list[dict[str, Any]] = []
    for what in ("points", "gap", "rank"):
        for name, found in _averages(frame, what).items():
            rows.append({"what": f"mean {what}", "method": name, "of": "all", **vars(found)})
    categories = frame.groupby(["category", "method"], sort=False)["gap"].mean()
    rows += [
        {"what": "mean gap", "method": name, "of": category, "value": value}
        for (category, name), value in categories.items()  # type: ignore[misc]
    ]
    for one in points:
        for other in points:
            if one != other:
                share = float((points[one] > points[other]).mean())
                rows.append({"what": "share won", "method": one, "of": other, "value": share})
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method: averages with intervals, and wins against full fine-tuning."""
    points, shown = _points(table), looks(table["method"])
    averages = {what: _averages(table, what) for what in ("points", "rank", "gap")}
    gaps, rows = _pivot(table, "gap"), []
    for name in map(str, gaps):
        full = name == REFERENCE
        won = int((points[name] > points[REFERENCE]).sum())
        level = int((points[name] == points[REFERENCE]).sum())
        share = table.loc[table["method"] == name, "trainable_share"].median()
        rows.append(
            {
                "method": shown[name].label,
                "average": averages["points"][name].text(),
                "average rank": averages["rank"][name].text(2),
                "gap to full": "" if full else averages["gap"][name].text(sign="+"),
                "gap, tasks alike": "" if full else f"{gaps[name].mean():+.1f}",
                "above / level / below": ""
                if full
                else f"{won} / {level} / {len(points) - won - level}",
                "trained (%)": f"{100 * share:.3g}",
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Gaps by task and ranks; below, gaps by category and the shares of tasks won."""
    best = curves[curves["what"] == "mean rank"].sort_values("value", kind="stable")
    order = [str(name) for name in best["method"]]
    labels = _labels(order)
    figure = Figure(figsize=(PAGE_WIDTH, 4.9), layout="constrained")
    axes = figure.subplots(2, 2, width_ratios=[1.45, 1.0])
    _draw_gaps(axes[0, 0], table, _means(curves, "mean gap"), order)
    _draw_ranks(axes[0, 1], _means(curves, "mean rank"), order)
    _draw_categories(axes[1, 0], table, curves, order)
    _draw_wins(axes[1, 1], curves, order)
    for index, ax in enumerate(axes.flat):
        ax.set_yticks(range(len(order)), labels)
        ax.set_ylim(len(order) - 0.5, -0.5)
        ax.tick_params(axis="y", length=0)
        ax.set_title(f"({'abcd'[index]}) {ax.get_title(loc='left')}", loc="left")
    return figure


def caption(table: pd.DataFrame) -> str:
    """What came out, and how it was measured; every number from the table."""
    first, shown = table.iloc[0], looks(table["method"])
    tasks, corpora = table["task"].nunique(), table["corpus"].nunique()
    gaps = _averages(table, "gap")
    deltas = sorted((name for name in gaps if name != REFERENCE), key=lambda n: -gaps[n].value)
    best, points = deltas[0], _points(table)
    found = f"{gaps[best].text(sign='+')} points from full fine-tuning"
    if len(deltas) > 1:
        ahead = _clusters(table).of_means(points[deltas[:2]], lambda m: m[:, 0] - m[:, 1])
        found += f" and {ahead.text(sign='+')} from the next, {shown[deltas[1]].label}"
    told = [f"{shown[name].label} {gaps[name].text(sign='+')}" for name in deltas]
    sentences = [
        f"Over {tasks} tasks of {corpora} corpora {shown[best].label} is the delta with the best "
        f"mean, {found}.",
        f"{TITLE}: {len(shown)} methods on {tasks} tasks of {corpora} corpora and "
        f"{table['category'].nunique()} categories ({first['model']}, {first['steps']} updates of "
        f"{first['batch_size']} rows of at most {_range(table['max_length'])} tokens, one seed, "
        f"up to {table['num_evaluated'].max()} test rows), each method at the rate that validation "
        "rows of up to two tasks of the category chose. Means are over corpora, of each the mean "
        "over its tasks. Points: 100 × accuracy, or 100 × Pearson "
        "correlation for regressions. Intervals (95 %) draw whole corpora, since tasks of one "
        "corpus are not independent. (a) Points above or below full fine-tuning: a dot is a task, "
        "the box the middle half of the tasks, the diamond the mean over corpora. (b) Mean rank "
        "among the methods, 1 being the best, over corpora. (c) Mean gap over the tasks of a "
        "category; in the row of full fine-tuning, its mean points. (d) Share of tasks, in per "
        "cent, on which the method of the row is ahead of that of the column.",
        f"Mean gap to full fine-tuning ({_averages(table, 'points')[REFERENCE].text()} points): "
        f"{joined(told)}.",
    ]
    level = [float((points[a] == points[b]).mean()) for a, b in combinations(points, 2)]
    learnt = joined([f"{value:.1f} ({kind})" for kind, value in _learnt(table).items()])
    sentences.append(
        f"Two methods are level on {100 * min(level):.0f} to {100 * max(level):.0f} % of the tasks "
        f"(mean {100 * float(np.mean(level)):.0f} %). Full fine-tuning is above a constant answer "
        f"by {learnt} points."
    )
    untold = int((~table["told"]).sum())
    if untold:
        sentences.append(
            f"{untold} of {len(table)} runs diverged or give no correlation, and have the points "
            "of a constant answer."
        )
    return " ".join(sentences)


def _learnt(table: pd.DataFrame) -> dict[str, float]:
    """By category, the mean points of full fine-tuning above those of a constant answer."""
    full = table[table["method"] == REFERENCE]
    above = (full["points"] - full["constant"]).groupby(full["category"], sort=False).mean()
    return {str(kind): float(value) for kind, value in above.sort_values(ascending=False).items()}


def _range(numbers: pd.Series) -> str:
    low, high = numbers.min(), numbers.max()
    return str(low) if low == high else f"{low} (pairs: {high})"


def agreement(table: pd.DataFrame) -> list[Agreement]:
    """The published order and differences beside ours."""
    points, clusters, shown = _points(table), _clusters(table), looks(table["method"])
    found = [
        same_order(row, order, points, clusters, names=[shown[m].label for m in order])
        for row, order in (
            ("performance, T5 on over 100 tasks", PUBLISHED_ORDER),
            ("performance, RoBERTa on GLUE", tuple(PUBLISHED_AVERAGES)),
        )
    ]
    theirs = PUBLISHED_PROMPT["pair"] - PUBLISHED_PROMPT["sentiment"]
    text = "prompt tuning is further behind the adapter on pairs than on sentiment"
    found.append(same_side("performance, RoBERTa on GLUE", text, theirs, _between_kinds(table)))
    return found


def _between_kinds(table: pd.DataFrame) -> Estimate:
    """How much further prompt tuning is behind the adapter on pairs than on sentiment.

    Of the corpora that have tasks of both kinds, each with the same weight; NaN without one.
    """
    points, tasks = _points(table), table.drop_duplicates("task").set_index("task")
    frame = tasks[["corpus", "category"]].assign(less=points["prompt"] - points["houlsby"])
    means = frame.groupby(["corpus", "category"])["less"].mean().unstack("category")
    means = means.reindex(columns=list(PUBLISHED_PROMPT)).dropna()
    if means.empty:
        return Estimate(float("nan"))
    difference = (means["pair"] - means["sentiment"]).to_frame()
    return Clusters([str(corpus) for corpus in means.index]).of_means(difference)


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """By task, in the order of the study, then by method."""
    places = {name: place for place, name in enumerate(questions())}
    order = {name: place for place, name in enumerate(looks(frame["method"]))}
    return frame.sort_values(
        ["task", "method"],
        key=lambda column: column.map(places if column.name == "task" else order),
    ).reset_index(drop=True)


def _pivot(table: pd.DataFrame, what: str) -> pd.DataFrame:
    """A row a task, a column a method, both in the order of the table."""
    wide = table.pivot(index="task", columns="method", values=what)
    return wide.loc[list(dict.fromkeys(table["task"])), list(dict.fromkeys(table["method"]))]


def _points(table: pd.DataFrame) -> pd.DataFrame:
    return _pivot(table, "points")


def _clusters(table: pd.DataFrame) -> Clusters:
    """The corpora of the tasks, in the order of `_pivot`."""
    return Clusters(table.drop_duplicates("task")["corpus"].tolist(), alike=True)


def _averages(table: pd.DataFrame, what: str) -> dict[str, Estimate]:
    """The mean over tasks by method."""
    wide, clusters = _pivot(table, what), _clusters(table)
    means = clusters.means(wide)
    return {str(name): clusters.estimate(means[:, i]) for i, name in enumerate(wide)}


def _means(curves: pd.DataFrame, what: str) -> pd.DataFrame:
    return curves[(curves["what"] == what) & (curves["of"] == "all")].set_index("method")


def _labels(order: Sequence[str]) -> list[str]:
    shown = looks(order)
    return [shown[name].label for name in order]


def _whiskers(ax: Axes, means: pd.DataFrame, order: Sequence[str]) -> None:
    """A diamond at each mean, with its interval."""
    for place, name in enumerate(order):
        if name not in means.index:
            continue
        value, low, high = (float(means[end][name]) for end in ("value", "low", "high"))
        ax.plot([low, high], [place, place], color=INK, linewidth=1.3, zorder=4)
        ax.plot(
            value, place, "D", color=INK, markersize=4.5, markeredgecolor="white",
            markeredgewidth=0.6, zorder=5,
        )  # fmt: skip


def _draw_gaps(ax: Axes, table: pd.DataFrame, means: pd.DataFrame, order: Sequence[str]) -> None:
    ax.axvline(0, color=INK, linewidth=0.8, zorder=1)
    for place, name in enumerate(order):
        if name == REFERENCE:
            continue
        gaps = np.sort(table.loc[table["method"] == name, "gap"].to_numpy(float))
        low, high = np.quantile(gaps, [0.25, 0.75])
        box = Rectangle((low, place - 0.36), high - low, 0.72, facecolor=BOX, linewidth=0, zorder=1)
        ax.add_patch(box)
        heights = place + 0.6 * ((np.arange(len(gaps)) * 0.618034) % 1.0 - 0.5)
        ax.scatter(gaps, heights, s=4, color=DOT, alpha=0.75, linewidths=0, zorder=2)
    _whiskers(ax, means.drop(REFERENCE), order)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("points above full fine-tuning")
    ax.set_title("gap to full fine-tuning, by task")


def _draw_ranks(ax: Axes, means: pd.DataFrame, order: Sequence[str]) -> None:
    _whiskers(ax, means, order)
    ax.set_xlim(0.8, len(order) + 0.2)
    ax.set_xticks(range(1, len(order) + 1))
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("mean rank (1: best)")
    ax.set_title("rank")


def _draw_categories(
    ax: Axes, table: pd.DataFrame, curves: pd.DataFrame, order: Sequence[str]
) -> None:
    counts = table.drop_duplicates("task")["category"].value_counts(sort=True)
    names = [str(name) for name in counts.index]
    cells = curves[curves["what"] == "mean gap"].pivot(index="method", columns="of", values="value")
    values = cells.loc[list(order), names].to_numpy(float)
    levels = table[table["method"] == REFERENCE].groupby("category")["points"].mean()
    texts = [[f"{value:+.1f}" for value in row] for row in values]
    texts[order.index(REFERENCE)] = [f"{levels[name]:.0f}" for name in names]
    _cells(ax, np.clip(-values, 0.0, None), texts)
    ax.set_xticks(
        range(len(names)),
        [f"{name.replace(' ', chr(10))}\n({counts[name]})" for name in names],
        fontsize=6,
    )
    ax.set_title("mean gap by category (tasks)")


def _draw_wins(ax: Axes, curves: pd.DataFrame, order: Sequence[str]) -> None:
    shares = curves[curves["what"] == "share won"].pivot(
        index="method", columns="of", values="value"
    )
    values = 100 * shares.loc[list(order), list(order)].to_numpy(float)
    texts = [["" if np.isnan(v) else f"{v:.0f}" for v in row] for row in values]
    _cells(ax, np.nan_to_num(values), texts)
    turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(order)), _labels(order), fontsize=6, **turned)
    ax.set_title("tasks won (%)")


def _cells(ax: Axes, shades: np.ndarray, texts: Sequence[Sequence[str]]) -> None:
    """A table whose cells are the darker the larger the number."""
    top = float(shades.max()) or 1.0
    ax.imshow(shades, cmap="Greys", vmin=0.0, vmax=1.35 * top, aspect="auto")
    for (row, column), shade in np.ndenumerate(shades):
        words, color = str(texts[row][column]), "white" if shade > 0.85 * top else "black"
        ax.text(column, row, words, ha="center", va="center", fontsize=6, color=color)
    ax.tick_params(axis="x", length=0)
    ax.grid(False)
