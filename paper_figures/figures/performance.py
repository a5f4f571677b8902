"""What each delta reaches, how fast, and with how many parameters.

Rows are tasks. Columns: test accuracy of each method, a dot a seed; training loss; accuracy against
the share of parameters that is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates, groups
from deltacontrol.paper_figures.marks import (
    Look,
    joined,
    letter,
    looks,
    method,
    number,
    percent,
    spread,
)

TITLE = "Accuracy, training loss and trainable share of delta methods"
STUDY = "performance"

KEYS = ["model", "task", "method"]
NUM_POINTS = 80  # points drawn of a loss curve, after smoothing


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run: what it reached, and what it cost."""
    labels = [_group(record) for record in records]
    check_replicates(records, labels)
    rows = [
        {
            **dict(zip(KEYS, label, strict=True)),
            "seed": record.config["seed"],
            "learning_rate": record.config["learning_rate"],
            "split": record.config.get("evaluate_on", "test"),
            "accuracy": number(record.result["accuracy"]),
            "majority_share": number(record.result.get("majority_share")),
            "num_trainable": record.result["num_trainable"],
            "trainable_share_with_head": record.result["trainable_share_with_head"],
            "seconds_per_step": number(record.result["seconds_per_step"]),
            "peak_memory_bytes": number(record.result["peak_memory_bytes"]),
            "status": record.status,
            "run": record.id,
        }
        for record, label in zip(records, labels, strict=True)
    ]
    return _ordered(pd.DataFrame(rows), [*KEYS, "seed"])


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """Training loss: a running mean within each run, then mean and spread over its seeds."""
    runs: dict[tuple[str, ...], list[pd.Series]] = {}
    for record in records:
        losses = record.curve()[["step", "loss"]].dropna().set_index("step")["loss"]
        window = max(1, len(losses) // 10)
        runs.setdefault(_group(record), []).append(
            losses.rolling(window, min_periods=-(-window // 2)).mean()
        )
    frames = []
    for group, series in runs.items():
        over_seeds = pd.concat(series, axis=1).dropna()
        frame = pd.DataFrame(
            {
                **dict(zip(KEYS, group, strict=True)),
                "step": over_seeds.index,
                "loss": over_seeds.mean(axis=1).to_numpy(),
                "deviation": over_seeds.std(axis=1).to_numpy(),
            }
        )
        kept = np.unique(np.linspace(0, len(frame) - 1, NUM_POINTS).round().astype(int))
        frames.append(frame.iloc[kept])
    return _ordered(pd.concat(frames), [*KEYS, "step"])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean ± standard deviation over seeds of accuracy, and the costs."""
    rows = []
    for (model, task, name), runs in groups(table, KEYS):
        accuracy = 100 * runs["accuracy"]
        rates = sorted(set(runs["learning_rate"]))
        rows.append(
            {
                "model": model,
                "task": task,
                "method": looks([name])[name].label,
                "accuracy (%)": spread(accuracy.mean(), accuracy.std()),
                "seeds": str(len(runs)),
                "trainable": f"{runs['num_trainable'].iloc[0]:,}",
                "share (%)": f"{100 * runs['trainable_share_with_head'].iloc[0]:.3g}",
                "s/step": f"{runs['seconds_per_step'].median():.3g}",
                "peak memory (MB)": f"{runs['peak_memory_bytes'].median() / 1e6:.0f}",
                "learning rate": ", ".join(f"{rate:g}" for rate in rates),
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """One row of three panels per task."""
    shown = looks(table["method"])
    rows = list(groups(table, ["model", "task"]))
    figure = Figure(figsize=(PAGE_WIDTH, 0.45 + 1.95 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False, width_ratios=[1.0, 1.0, 1.0])
    for (ranking, losses, sizes), ((model, task), runs) in zip(axes, rows, strict=True):
        _draw_ranking(ranking, runs, shown)
        ranking.set_title(task if table["model"].nunique() == 1 else f"{task}, {model}")
        of_task = curves[(curves["model"] == model) & (curves["task"] == task)]
        _draw_losses(losses, of_task, shown)
        _draw_sizes(sizes, runs, shown)
    for ax, label in zip(axes[-1], _labels(table), strict=True):
        ax.set_xlabel(label)
    letter(axes.flat)
    handles, labels = axes[0, 2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 7))
    return figure


def caption(table: pd.DataFrame) -> str:
    """Best and cheapest method per task, with the number of seeds."""
    seeds = table.groupby(KEYS)["seed"].nunique()
    count = str(seeds.min()) if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    sentences = [
        f"{TITLE} ({joined(sorted(table['model'].unique()))}; seeds: {count}). Left: a dot is a "
        "seed, the bar mean ± standard deviation, the dashed line the majority class. Middle: "
        "training loss, running mean over a tenth of the steps, mean ± standard deviation over "
        "seeds. Right: mean accuracy against the share of parameters trained, head included."
    ]
    for (_, task), runs in groups(table, ["model", "task"]):
        means = 100 * runs.groupby("method", sort=False)["accuracy"].mean()
        best = str(means.idxmax())
        text = f"On {task}, {looks([best])[best].label} reaches {means[best]:.1f} %"
        deltas = means.drop([name for name in ("full", "head") if name in means])
        if "full" in means and len(deltas):
            top = str(deltas.idxmax())
            share = 100 * runs.loc[runs["method"] == top, "trainable_share_with_head"].iloc[0]
            text += (
                f"; the best delta, {looks([top])[top].label}, is "
                f"{deltas[top] - means['full']:+.1f} points from full fine-tuning, with "
                f"{share:.2g} % of the parameters"
            )
        sentences.append(f"{text}.")
    diverged = int((table["status"] == "diverged").sum())
    if diverged:
        sentences.append(f"{diverged} of {len(table)} runs diverged and have no accuracy.")
    return " ".join(sentences)


def _group(record: Record) -> tuple[str, str, str]:
    config = record.config
    return str(config["model"]), str(config["task"]), method(config["deltas"])


def _ordered(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    order = {name: index for index, name in enumerate(looks(frame["method"]))}
    return frame.sort_values(
        keys, key=lambda column: column.map(order) if column.name == "method" else column
    ).reset_index(drop=True)


def _labels(table: pd.DataFrame) -> tuple[str, str, str]:
    split = joined(sorted(table["split"].unique()))
    return f"{split} accuracy (%)", "step", "trainable share, head included"


def _draw_ranking(ax: Axes, runs: pd.DataFrame, shown: dict[str, Look]) -> None:
    present = [name for name in shown if name in set(runs["method"])]
    for height, name in enumerate(reversed(present)):
        accuracy = runs.loc[runs["method"] == name, "accuracy"]
        color = shown[name].color
        deviation = accuracy.std() if len(accuracy) > 1 else 0.0
        ax.errorbar(
            accuracy.mean(), height, xerr=deviation, fmt="|", color=color, ms=7, mew=1.5, zorder=2
        )
        heights = np.full(len(accuracy), height)
        ax.scatter(accuracy, heights - 0.28, s=7, color=color, alpha=0.7, linewidths=0, zorder=3)
    majority = runs["majority_share"].dropna()
    if len(majority):
        ax.axvline(majority.iloc[0], color="#555555", linestyle="--", linewidth=0.8)
        ax.text(majority.iloc[0], len(present) - 0.5, " majority", fontsize=6, va="top")
    ax.set_yticks(range(len(present)), [shown[name].label for name in reversed(present)])
    ax.set_ylim(-0.6, len(present) - 0.4)
    ax.grid(axis="y", visible=False)
    percent(ax.xaxis)


def _draw_losses(ax: Axes, curves: pd.DataFrame, shown: dict[str, Look]) -> None:
    for name, look in shown.items():
        line = curves[curves["method"] == name]
        step, loss, deviation = (line[c].to_numpy(float) for c in ("step", "loss", "deviation"))
        ax.plot(step, loss, color=look.color)
        ax.fill_between(
            step, loss - deviation, loss + deviation, color=look.color, alpha=0.15, linewidth=0
        )
    ax.set_ylabel("training loss")
    # Logarithmic: a large rate, good for accuracy, may raise the loss far above the others'.
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def _draw_sizes(ax: Axes, runs: pd.DataFrame, shown: dict[str, Look]) -> None:
    for name, look in shown.items():
        of_method = runs[runs["method"] == name]
        if of_method.empty:
            continue
        accuracy = of_method["accuracy"]
        ax.errorbar(
            of_method["trainable_share_with_head"].iloc[0],
            accuracy.mean(),
            yerr=accuracy.std() if len(accuracy) > 1 else 0.0,
            fmt=look.marker,
            color=look.color,
            label=look.label,
        )
    ax.set_xscale("log")
    ax.margins(x=0.08, y=0.1)
    ax.set_ylabel("accuracy (%)")
    percent(ax.yaxis)
