"""How many random directions of parameter space suffice: accuracy against d, and d90.

θ = θ₀ + P z with z ∈ R^d, started from the pre-trained model and from random weights.
`paper_figures.intrinsic` has the two rules that give d90.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.records import Record
from paper_figures.base import COLUMN_WIDTH, PAGE_WIDTH, check_replicates, groups
from paper_figures.intrinsic import KEYS, SHARE, targets
from paper_figures.marks import letter, method, number, percent, spread
from theory.errors import InputError

TITLE = "Accuracy of random-subspace tuning against its dimension d"
STUDY = "subspace"

START = {True: "pre-trained", False: "random init"}
COLORS = {True: "#0072B2", False: "#D55E00"}
MARKERS = {True: "o", False: "^"}
FULL: dict[str, Any] = {"linewidth": 1.0}
TARGET: dict[str, Any] = {"linewidth": 0.9, "linestyle": "--"}
MAJORITY: dict[str, Any] = {"color": "#555555", "linewidth": 0.8, "linestyle": ":"}
CROSSING: dict[str, Any] = {"linestyle": "", "marker": "D", "markerfacecolor": "white"}


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run; full fine-tuning has the number of its parameters as dimension."""
    rows = []
    for record in records:
        config, name = record.config, method(record.config["deltas"])
        if name not in ("subspace", "full"):
            raise InputError(f"subspace draws subspace and full runs; run {record.id} is {name}")
        dimensions = [d["dimension"] for d in config["deltas"] if d["name"] == "subspace"]
        rows.append(
            {
                "model": str(config["model"]),
                "task": str(config["task"]),
                "pretrained": bool(config["pretrained"]),
                "method": name,
                "dimension": dimensions[0] if dimensions else record.result["num_trainable"],
                "seed": config["seed"],
                "learning_rate": config["learning_rate"],
                "accuracy": number(record.result["accuracy"]),
                "majority_share": number(record.result.get("majority_share")),
                "num_trainable": record.result["num_trainable"],
                "status": record.status,
                "run": record.id,
            }
        )
    labels = [tuple(row[key] for key in (*KEYS, "method", "dimension")) for row in rows]
    check_replicates(records, labels)
    frame = pd.DataFrame(rows).sort_values(
        [*KEYS, "method", "dimension", "seed"],
        ascending=[True, True, False, False, True, True],
    )
    return frame.reset_index(drop=True)


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """Mean and standard deviation over seeds at each dimension."""
    grouped = table(records).groupby([*KEYS, "method", "dimension"], sort=False)["accuracy"]
    return grouped.agg(accuracy="mean", deviation="std", seeds="count").reset_index()


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy at each dimension, then d90 by each rule."""
    rows = []
    keys = [*KEYS, "method", "dimension"]
    for (model, task, pretrained, name, dimension), runs in groups(table, keys):
        accuracy = 100 * runs["accuracy"]
        rows.append(
            {
                "model": model,
                "task": task,
                "start": START[pretrained],
                "d": f"{dimension:,}" + (" (full)" if name == "full" else ""),
                "accuracy (%)": spread(accuracy.mean(), accuracy.std()),
                "seeds": str(len(runs)),
            }
        )
    for target in targets(table):
        rows.append(
            {
                "model": target.model,
                "task": target.task,
                "start": START[target.pretrained],
                "d": f"d90 {target.rule}: {target.reading}",
                "accuracy (%)": f"≥ {100 * target.accuracy:.1f}",
                "seeds": "",
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """One panel per model and task."""
    panels = list(groups(table, ["model", "task"]))
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    width = COLUMN_WIDTH if columns == 1 else PAGE_WIDTH
    figure = Figure(figsize=(width, 2.75 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, ((model, task), runs) in zip(axes.flat, panels, strict=False):
        lines = curves[(curves["model"] == model) & (curves["task"] == task)]
        _draw_panel(ax, runs, lines)
        ax.set_title(f"{task}, {model}")
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    if len(panels) > 1:
        letter(axes.flat[: len(panels)])
    figure.legend(handles=_key(), loc="outside upper center", ncols=3 * columns)
    return figure


def caption(table: pd.DataFrame) -> str:
    """The rules, and d90 by each."""
    seeds = table[table["method"] == "subspace"]["seed"].nunique()
    sentences = [
        f"{TITLE}: θ = θ₀ + P z, z ∈ R^d (seeds: {seeds}; dots are seeds, lines their mean). "
        "Horizontal lines: full fine-tuning (solid) and 90 % of it (dashed). d90 is interpolated "
        "in log d on the mean; brackets give its range over seeds. Absolute rule: 90 % of full "
        "fine-tuning of the pre-trained model; baseline rule: 90 % of each model's own."
    ]
    for target in targets(table):
        sentences.append(
            f"{target.task}, {START[target.pretrained]}, {target.rule} rule "
            f"(≥ {100 * target.accuracy:.1f} %): d90 {target.reading}."
        )
    for (_, task, _), runs in groups(table, KEYS):
        below = runs[
            (runs["method"] == "full") & (SHARE * runs["accuracy"] <= runs["majority_share"])
        ]
        if len(below):
            start = START[bool(runs["pretrained"].iloc[0])]
            sentences.append(
                f"On {task}, {start}, 90 % of full fine-tuning is no more than the majority class, "
                "so its own d90 says nothing."
            )
    return " ".join(sentences)


def _draw_panel(ax: Axes, runs: pd.DataFrame, lines: pd.DataFrame) -> None:
    for pretrained in (True, False):
        color, marker = COLORS[pretrained], MARKERS[pretrained]
        dots = runs[(runs["pretrained"] == pretrained) & (runs["method"] == "subspace")]
        line = lines[(lines["pretrained"] == pretrained) & (lines["method"] == "subspace")]
        ax.scatter(dots["dimension"], dots["accuracy"], s=8, color=color, alpha=0.45, linewidths=0)
        ax.plot(
            line["dimension"].to_numpy(float),
            line["accuracy"].to_numpy(float),
            color=color,
            marker=marker,
            markersize=2.8,
        )
        full = runs[(runs["pretrained"] == pretrained) & (runs["method"] == "full")]["accuracy"]
        if len(full):
            ax.axhline(full.mean(), color=color, **FULL)
            ax.axhline(SHARE * full.mean(), color=color, **TARGET)
    majority = runs["majority_share"].dropna()
    chance = majority.iloc[0] if len(majority) else 0.0
    for target in targets(runs):
        # A target that guessing meets says nothing.
        if target.dimension is not None and target.accuracy > chance:
            edge = COLORS[target.pretrained]
            ax.plot(target.dimension, target.accuracy, markeredgecolor=edge, zorder=5, **CROSSING)
    if len(majority):
        ax.axhline(chance, **MAJORITY)
    ax.set_xscale("log")
    ax.set_xlabel("subspace dimension $d$")
    ax.set_ylabel("test accuracy (%)")
    percent(ax.yaxis)


def _key() -> list[Line2D]:
    """Legend entries: colour is the start, line style the level."""
    starts = [
        Line2D([], [], color=COLORS[p], marker=MARKERS[p], markersize=2.8, label=START[p])
        for p in (True, False)
    ]
    return [
        *starts,
        Line2D([], [], color="#333333", label="full fine-tuning", **FULL),
        Line2D([], [], color="#333333", label="90 % of it", **TARGET),
        Line2D([], [], label="majority class", **MAJORITY),
        Line2D([], [], markeredgecolor="#333333", label="d90", **CROSSING),
    ]
