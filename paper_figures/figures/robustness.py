"""Accuracy of classifiers on clean, perturbed and corrected texts, by method.

The correction projects hidden states onto the principal subspaces of clean ones; its rank and gain
were chosen on validation rows. Its control went through the same choice with random subspaces. What
a correction gives back is a share of what the attack costs, Σ gained / Σ lost over seeds: a mean of
shares would be led by the seeds that lose least.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import t as student

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates
from deltacontrol.paper_figures.clusters import Estimate
from deltacontrol.paper_figures.marks import (
    INTERVAL,
    counted,
    joined,
    letter,
    looks,
    percent,
    seed_dot,
    share_interval,
)
from deltacontrol.theory.evidence import CONFIDENCE

# What is gained by which accuracies, after and before, in the words of the table.
GAINS = {
    "adaptive": ("adaptive_corrected", "attacked"),
    "corrected": ("attacked_corrected", "attacked"),
    "beyond random": ("attacked_corrected", "attacked_random"),
}

TITLE = "Clean, perturbed and corrected texts"
STUDY = "robustness"

# A panel each: what was done to the texts, and the conditions from plain to the control.
PANELS = {
    "clean": ("clean", "clean_corrected", "clean_random"),
    "attacked": ("attacked", "attacked_corrected", "attacked_random"),
    "the attack knows the correction": ("attacked", "adaptive_corrected"),
    "typing errors": ("typos", "typos_corrected"),
}
STATES = {"": "plain", "corrected": "corrected", "random": "random subspaces"}
COLORS = {"": "#222222", "corrected": "#0072B2", "random": "#999999"}
MARKERS = {"": "o", "corrected": "D", "random": "s"}


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run and condition."""
    labels = [str(record.config["delta"]["name"]) for record in records]
    check_replicates(records, labels)
    conditions = list(dict.fromkeys(c for panel in PANELS.values() for c in panel))
    rows = [
        {
            "method": name,
            "seed": record.config["seed"],
            "condition": condition,
            "accuracy": record.result["accuracy"][condition],
            "rank": record.result["choice"]["rank"],
            "gain": record.result["choice"]["proportional"],
            "model": record.config["model"],
            "task": record.config["task"],
            "num_test": record.config["num_test"],
            "epsilon": record.config["epsilon"],
            "typo_rate": record.config["typo_rate"],
            "run": record.id,
        }
        for record, name in zip(records, labels, strict=True)
        for condition in conditions
    ]
    order = {name: index for index, name in enumerate(looks(labels))}
    places = {condition: place for place, condition in enumerate(conditions)}
    return (
        pd.DataFrame(rows)
        .sort_values(
            ["method", "seed", "condition"],
            key=lambda column: (
                column.map({"method": order, "condition": places}[str(column.name)])
                if column.name != "seed"
                else column
            ),
        )
        .reset_index(drop=True)
    )


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """Means over seeds with their intervals, by method and condition."""
    rows = []
    for (name, condition), runs in table(records).groupby(["method", "condition"], sort=False):
        low, high = share_interval(runs["accuracy"]) or (np.nan, np.nan)
        rows.append(
            {
                "method": name,
                "condition": condition,
                "accuracy": runs["accuracy"].mean(),
                "low": low,
                "high": high,
            }
        )
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method: accuracies, and the share of what was lost that is there again."""
    rows = []
    means = table.groupby(["method", "condition"], sort=False)["accuracy"].mean()
    for name, look in looks(table["method"]).items():
        own = means[name]
        row = {"method": look.label}
        row |= {c.replace("_", ", "): f"{100 * own[c]:.1f}" for c in own.index}
        row["recovered (%)"] = _text(recovered(table, name, "corrected"))
        row["beyond random subspaces (%)"] = _text(recovered(table, name, "beyond random"))
        row["if the attack knows it (%)"] = _text(recovered(table, name, "adaptive"))
        rows.append(row)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """A panel for each perturbation."""
    shown = looks(table["method"])
    figure = Figure(figsize=(PAGE_WIDTH, 2.9), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for ax, (title, conditions) in zip(axes, PANELS.items(), strict=True):
        for shift, condition in zip((-0.25, 0.0, 0.25), conditions, strict=False):
            state = condition.partition("_")[2]
            color = COLORS[state]
            for place, name in enumerate(shown):
                found = curves[(curves["method"] == name) & (curves["condition"] == condition)]
                x, at = float(found["accuracy"].iloc[0]), place + shift
                ax.plot([found["low"].iloc[0], found["high"].iloc[0]], [at, at], color=color,
                        marker="|", markersize=3, linewidth=0.9)  # fmt: skip
                ax.plot([x], [at], MARKERS[state], color=color, markersize=3.5)
                seeds = table[(table["method"] == name) & (table["condition"] == condition)]
                heights = np.full(len(seeds), at + 0.09)
                ax.scatter(seeds["accuracy"], heights, s=4, color=color, linewidths=0, zorder=3)
        ax.set_title(title.replace("the attack knows the correction", "adaptive attack"))
        ax.set_yticks(range(len(shown)), [look.label for look in shown.values()])
        ax.set_ylim(len(shown) - 0.4, -0.6)
        ax.grid(axis="y", visible=False)
        percent(ax.xaxis, 4)
        ax.set_xlabel("accuracy (%)")
    letter(axes)
    handles = [
        Line2D([], [], linestyle="", marker=MARKERS[s], markersize=4, color=COLORS[s], label=label)
        for s, label in STATES.items()
    ]
    figure.legend(handles=[*handles, seed_dot()], loc="outside upper center", ncols=4)
    return figure


def caption(table: pd.DataFrame) -> str:
    """What the correction gives back, and how it was measured."""
    first, shown = table.iloc[0], looks(table["method"])
    told = {
        how: joined(
            [f"{look.label} {_text(recovered(table, n, how))}" for n, look in shown.items()]
        )
        for how in GAINS
    }
    return (
        "Of the accuracy that the attack costs, the correction gives back, in per cent, "
        f"{told['adaptive']} where the attack knows the correction, and {told['corrected']} where "
        f"it does not. In the latter case it gives more than random subspaces by "
        f"{told['beyond random']}. {TITLE}: {first['model']} on {first['task']}, "
        f"{first['num_test']} test rows, {counted(table['seed'].nunique(), 'seed')}. (a) Clean "
        f"texts. (b) An attack by gradients on the embeddings, of radius {first['epsilon']:g}, "
        "that does not know the correction; in grey, the same choice of a correction on random "
        "subspaces. (c) An attack whose gradients pass through the correction, beside the plain "
        f"one of (b). (d) Typing errors in {100 * first['typo_rate']:g} % of the words. Marks are "
        f"means, bars the {INTERVAL} over seeds; shares are ratios of sums over seeds, with "
        "Student's interval of the linearised ratio."
    )


def recovered(table: pd.DataFrame, name: str, how: str) -> Estimate:
    """R = Σ gained / Σ lost over seeds, lost = clean - attacked, with Student's interval.

    That is of the linearised ratio: the residuals gained - R·lost have mean zero, and R has their
    standard error over the mean of what was lost (Cochran, *Sampling Techniques*, 3rd ed., 1977,
    eq. 6.4). NaN where nothing was lost; the value alone of one seed.

    Args:
        table: of this figure.
        name: of the method.
        how: a key of `GAINS`.
    """
    own = table[table["method"] == name]
    wide = own.pivot(index="seed", columns="condition", values="accuracy")
    after, before = GAINS[how]
    gained, lost = wide[after] - wide[before], wide["clean"] - wide["attacked"]
    if lost.sum() <= 0:
        return Estimate(float("nan"))
    ratio, count = float(gained.sum() / lost.sum()), len(wide)
    if count < 2:
        return Estimate(ratio)
    residuals = gained - ratio * lost
    error = float(residuals.std(ddof=1) / np.sqrt(count) / lost.mean())
    half = float(student.ppf(0.5 + CONFIDENCE / 2, count - 1)) * error
    return Estimate(ratio, ratio - half, ratio + half)


def _text(found: Estimate) -> str:
    scaled = Estimate(100 * found.value, 100 * found.low, 100 * found.high)
    return "nothing to tell" if np.isnan(found.value) else scaled.text(0)
