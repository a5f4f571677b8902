"""Delta methods at a glance: category, site, control law, parameters and accuracy.

One row a method, in the order of the taxonomy. Accuracy is that of test rows; the learning rate was
chosen on validation rows, by `deltacontrol.experiments.studies.learning_rates.grid`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, groups
from deltacontrol.paper_figures.marks import joined, method, number, percent, spread
from deltacontrol.paper_figures.methods import declared
from deltacontrol.theory.errors import InputError

TITLE = "Delta methods at a glance"
STUDY = "taxonomy"

KEYS = ["model", "task", "method"]
# Category: its order, its colour.
CATEGORIES = {
    "addition": "#0072B2",
    "specification": "#D55E00",
    "reparametrisation": "#009E73",
    "combined": "#CC79A7",
}
SHORT = {
    "attention.query": "q",
    "attention.key": "k",
    "attention.value": "v",
    "attention.output": "o",
    "mlp.up": "up",
    "mlp.down": "down",
}


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run."""
    known = declared()
    rows = []
    for record in records:
        name = method(record.config["deltas"])
        if name not in known:
            raise InputError(
                f"run {record.id} is of {name!r}, which is no single delta method that is known; "
                "one of your own enters by: deltacontrol --load my_delta.py figures"
            )
        config = next(d for d in record.config["deltas"] if d["name"] == name)
        rows.append(
            {
                "model": record.config["model"],
                "task": record.config["task"],
                "method": name,
                "category": known[name].category,
                "site": place(config, known[name].acts_on),
                "law": known[name].law,
                "learning_rate": record.config["learning_rate"],
                "seed": record.config["seed"],
                "steps": record.config["steps"],
                "num_trainable": record.result["num_trainable"] - record.result["num_head"]
                if name != "head"
                else record.result["num_head"],
                "num_total": record.result["num_total"],
                "accuracy": number(record.result["accuracy"]),
                "majority_share": number(record.result["majority_share"]),
                "seconds_per_step": number(record.result["seconds_per_step"]),
                "peak_memory_bytes": number(record.result["peak_memory_bytes"]),
                "status": record.status,
                "run": record.id,
            }
        )
    order = {category: i for i, category in enumerate(CATEGORIES)}
    return (
        pd.DataFrame(rows)
        .sort_values(
            ["category", "method", "task", "learning_rate", "seed"],
            key=lambda column: column.map(order) if column.name == "category" else column,
        )
        .reset_index(drop=True)
    )


def place(delta: Mapping[str, Any], acts_on: str) -> str:
    """Where a delta of this configuration acts, in a few words."""
    if acts_on and not delta.get("sites"):
        return acts_on
    if delta.get("around"):
        around = delta["around"]
        return str(around) if isinstance(around, str) else ", ".join(around)
    sites = delta.get("sites") or ()
    sites = (sites,) if isinstance(sites, str) else sites
    return ", ".join(SHORT.get(site, site) for site in sites)


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """Training losses of the runs, ten points each."""
    frames = []
    for record in records:
        losses = record.curve()[["step", "loss"]].dropna()
        kept = np.unique(np.linspace(0, len(losses) - 1, 10).round().astype(int))
        frame = losses.iloc[kept].assign(run=record.id)
        frames.append(frame)
    return pd.concat(frames).sort_values(["run", "step"]).reset_index(drop=True)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method: category, site, law, parameters, accuracy by task, costs."""
    rows = []
    for (name,), runs in groups(table, ["method"]):
        first = runs.iloc[0]
        row = {
            "category": first["category"],
            "method": name,
            "site": first["site"],
            "law": first["law"],
            "parameters": f"{first['num_trainable']:,}",
        }
        for task in sorted(table["task"].unique()):
            accuracy = 100 * runs.loc[runs["task"] == task, "accuracy"]
            row[f"{task} (%)"] = spread(accuracy.mean(), accuracy.std())
        row["s/step"] = f"{runs['seconds_per_step'].median():.3g}"
        row["peak memory (MB)"] = f"{runs['peak_memory_bytes'].median() / 1e6:.0f}"
        rows.append(row)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Text columns for method, site and law; dots for parameters and accuracy."""
    del curves
    names = list(dict.fromkeys(table["method"]))
    tasks = sorted(table["task"].unique())
    height = 0.165 * len(names) + 0.7
    figure = Figure(figsize=(PAGE_WIDTH, height), layout="constrained")
    widths = [3.35, 1.0, *([1.0] * len(tasks))]
    words, sizes, *accuracies = figure.subplots(1, len(widths), sharey=True, width_ratios=widths)
    firsts = table.groupby("method", sort=False).first().loc[names]
    heights = np.arange(len(names))[::-1]
    colors = [CATEGORIES[c] for c in firsts["category"]]
    words.set_ylim(-0.7, len(names) - 0.3)
    _write(words, firsts, heights, colors)
    sizes.scatter(firsts["num_trainable"], heights, c=colors, s=14)
    sizes.set_xscale("log")
    sizes.set_xlabel("parameters")
    for ax, task in zip(accuracies, tasks, strict=True):
        _draw_accuracy(ax, table[table["task"] == task], names, heights, colors)
        ax.set_xlabel(f"{task} (%)")
    for ax in (sizes, *accuracies):
        ax.tick_params(axis="y", left=False, labelleft=False)
        for line in _borders(firsts["category"]):
            ax.axhline(line, color="#999999", linewidth=0.6)
    return figure


