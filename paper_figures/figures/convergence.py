"""How many updates, and how many seconds, each method needs to be nearly done.

`deltacontrol.paper_figures.progress.nearly_done` says when a training is. Times are averaged as
logarithms over tasks, each of a corpus of its own. A training that learns nothing, or diverges, is
never nearly done; it counts with all of its steps in averages, which are too small then, and not at
all where methods are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.agreement import Agreement, same_order, same_size
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates
from deltacontrol.paper_figures.clusters import Clusters, Estimate
from deltacontrol.paper_figures.marks import (
    by_method,
    counted,
    letter,
    looks,
    method,
    number,
    sentence,
)
from deltacontrol.paper_figures.progress import (
    SHARE,
    least_way,
    looks_of,
    nearly_done,
    smoothed,
)

TITLE = "Updates and seconds until nearly done"
STUDY = "convergence"

# Ding et al., Nature Machine Intelligence 5, 2023, section "Convergence": T5-base.
PUBLISHED_ORDER = (("full", "houlsby", "prefix"), ("full", "lora", "prefix"))
ALIKE, FACTOR = ("houlsby", "lora"), 1.5  # their times differ by less than the factor
ROW = "convergence, tasks that these learn"
INK = "#222222"


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run: its last accuracy, and when it is nearly done."""
    labels = [(str(r.config["task"]), method(r.config["deltas"])) for r in records]
    check_replicates(records, labels)
    rows = []
    for record, (task, name) in zip(records, labels, strict=True):
        seen, config = looks_of(record), record.config
        majority = number(record.result["majority_share"])
        last = float(smoothed(seen["accuracy"])[-1]) if len(seen) > 1 else majority
        least = least_way(majority, config["eval_limit"])
        learnt = last - majority >= least
        learnt &= record.status != "diverged"
        steps = nearly_done(
            seen["step"], seen["accuracy"], majority,
            rows=config["eval_limit"], last=config["steps"],
        )  # fmt: skip
        rows.append(
            {
                "task": task,
                "method": name,
                "seed": record.config["seed"],
                "majority": majority,
                "last": last,
                "learnt": learnt,
                "rises": learnt and _rise(seen["accuracy"]) > least,
                "steps_95": steps if learnt else float(config["steps"]),
                "seconds_95": (steps if learnt else config["steps"])
                * number(record.result["seconds_per_step"]),
                "learning_rate": record.config["learning_rate"],
                "model": record.config["model"],
                "steps": record.config["steps"],
                "eval_every": record.config["eval_every"],
                "batch_size": record.config["batch_size"],
                "status": record.status,
                "run": record.id,
            }
        )
    return by_method(pd.DataFrame(rows), ["task", "method", "seed"])


