"""How many dimensions a task needs: accuracy over d, and d90 with intervals.

θ = θ₀ + P z with z ∈ R^d. One record is one search
(`deltacontrol.experiments.studies.d90.dimension`): the rate of every d is tuned on validation rows,
and the target is 90 % of full fine-tuning; a random start is held against that of the pre-trained
model. One panel holds the two networks of digits against the published numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, groups
from deltacontrol.paper_figures.marks import (
    end_labels,
    joined,
    letter,
    number,
    percent,
    seed_dot,
    sentence,
    spread,
)
from deltacontrol.theory.errors import InputError

TITLE = "Dimensions that tasks need: random subspaces, pre-trained and from random weights"
STUDY = "d90"

KEYS = ["model", "task", "start", "method", "rule"]
COLORS = {
    "minilm-l3": "#0072B2",
    "minilm-l6": "#D55E00",
    "mpnet-base": "#882255",
    "fc": "#009E73",
    "lenet": "#CC79A7",
}
SPARE = ("#56B4E9", "#E69F00", "#F0E442")
MARKERS = {"said": "o", "did": "s"}
LINES = {"said": "-", "did": "--"}
NAMES = {
    "fc": "fully connected",
    "lenet": "LeNet",
    "minilm-l3": "MiniLM-L3",
    "minilm-l6": "MiniLM-L6",
    "mpnet-base": "MPNet",
}
HOLLOW = ("minilm-l6",)  # models whose markers are white inside: tell them apart without colour
RANDOM: dict[str, Any] = {"marker": "^", "linestyle": ":"}
TARGET: dict[str, Any] = {"linewidth": 0.8, "linestyle": (0, (5, 2))}
CHANCE: dict[str, Any] = {"color": "#555555", "linewidth": 0.8, "linestyle": ":"}
# Li et al., ICLR 2018, table 1 and section 3.1: d_int90 on all of MNIST.
PUBLISHED = {("fc", "0.9"): 750, ("fc", "own"): 525, ("lenet", "0.9"): 290, ("lenet", "own"): 275}
DIGITS = "digits"


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per training that an estimate is from; a baseline's has no dimension."""
    parts = []
    for record in records:
        config, found = record.config, record.result
        if record.kind not in ("dimension", "mnist-dimension") and "dimensions" not in found:
            raise InputError(f"d90 draws searches for a dimension; run {record.id} is none")
        digits = "net" in config
        rows = record.curve()
        rows = rows[rows["used"]].sort_values(["dimension", "seed"], na_position="first")
        searched = sorted(found["dimensions"]) or [float("nan")]
        parts.append(
            pd.DataFrame(
                {
                    "model": config["net"] if digits else config["model"],
                    "task": DIGITS if digits else config["task"],
                    "start": "random" if digits or not config["pretrained"] else "pre-trained",
                    "method": "did" if digits else config["method"],
                    "rule": "own" if config["target"] is None else f"{config['target']:g}",
                    "dimension": rows["dimension"].astype(float),
                    "seed": rows["seed"],
                    "learning_rate": rows["rate"],
                    "accuracy": rows["performance"],
                    "target": found["target"],
                    "chance": found["chance"],
                    "d90": number(found["dimension"]),
                    "low": number(found["low"]),
                    "high": number(found["high"]),
                    "smallest": searched[0],
                    "largest": searched[-1],
                    "verdict": found["verdict"],
                    "reading": found["text"],
                    "confidence": found["confidence"],
                    "search": record.id,
                    "run": rows["run"],
                }
            )
        )
    frame = pd.concat(parts, ignore_index=True)
    if frame.drop_duplicates([*KEYS, "search"]).duplicated(KEYS).any():
        raise InputError("two searches are of the same model, task, start, method and rule")
    order = frame.assign(last=frame["task"] == DIGITS)
    order = order.sort_values(
        ["last", "task", "model", "start", "method", "rule", "dimension", "seed"],
        na_position="first",
    )
    return order.drop(columns="last").reset_index(drop=True)


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """The mean accuracy of every search at its dimensions."""
    frame = table(records)
    frame = frame[frame["dimension"].notna()]
    grouped = frame.groupby([*KEYS, "dimension"], sort=False)["accuracy"]
    return grouped.agg(accuracy="mean", deviation="std", seeds="count").reset_index()