def caption(table: pd.DataFrame) -> str:
    """How the numbers came about, and the best method of each category."""
    seeds = table.groupby(KEYS)["seed"].nunique().max()
    sentences = [
        f"{TITLE}: {table['method'].nunique()} methods on {joined(sorted(table['model'].unique()))}"
        f", {joined(sorted(map(str, table['steps'].unique())))} steps. Parameters without the "
        f"head's, which every method trains. Test accuracy: a dot is a seed ({seeds}), the bar "
        "their mean; each method at the rate that validation rows chose; dashed: the majority "
        "class."
    ]
    for task in sorted(table["task"].unique()):
        means = 100 * table[table["task"] == task].groupby("method")["accuracy"].mean()
        of = table.drop_duplicates("method").set_index("method")["category"]
        tops = []
        for category in CATEGORIES:
            inside = means[[n for n in means.index if of[n] == category]].dropna()
            if len(inside):
                tops.append(f"{inside.idxmax()} ({inside.max():.1f} %)")
        if tops:
            sentences.append(f"Best of each category on {task}: {joined(tops)}.")
    diverged = int((table["status"] == "diverged").sum())
    if diverged:
        sentences.append(f"{diverged} of {len(table)} runs diverged.")
    return " ".join(sentences)


def _write(ax: Axes, firsts: pd.DataFrame, heights: np.ndarray, colors: list[str]) -> None:
    ax.set_xlim(0, 1)
    ax.axis("off")
    for (name, row), y, color in zip(firsts.iterrows(), heights, colors, strict=True):
        law = row["law"] if len(row["law"]) <= 44 else row["law"][:42] + "…"
        ax.text(0.0, y, str(name), fontsize=6, color=color, va="center", weight="bold")
        ax.text(0.27, y, row["site"], fontsize=5.5, va="center")
        ax.text(0.52, y, law, fontsize=5, va="center", family="monospace")
    for line in _borders(firsts["category"]):
        ax.axhline(line, color="#999999", linewidth=0.6)
    top = len(firsts) - 0.3
    for x, head in ((0.0, "method"), (0.27, "site"), (0.52, "control law")):
        ax.text(x, top, head, fontsize=6, va="bottom", style="italic")


def _borders(categories: pd.Series) -> list[float]:
    """Heights between two categories."""
    values = list(categories)
    count = len(values)
    return [count - 1 - i + 0.5 for i in range(1, count) if values[i] != values[i - 1]]


def _draw_accuracy(
    ax: Axes, runs: pd.DataFrame, names: Sequence[str], heights: np.ndarray, colors: list[str]
) -> None:
    for name, y, color in zip(names, heights, colors, strict=True):
        accuracy = runs.loc[runs["method"] == name, "accuracy"].dropna()
        ax.scatter(accuracy, np.full(len(accuracy), y), color=color, s=8, alpha=0.6, linewidths=0)
        if len(accuracy):
            ax.plot([accuracy.mean()] * 2, [y - 0.35, y + 0.35], color=color, linewidth=1.4)
    majority = runs["majority_share"].dropna()
    if len(majority):
        ax.axvline(majority.iloc[0], color="#555555", linestyle="--", linewidth=0.8)
    percent(ax.xaxis)