def _rise(accuracy: pd.Series) -> float:
    """The mean of the last quarter of the looks less that of the quarter before."""
    quarter = max(1, len(accuracy) // 4)
    return float(accuracy.iloc[-quarter:].mean() - accuracy.iloc[-2 * quarter : -quarter].mean())


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """The share of the way by method and step, of trainings that learn: median over tasks.

    A mean would be led by tasks whose whole way is short: there an early look below the majority is
    many times the way below it.
    """
    runs = []
    for record in records:
        seen, majority = looks_of(record), number(record.result["majority_share"])
        if len(seen) < 2:
            continue
        accuracy = smoothed(seen["accuracy"])
        way = float(accuracy[-1]) - majority
        if way >= least_way(majority, record.config["eval_limit"]):
            name = method(record.config["deltas"])
            part = {"task": record.config["task"], "method": name, "step": seen["step"]}
            runs.append(pd.DataFrame({**part, "share": (accuracy - majority) / way}))
    if not runs:
        return pd.DataFrame(columns=["method", "step", "share"])
    of_task = pd.concat(runs).groupby(["method", "task", "step"])["share"].mean()
    return by_method(of_task.groupby(["method", "step"]).median().reset_index(), ["method", "step"])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method: geometric means over tasks."""
    shown, rows = looks(table["method"]), []
    steps, seconds = (_averages(table, what) for what in ("steps_95", "seconds_95"))
    for name, look in shown.items():
        runs = table[table["method"] == name]
        rows.append(
            {
                "method": look.label,
                "steps to 95 %": steps[name].text(0),
                "seconds to 95 %": seconds[name].text(2),
                "last accuracy (%)": f"{100 * runs['last'].mean():.1f}",
                "runs": str(len(runs)),
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """The way by step; steps and seconds until nearly done."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.6), layout="constrained")
    way, steps, seconds = figure.subplots(1, 3, width_ratios=[1.15, 1.0, 0.85])
    for name, look in looks(table["method"]).items():
        line = curves[curves["method"] == name]
        way.plot(line["step"], line["share"], color=look.color, marker=look.marker, markersize=3,
                 markevery=3)  # fmt: skip
    way.axhline(SHARE, color=INK, linestyle="--", linewidth=0.8)
    way.set(xlabel="step", ylabel="share of the way", title="validation accuracy")
    if len(curves):
        way.set_ylim(min(-0.05, float(curves["share"].min()) - 0.03), 1.12)
    _draw_times(steps, table, "steps_95", "steps to 95 %")
    _draw_times(seconds, table, "seconds_95", "seconds to 95 %")
    seconds.set_yticklabels([])
    letter((way, steps, seconds))
    return figure


def caption(table: pd.DataFrame) -> str:
    """Which method is nearly done first, and how it was measured."""
    steps, shown, first = _averages(table, "steps_95"), looks(table["method"]), table.iloc[0]
    order = sorted(steps, key=lambda name: steps[name].value)
    nothing, rising = int((~table["learnt"]).sum()), int(table["rises"].sum())
    return (
        f"{sentence(shown[order[0]].label)} is nearly done first, after "
        f"{steps[order[0]].text(0)} updates, and {shown[order[-1]].label} last, after "
        f"{steps[order[-1]].text(0)}, {_ratio(table, order[-1], order[0]).text(1)} times as many. "
        f"{TITLE}: {first['model']}, {first['steps']} updates of "
        f"{first['batch_size']} rows at a constant rate, a look at validation rows every "
        f"{first['eval_every']} updates, {counted(table['task'].nunique(), 'task')} of "
        "as many corpora. The way of a training is from the accuracy of the majority class to that "
        "of its end (running means of three looks), and it is nearly done where "
        f"{100 * SHARE:g} % of it are behind it. (a) Median share of the way over tasks, "
        "in the colours and marks of (b). (b, c) Steps and seconds until then: a dot is a task, "
        "the large mark the geometric mean with its 95 % interval, drawn from tasks. Seconds are "
        "of this machine, without the looks."
        + (
            f" {nothing} of {len(table)} trainings learn nothing that so few rows tell: they count "
            "with all of their steps, and are not in (a)."
            if nothing
            else ""
        )
        + (f" {rising} still rise in the last quarter." if rising else "")
    )


def agreement(table: pd.DataFrame) -> list[Agreement]:
    """The published order of convergence beside ours, on tasks that all of its methods learn."""
    shown, found = looks(table["method"]), []
    for order in PUBLISHED_ORDER:
        speeds, clusters = _speeds(table, order)
        names = [shown[name].label for name in order]
        if clusters is None:
            found.append(Agreement(ROW, " > ".join(names), "τ 1", "no such task", None))
            continue
        row = f"{ROW} ({len(speeds)})"
        found.append(same_order(row, order, speeds, clusters, names=names))
    one, other = ALIKE
    speeds, clusters = _speeds(table, ALIKE)
    ratio = Estimate(np.nan)
    if clusters is not None:
        ratio = clusters.of_means(
            speeds[[other, one]], lambda means: (means[:, 0] - means[:, 1]) / np.log(FACTOR)
        )
    row = f"{ROW} ({len(speeds)})"
    text = f"{shown[one].label} and {shown[other].label} converge alike (log of the ratio of steps"
    text += f" in units of log {FACTOR:g})"
    found.append(same_size(row, text, 0.0, ratio, 1.0, digits=2))
    return found


def _speeds(table: pd.DataFrame, methods: Sequence[str]) -> tuple[pd.DataFrame, Clusters | None]:
    """Minus the log of the steps, on tasks that all of the methods learn with every seed."""
    own = table[table["method"].isin(list(methods))]
    learnt = own.groupby("task")["learnt"].all()
    kept = own[own["task"].map(learnt)]
    if kept.empty:
        return kept, None
    speeds = -_logs(kept, "steps_95")
    return speeds, Clusters([str(task) for task in speeds.index])


def _logs(table: pd.DataFrame, what: str) -> pd.DataFrame:
    """The mean log over seeds: a row a task, a column a method."""
    logs = table[what].map(math.log).groupby([table["task"], table["method"]]).mean()
    wide = logs.unstack("method")
    return wide[list(looks(table["method"]))]


def _averages(table: pd.DataFrame, what: str) -> dict[str, Estimate]:
    """The geometric mean over tasks by method."""
    wide = _logs(table, what)
    clusters = Clusters([str(task) for task in wide.index])
    means = clusters.means(wide)
    return {str(name): _exp(clusters.estimate(means[:, i])) for i, name in enumerate(wide)}


def _ratio(table: pd.DataFrame, one: str, other: str) -> Estimate:
    """Steps of one method over those of another, paired by tasks."""
    wide = _logs(table, "steps_95")[[one, other]]
    clusters = Clusters([str(task) for task in wide.index])
    return _exp(clusters.of_means(wide, lambda means: means[:, 0] - means[:, 1]))


def _exp(found: Estimate) -> Estimate:
    return Estimate(*(float(np.exp(x)) for x in (found.value, found.low, found.high)))


def _draw_times(ax: Axes, table: pd.DataFrame, what: str, label: str) -> None:
    shown, means = looks(table["method"]), _averages(table, what)
    wide = _logs(table, what).map(math.exp)
    for place, name in enumerate(wide):
        color, found = shown[str(name)].color, means[str(name)]
        ax.scatter(wide[name], np.full(len(wide), place + 0.27), s=7, color=color, linewidths=0)
        ax.plot([found.low, found.high], [place] * 2, color=INK, marker="|", markersize=4)
        mark = shown[str(name)].marker
        ax.plot([found.value], [place], mark, color=color, markersize=5, zorder=4)
    ax.set_xscale("log")
    ticks = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 3, 5)]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_yticks(range(wide.shape[1]), [shown[str(name)].label for name in wide])
    for tick, name in zip(ax.get_yticklabels(), wide, strict=True):
        tick.set_color(shown[str(name)].color)
    ax.set_ylim(wide.shape[1] - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(label)
    ax.set_title(label.partition(" ")[0])