def searches(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The columns that belong to a search, one dictionary each."""
    return [dict(runs.iloc[0]) for _, runs in groups(table, KEYS)]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """d90 of every search, and what it rests on."""
    rows = []
    for _, runs in groups(table, KEYS):
        first = runs.iloc[0]
        baseline = 100 * runs.loc[runs["dimension"].isna(), "accuracy"]
        published = PUBLISHED.get((str(first["model"]), str(first["rule"])))
        rows.append(
            {
                "model": NAMES.get(first["model"], first["model"]),
                "task": first["task"],
                "start": first["start"],
                "method": first["method"].upper(),
                "baseline (%)": spread(baseline.mean(), baseline.std()) if len(baseline) else "–",
                "target (%)": f"{100 * first['target']:.1f}",
                "d90": first["reading"],
                "verdict": first["verdict"],
                "runs": str(int(runs["dimension"].notna().sum())),
                "published": "" if published is None else f"{published:,}",
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """A panel per task, one of the digits, one of all d90."""
    tasks = list(dict.fromkeys(table["task"]))
    rows = -(-(len(tasks) + 1) // 2)
    figure = Figure(figsize=(PAGE_WIDTH, 2.15 * rows + 0.7), layout="constrained")
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    for ax, task in zip(axes, tasks, strict=False):
        runs, lines = table[table["task"] == task], curves[curves["task"] == task]
        _draw_task(ax, runs, lines)
        ax.set_title(task if task != DIGITS else "digits, networks from random weights")
    _draw_dimensions(axes[-1], searches(table))
    for ax in axes[len(tasks) : -1]:
        ax.set_visible(False)
    letter([*axes[: len(tasks)], axes[-1]])
    figure.legend(handles=_key(table), loc="outside upper center", ncols=4)
    return figure


def caption(table: pd.DataFrame) -> str:
    """The rule, every verdict that is no estimate, and the digits beside the published numbers."""
    found = searches(table)
    texts = [row for row in found if row["task"] != DIGITS]
    seeds = table[table["dimension"].notna()].groupby([*KEYS, "dimension"])["seed"].nunique()
    sentences = [
        _finding(texts, found[len(texts) :]),
        f"{TITLE}. θ = θ₀ + P z, z ∈ R^d: one gain a layer (SAID, circles and solid lines) or none "
        "(DID, squares and dashed lines). Dots are runs (1 to "
        f"{seeds.max()} seeds at a dimension), lines their mean, long dashes the target: on text "
        "90 % of full fine-tuning of the pre-trained model. The learning rate was chosen for "
        f"every dimension on validation rows. Bars: {100 * found[0]['confidence']:.0f} % bootstrap "
        "intervals; arrows: beyond the searched dimensions.",
    ]
    counts = Counter(row["verdict"] for row in texts)
    if counts:
        told = joined([f"{count} {verdict}" for verdict, count in counts.most_common()])
        sentences.append(f"Of {len(texts)} searches on text: {told}.")
    for model, start in dict.fromkeys((row["model"], row["start"]) for row in texts):
        readings = [
            f"{row['task']} {row['method'].upper()} {row['reading']}"
            for row in texts
            if (row["model"], row["start"]) == (model, start)
        ]
        sentences.append(f"{NAMES.get(model, model)}, {start}: {'; '.join(readings)}.")
    for row in found[len(texts) :]:
        rule = "90 % of its own"
        if row["rule"] != "own":
            same = (table["model"] == row["model"]) & table["dimension"].isna()
            share = 100 * row["target"] / table.loc[same, "accuracy"].mean()
            rule = f"accuracy {row['rule']}, {share:.0f} % of its own"
        known = PUBLISHED.get((row["model"], row["rule"]))
        told = "" if known is None else f" (published, on all of MNIST: {known})"
        sentences.append(f"{NAMES[row['model']]}, {rule}: {row['reading']}{told}.")
    if len(found) > len(texts):
        sentences.append(
            "Networks of digits reach less from a part of MNIST's images, so that a fixed accuracy "
            "asks for more of what they reach than it does of all images; the share of their own "
            "is what compares."
        )
    return " ".join(sentences)


def _finding(texts: list[dict[str, Any]], digits: list[dict[str, Any]]) -> str:
    """What pre-trained weights need, and what random ones do."""
    told = []
    needed = sorted(
        row["d90"] for row in texts if row["start"] == "pre-trained" and np.isfinite(row["d90"])
    )
    if needed:
        told.append(
            f"from pre-trained weights {needed[0]:,.0f} to {needed[-1]:,.0f} dimensions reach the "
            f"target ({len(needed)} searches)"
        )
    random = [row for row in texts if row["start"] == "random"]
    if random:
        beyond = sum(row["verdict"] == "above budget" for row in random)
        told.append(
            f"from random weights {beyond} of {len(random)} searches find none up to "
            f"{max(row['largest'] for row in random):,.0f}"
        )
    if not told:
        told = [f"{NAMES[row['model']]} needs {row['reading']} on digits" for row in digits]
    return f"{sentence('; '.join(told))}."


def _color(model: str) -> str:
    return COLORS.get(model, SPARE[sum(map(ord, model)) % len(SPARE)])


def _look(start: str, method: str, model: str = "") -> dict[str, Any]:
    look: dict[str, Any] = {"marker": MARKERS[method], "linestyle": LINES[method]}
    if start == "random" and method == "said":
        look = dict(RANDOM)
    return look | {"markerfacecolor": "white"} if model in HOLLOW else look


def _draw_task(ax: Axes, runs: pd.DataFrame, lines: pd.DataFrame) -> None:
    levels: dict[str, tuple[float, str]] = {}
    for (model, _, start, method, _), dots in groups(runs, KEYS):
        color, look, first = _color(model), _look(start, method, model), dots.iloc[0]
        same = (lines["model"] == model) & (lines["start"] == start) & (lines["method"] == method)
        line = lines[same & (lines["rule"] == first["rule"])]
        dots = dots[dots["dimension"].notna()]
        ax.scatter(dots["dimension"], dots["accuracy"], s=5, color=color, alpha=0.4, linewidths=0)
        ax.plot(
            line["dimension"].to_numpy(),
            line["accuracy"].to_numpy(),
            color=color,
            markersize=2.8,
            **look,
        )
        name = NAMES.get(model, model)
        if first["task"] == DIGITS:
            name = f"its 90 %,\n{name}" if first["rule"] == "own" else f"accuracy\n{first['rule']}"
        if name not in levels:
            levels[name] = first["target"], color
            ax.axhline(first["target"], color=color, **TARGET)
        if model in NAMES and (model, first["rule"]) in PUBLISHED:
            x = PUBLISHED[model, first["rule"]]
            ax.plot([x], [first["target"]], marker="*", markersize=6, color=color, linestyle="")
    chance = runs["chance"].iloc[0]
    if chance > 0.5 * runs["accuracy"].min():  # else the line would only press the curves together
        ax.axhline(chance, **CHANCE)
    ax.set_xscale("log")
    ax.set_xlabel("dimension $d$ of the subspace")
    ax.set_ylabel("test accuracy (%)")
    percent(ax.yaxis)
    ends = [(math.inf, target, name, color) for name, (target, color) in levels.items()]
    end_labels(ax, ends, gap=0.16 if (runs["task"] == DIGITS).any() else 0.075)


def _draw_dimensions(ax: Axes, found: list[dict[str, Any]]) -> None:
    found = [row for row in found if row["task"] != DIGITS] or found
    tasks = list(dict.fromkeys(row["task"] for row in found))
    for place, task in enumerate(tasks):
        rows = [row for row in found if row["task"] == task]
        for row, offset in zip(rows, _offsets(len(rows)), strict=True):
            y, color = place + offset, _color(row["model"])
            look = {**_look(row["start"], row["method"], row["model"]), "linestyle": ""}
            if row["verdict"] == "above budget":
                end = row["largest"]
                ax.plot([end], [y], color=color, markersize=4, **look)
                arrow = {"arrowstyle": "->", "color": color, "linewidth": 0.8}
                ax.annotate("", (2.5 * end, y), (end, y), arrowprops=arrow)
                continue
            low = row["low"] if row["low"] > 0 else row["smallest"]
            high = row["high"] if np.isfinite(row["high"]) else row["largest"]
            ax.plot([low, high], [y, y], color=color, linewidth=1.0, marker="|", markersize=4)
            if np.isfinite(row["d90"]) and row["d90"] > 0:
                ax.plot([row["d90"]], [y], color=color, markersize=4, **look)
    for border in range(1, len(tasks)):
        ax.axhline(border - 0.5, color="#CCCCCC", linewidth=0.6)
    ax.set_yticks(range(len(tasks)), tasks)
    ax.set_ylim(len(tasks) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set_xscale("log")
    ax.set_xlim(right=2.9 * max(row["largest"] for row in found))
    ax.set_xlabel("d90 (arrow: beyond the largest searched dimension)")
    ax.set_title(f"d90, {100 * found[0]['confidence']:.0f} % bootstrap intervals over seeds")


def _offsets(count: int) -> np.ndarray:
    return np.linspace(-0.33, 0.33, count) if count > 1 else np.zeros(1)


def _key(table: pd.DataFrame) -> list[Line2D]:
    """Colour is the model, marker and line the start and the method."""
    made = [
        Line2D(
            [],
            [],
            color=_color(model),
            label=NAMES.get(model, model),
            marker="o",
            markersize=3,
            markerfacecolor="white" if model in HOLLOW else None,
        )
        for model in dict.fromkeys(table["model"])
    ]
    kinds = dict.fromkeys(zip(table["start"], table["method"], table["task"], strict=True))
    for start, method, task in kinds:
        if task == DIGITS:
            continue
        label = f"{method.upper()}, {start}"
        if label not in [line.get_label() for line in made]:
            look = _look(start, method)
            made.append(Line2D([], [], color="#333333", markersize=3, label=label, **look))
    target = "target: 90 % of full fine-tuning"
    made.append(Line2D([], [], color="#333333", label=target, **TARGET))
    made.append(seed_dot())
    made.append(Line2D([], [], label="majority class", **CHANCE))
    if (table["task"] == DIGITS).any():
        star = {"marker": "*", "linestyle": "", "markersize": 6}
        made.append(Line2D([], [], color="#333333", label="published, all of MNIST", **star))
    return made
