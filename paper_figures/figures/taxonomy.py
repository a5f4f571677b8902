"""Delta methods at a glance: category, site, control law, parameters and accuracy.

One row a method, in the order of the taxonomy. Accuracy is that of test rows; the learning rate was
chosen on validation rows, by `deltacontrol.experiments.studies.learning_rates.grid`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, groups
from deltacontrol.paper_figures.marks import joined, method, number, percent, seed_dot, spread
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
LINE = 54  # characters of a law on a line
MAJORITY: dict[str, Any] = {"color": "#555555", "linestyle": "--", "linewidth": 0.8}
GREEK = {
    "alpha": "α",
    "delta": "δ",
    "lambda": "λ",
    "mu": "μ",
    "phi": "φ",
    "sum": "Σ",
    "theta": "θ",
}
_NAMED = re.compile(rf"(?<![A-Za-z])({'|'.join(GREEK)})(?![A-Za-z])")
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
    tasks = sorted(table["task"].unique())
    firsts = table.groupby("method", sort=False).first()
    firsts["written"] = [_wrapped(law) for law in firsts["law"]]
    heads, firsts["height"], length = _heights(firsts)
    figure = Figure(figsize=(PAGE_WIDTH, 0.115 * length + 1.05), layout="constrained")
    widths = [4.0, 0.85, *([0.9] * len(tasks))]
    words, sizes, *accuracies = figure.subplots(1, len(widths), sharey=True, width_ratios=widths)
    words.set_ylim(-0.8, length - 0.2)
    _write(words, firsts, heads)
    for name, row in firsts.iterrows():
        sizes.scatter(row["num_trainable"], row["height"], color=_color(firsts, name), s=14)
    sizes.set_xscale("log")
    sizes.xaxis.set_major_locator(LogLocator(numticks=6))
    sizes.xaxis.set_minor_locator(NullLocator())
    sizes.set_xlabel("parameters\n(no head)")
    sizes.set_title("size")
    for ax, task in zip(accuracies, tasks, strict=True):
        _draw_accuracy(ax, table[table["task"] == task], firsts)
        ax.set_title(task)
        ax.set_xlabel("test accuracy\n(%)")
    for ax in (sizes, *accuracies):
        ax.tick_params(axis="y", left=False, labelleft=False)
        ax.grid(axis="y", visible=False)
        for height in heads.values():
            ax.axhline(height + 0.75, color="#999999", linewidth=0.6)
    mean = Line2D([], [], color="#333333", marker="|", linestyle="", markersize=8, mew=1.4)
    mean.set_label("mean over seeds")
    majority = Line2D([], [], label="majority class", **MAJORITY)
    figure.legend(handles=[seed_dot(), mean, majority], loc="outside lower right", ncols=3)
    return figure


def caption(table: pd.DataFrame) -> str:
    """The best methods, how the numbers came about, and the best method of each category."""
    seeds = table.groupby(KEYS)["seed"].nunique().max()
    bests, tops = [], []
    for task in sorted(table["task"].unique()):
        runs = table[table["task"] == task]
        means = 100 * runs.groupby("method")["accuracy"].mean().dropna()
        if means.empty:
            continue
        best = str(means.idxmax())
        count = runs.loc[runs["method"] == best, "num_trainable"].iloc[0]
        bests.append(f"on {task} {best} ({means[best]:.1f} %, {count:,} parameters)")
        of = table.drop_duplicates("method").set_index("method")["category"]
        inside = [means[[n for n in means.index if of[n] == c]] for c in CATEGORIES]
        named = [f"{found.idxmax()} ({found.max():.1f} %)" for found in inside if len(found)]
        tops.append(f"Best of each category on {task}: {joined(named)}.")
    sentences = []
    if bests:
        sentences.append(
            f"Of {table['method'].nunique()} methods at their chosen rates the most accurate is "
            f"{joined(bests)}."
        )
    sentences.append(
        f"{TITLE}: {joined(sorted(table['model'].unique()))}, "
        f"{joined(sorted(map(str, table['steps'].unique())))} steps, {seeds} seeds. Parameters "
        "without the head's, which every method trains. Each method at the rate that validation "
        "rows chose."
    )
    sentences += tops
    diverged = int((table["status"] == "diverged").sum())
    if diverged:
        sentences.append(f"{diverged} of {len(table)} runs diverged.")
    return " ".join(sentences)


def _wrapped(law: str) -> str:
    """A law with Greek letters, whole, on as many lines as it needs."""
    greek = _NAMED.sub(lambda found: GREEK[found[0]], law)
    return "\n".join(textwrap.wrap(greek, LINE, break_long_words=False))


def _heights(firsts: pd.DataFrame) -> tuple[dict[str, float], list[float], float]:
    """Heights of categories and of methods, in lines from below, and the number of lines."""
    heads: dict[str, float] = {}
    rows: list[float] = []
    used = 0.0
    for category, written in zip(firsts["category"], firsts["written"], strict=True):
        if category not in heads:
            heads[category] = used + 0.75
            used += 1.75
        lines = 0.45 + str(written).count("\n") + 1
        rows.append(used + lines / 2 - 0.2)
        used += lines
    return {c: used - h for c, h in heads.items()}, [used - h for h in rows], used


def _color(firsts: pd.DataFrame, name: Any) -> str:
    return CATEGORIES.get(str(firsts.loc[name, "category"]), "#555555")


def _write(ax: Axes, firsts: pd.DataFrame, heads: Mapping[str, float]) -> None:
    ax.set_xlim(0, 1)
    ax.axis("off")
    for category, y in heads.items():
        color = CATEGORIES.get(category, "#555555")
        ax.text(0.0, y, category, fontsize=7.5, color=color, va="center", weight="bold")
        ax.plot([0, 1], [y + 0.75] * 2, color="#999999", linewidth=0.6)
    for name, row in firsts.iterrows():
        ax.text(0.0, row["height"], str(name), fontsize=6, color=_color(firsts, name), va="center")
        ax.text(0.225, row["height"], row["site"], fontsize=6, va="center")
        ax.text(0.445, row["height"], row["written"], fontsize=6, va="center", linespacing=1.05)
    top = ax.get_ylim()[1] + 0.35
    for x, head in ((0.0, "method"), (0.225, "site"), (0.445, "control law")):
        ax.text(x, top, head, fontsize=7, va="bottom", style="italic")


def _draw_accuracy(ax: Axes, runs: pd.DataFrame, firsts: pd.DataFrame) -> None:
    for name, row in firsts.iterrows():
        accuracy = runs.loc[runs["method"] == name, "accuracy"].dropna()
        y, color = row["height"], _color(firsts, name)
        if len(accuracy) > 1:
            ax.plot([accuracy.mean()], [y], marker="|", color=color, markersize=8, mew=1.4)
        ax.scatter(accuracy, np.full(len(accuracy), y), color=color, s=7, linewidths=0, zorder=3)
    majority = runs["majority_share"].dropna()
    if len(majority):
        ax.axvline(majority.iloc[0], zorder=0, **MAJORITY)
    percent(ax.xaxis, nbins=4)
