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
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates, groups
from deltacontrol.paper_figures.marks import (
    INTERVAL,
    Look,
    apart,
    by_method,
    end_labels,
    joined,
    letter,
    looks,
    method,
    number,
    percent,
    seed_dot,
    sentence,
    share_interval,
    spread,
)

TITLE = "Accuracy, training loss and trainable share of delta methods"
STUDY = "performance"

KEYS = ["model", "task", "method"]
NUM_POINTS = 80  # points drawn of a loss curve, after smoothing
CLOSE = 1.4  # shares of parameters that are nearer than this factor are drawn side by side


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
    return by_method(pd.DataFrame(rows), [*KEYS, "seed"])


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """Training loss: a running mean within each run, then mean and range over its seeds."""
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
                "low": over_seeds.min(axis=1).to_numpy(),
                "high": over_seeds.max(axis=1).to_numpy(),
            }
        )
        kept = np.unique(np.linspace(0, len(frame) - 1, NUM_POINTS).round().astype(int))
        frames.append(frame.iloc[kept])
    return by_method(pd.concat(frames), [*KEYS, "step"])


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
    figure = Figure(figsize=(PAGE_WIDTH, 0.75 + 2.0 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False, width_ratios=[1.0, 1.0, 0.85])
    for (ranking, losses, sizes), ((model, task), runs) in zip(axes, rows, strict=True):
        name = task if table["model"].nunique() == 1 else f"{task}, {model}"
        _draw_ranking(ranking, runs, shown)
        of_task = curves[(curves["model"] == model) & (curves["task"] == task)]
        _draw_losses(losses, of_task, shown)
        _draw_sizes(sizes, runs, shown)
        for ax, what in zip((ranking, losses, sizes), ("accuracy", "loss", "size"), strict=True):
            ax.set_title(f"{name}: {what}")
    for ax, label in zip(axes[-1], _labels(table), strict=True):
        ax.set_xlabel(label)
    letter(axes.flat)
    figure.legend(handles=_key(table, shown), loc="outside upper center", ncols=4)
    return figure


def caption(table: pd.DataFrame) -> str:
    """What the best delta reaches of each task, and how it is drawn."""
    tops = [_best(task, runs) for (_, task), runs in groups(table, ["model", "task"])]
    sentences = [
        f"{sentence('; '.join(tops))}.",
        f"{TITLE} ({joined(sorted(table['model'].unique()))}; {_count(table)} seeds). Accuracy: "
        f"{INTERVAL} over seeds, which stays within 0 and 100 %. Loss: running mean over a tenth "
        "of the steps, mean and range over seeds. Size: the share of the parameters that is "
        "trained, head included, and the mean over seeds; shares closer than a factor "
        f"{CLOSE:g} are drawn side by side.",
    ]
    diverged = int((table["status"] == "diverged").sum())
    if diverged:
        sentences.append(f"{diverged} of {len(table)} runs diverged and have no accuracy.")
    return " ".join(sentences)


def _best(task: str, runs: pd.DataFrame) -> str:
    means = 100 * runs.groupby("method", sort=False)["accuracy"].mean()
    deltas = means.drop([name for name in ("full", "head") if name in means]).dropna()
    best = str((deltas if len(deltas) else means).idxmax())
    share = 100 * runs.loc[runs["method"] == best, "trainable_share_with_head"].iloc[0]
    text = f"on {task} {looks([best])[best].label} reaches {means[best]:.1f} % with {share:.2g} % "
    text += "of the parameters"
    if "full" in means and best != "full":
        text += f" (full fine-tuning {means['full']:.1f} %)"
    return text


def _count(table: pd.DataFrame) -> str:
    seeds = table.groupby(KEYS)["seed"].nunique()
    return str(seeds.min()) if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"


def _group(record: Record) -> tuple[str, str, str]:
    config = record.config
    return str(config["model"]), str(config["task"]), method(config["deltas"])


def _labels(table: pd.DataFrame) -> tuple[str, str, str]:
    split = joined(sorted(table["split"].unique()))
    return f"{split} accuracy (%)", "step", "trained share"


def _key(table: pd.DataFrame, shown: dict[str, Look]) -> list[Line2D]:
    made = [
        Line2D([], [], linestyle="", marker=look.marker, color=look.color, label=look.label)
        for look in shown.values()
    ]
    made.append(seed_dot())
    if (table.groupby(KEYS)["seed"].nunique() > 1).any():
        name = f"mean, {INTERVAL}\n(n = {_count(table)} seeds)"
        made.append(Line2D([], [], color="#333333", marker="|", markersize=6, label=name))
    return made


def _draw_ranking(ax: Axes, runs: pd.DataFrame, shown: dict[str, Look]) -> None:
    present = [name for name in shown if name in set(runs["method"])]
    for height, name in enumerate(reversed(present)):
        accuracy, color = runs.loc[runs["method"] == name, "accuracy"].dropna(), shown[name].color
        ends = share_interval(accuracy)
        if ends is not None:
            ax.plot(ends, [height] * 2, color=color, marker="|", markersize=4, linewidth=0.9)
        if len(accuracy):
            ax.plot([accuracy.mean()], [height], marker="|", color=color, markersize=8, mew=1.8)
        heights = np.full(len(accuracy), height - 0.27)
        ax.scatter(accuracy, heights, s=7, color=color, linewidths=0, zorder=3)
    majority = runs["majority_share"].dropna()
    if len(majority):
        ax.axvline(majority.iloc[0], color="#555555", linestyle="--", linewidth=0.8, zorder=0)
        ax.text(majority.iloc[0], len(present) - 0.42, " majority class", fontsize=6, va="center")
    ax.set_yticks(range(len(present)), [shown[name].label for name in reversed(present)])
    ax.set_ylim(-0.6, len(present) - 0.1)
    ax.grid(axis="y", visible=False)
    percent(ax.xaxis)


def _draw_losses(ax: Axes, curves: pd.DataFrame, shown: dict[str, Look]) -> None:
    ends = []
    for name, look in shown.items():
        line = curves[curves["method"] == name]
        if line.empty:
            continue
        step, loss, low, high = (line[c].to_numpy(float) for c in ("step", "loss", "low", "high"))
        marks = {"marker": look.marker, "markersize": 3, "markevery": (0, max(1, len(line) // 4))}
        ax.plot(step, loss, color=look.color, **marks)
        ax.fill_between(step, low, high, color=look.color, alpha=0.12, linewidth=0)
        ends.append((step[-1], loss[-1], look.label.removesuffix(" fine-tuning"), look.color))
    ax.set_ylabel("training loss")
    # Logarithmic: a large rate, good for accuracy, may raise the loss far above the others'.
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    end_labels(ax, ends)


def _draw_sizes(ax: Axes, runs: pd.DataFrame, shown: dict[str, Look]) -> None:
    present = [name for name in shown if name in set(runs["method"])]
    shares = [
        runs.loc[runs["method"] == name, "trainable_share_with_head"].iloc[0] for name in present
    ]
    places = np.exp(apart(np.log(shares), np.log(CLOSE)))
    for name, share in zip(present, places, strict=True):
        accuracy, look = runs.loc[runs["method"] == name, "accuracy"], shown[name]
        ax.plot(
            [share], [accuracy.mean()], marker=look.marker, color=look.color, markersize=6,
            markerfacecolor="white", markeredgewidth=1.0,
        )  # fmt: skip
        dots = np.full(len(accuracy), share)
        ax.scatter(dots, accuracy, s=5, color=look.color, linewidths=0, zorder=3)
    ax.set_xscale("log")
    ax.margins(x=0.08, y=0.1)
    ax.set_ylabel("accuracy (%)")
    percent(ax.yaxis)
