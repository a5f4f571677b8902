"""Task loss against the distance from the base model, along trainings of a language model.

The base model is the first point of every path. At a common task loss, the largest of those that
the methods reach with their better rate, the distance is read off each path between two looks. The
foretold front of a delta is that of one quadratic model at its start, before any training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates
from deltacontrol.paper_figures.marks import (
    by_method,
    counted,
    end_labels,
    joined,
    letter,
    looks,
    number,
)

TITLE = "What tuning a language model moves elsewhere"
STUDY = "forgetting"

FRONT = "forgetting-front"  # the kind of the records of foretold fronts

INK = "#222222"


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per training: its end, and the task loss at the start."""
    records = [record for record in records if record.kind != FRONT]
    labels = [_label(record) for record in records]
    check_replicates(records, labels)
    rows = []
    for record, (name, rate) in zip(records, labels, strict=True):
        start, end = record.result["start"], record.result["end"]
        path = _path(record)
        rows.append(
            {
                "method": name,
                "learning_rate": rate,
                "seed": record.config["seed"],
                "start": start["loss"],
                "held_start": start["held_loss"],
                "loss": number(end["loss"]),
                "held_loss": number(end["held_loss"]),
                "kl": number(end["kl"]),
                "least_loss": float(path["loss"].min()),
                "trainable_share": record.result["trainable_share"],
                "model": record.config["model"],
                "task": record.config["task"],
                "held": record.config["held"],
                "steps": record.config["steps"],
                "status": record.status,
                "run": record.id,
            }
        )
    frame = by_method(pd.DataFrame(rows), ["method", "learning_rate", "seed"])
    goal = common_loss(frame)
    paths = {record.id: _path(record) for record in records}
    frame["common_loss"] = goal
    frame["kl_at_common"] = [distance(paths[run], goal) for run in frame["run"]]
    return frame


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """The paths: task loss, held loss and KL by step, means over seeds; and foretold fronts."""
    rows, fronts = [], []
    for record in records:
        if record.kind == FRONT:
            fronts.append(record.curve().assign(method=str(record.config["delta"]["name"])))
            continue
        name, rate = _label(record)
        rows.append(_path(record).assign(method=name, learning_rate=rate))
    keys = ["method", "learning_rate", "step"]
    means = pd.concat(rows).groupby(keys)[["loss", "held_loss", "kl"]].mean()
    paths = by_method(means.reset_index(), keys).assign(what="path")
    if not fronts:
        return paths
    start = float(paths.loc[paths["step"] == 0, "loss"].mean())
    front = pd.concat(fronts)
    front = front.assign(loss=start - front["gain"], what="foretold")[
        ["method", "loss", "kl", "what"]
    ]
    return pd.concat([paths, by_method(front, ["method", "kl"])], ignore_index=True)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method and rate."""
    rows = []
    for (name, rate), runs in table.groupby(["method", "learning_rate"], sort=False):
        rows.append(
            {
                "method": looks([str(name)])[str(name)].label,
                "learning rate": f"{rate:g}",
                "task loss": _both(runs["loss"], 3),
                "held loss": _both(runs["held_loss"], 3),
                "KL": _both(runs["kl"], 4),
                f"KL at task loss {runs['common_loss'].iloc[0]:.3f}": _both(
                    runs["kl_at_common"], 4
                ),
                "trained (%)": f"{100 * runs['trainable_share'].iloc[0]:.2g}",
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Paths in the plane of task loss and KL, and of KL and held loss."""
    figure = Figure(figsize=(PAGE_WIDTH, 3.0), layout="constrained")
    front, held = figure.subplots(1, 2)
    foretold, curves = curves[curves["what"] == "foretold"], curves[curves["what"] == "path"]
    _draw_paths(front, curves, "kl", "loss")
    for name, look in looks(foretold["method"]).items():
        line = foretold[foretold["method"] == name]
        line = line[line["loss"] >= 0.95 * curves["loss"].min()]
        front.plot(line["kl"], line["loss"], color=look.color, linestyle=":", linewidth=1.0)
    front.set(xlabel="KL on held text (nats a token)", ylabel="task loss (nats a token)")
    front.set_title("the front")
    front.axhline(table["common_loss"].iloc[0], color=INK, linestyle="--", linewidth=0.8)
    _draw_paths(held, curves, "kl", "held_loss")
    held.set(xlabel="KL on held text (nats a token)", ylabel="loss on held text")
    held.set_title("which way")
    letter((front, held))
    return figure


def caption(table: pd.DataFrame) -> str:
    """How far each method moves for the same task loss, and how it was measured."""
    first, told = table.iloc[0], []
    for name, look in looks(table["method"]).items():
        rates = table[table["method"] == name].groupby("learning_rate")["kl_at_common"]
        found = [rows.tolist() for _, rows in rates if rows.notna().all()]
        if found:
            least = min(found, key=lambda seeds: float(np.mean(seeds)))
            told.append((float(np.mean(least)), look.label, least))
    told.sort()
    words = joined([f"{label} {value:.4f}" for value, label, _ in told])
    seeds = "; ".join(
        f"{label} {', '.join(f'{v:.4f}' for v in values)}" for _, label, values in told
    )
    rates = int(table.groupby("method")["learning_rate"].nunique().max())
    return (
        f"For a task loss of {first['common_loss']:.3f} nats a token, predictions on held text "
        f"move by so many nats a token: {words}. {TITLE}: {first['model']} tuned on "
        f"{first['task']} for {first['steps']} updates, texts of {first['held']} as held ones, "
        f"{counted(table['seed'].nunique(), 'seed')}, {counted(rates, 'rate')} a method (solid: "
        "the larger). Lines are means over seeds of a look every few updates and begin at the base "
        "model. (a) Task loss against KL(base, tuned) on held text; the horizontal line is the "
        "loss that all methods reach, dots are the front that one Gauss-Newton model at the start "
        "foretells, whose gain is of the training rows that it is made from. (b) Loss on held text "
        f"against the same KL. The numbers are of the rate with the smaller KL; by seed: {seeds}."
    )


def common_loss(table: pd.DataFrame) -> float:
    """The largest of the least task losses, of each method its better rate, means over seeds."""
    least = table.groupby(["method", "learning_rate"])["least_loss"].mean()
    return float(least.groupby("method").min().max()) + 1e-3


def distance(path: pd.DataFrame, goal: float) -> float:
    """KL where a path first has the task loss `goal`; NaN where it never has."""
    loss, kl = path["loss"].to_numpy(float), path["kl"].to_numpy(float)
    below = np.flatnonzero(loss <= goal)
    if not len(below):
        return math.nan
    k = int(below[0])
    if k == 0:
        return float(kl[0])
    share = (loss[k - 1] - goal) / (loss[k - 1] - loss[k])
    return float(kl[k - 1] + share * (kl[k] - kl[k - 1]))


def _path(record: Record) -> pd.DataFrame:
    """The base model, then every look."""
    names = {f"validation_{name}": name for name in ("loss", "held_loss", "kl")}
    found = record.curve().reindex(columns=["step", *names]).rename(columns=names).dropna()
    first = pd.DataFrame([{"step": 0, **record.result["start"]}])
    return pd.concat([first, found], ignore_index=True)


def _label(record: Record) -> tuple[str, float]:
    return str(record.config["delta"]["name"]), float(record.config["learning_rate"])


def _both(values: pd.Series, digits: int) -> str:
    """Every seed."""
    return ", ".join("never" if np.isnan(v) else f"{v:.{digits}f}" for v in values)


def _draw_paths(ax: Axes, curves: pd.DataFrame, x: str, y: str) -> None:
    ends = []
    for name, look in looks(curves["method"]).items():
        rates = sorted(set(curves.loc[curves["method"] == name, "learning_rate"]), reverse=True)
        for place, rate in enumerate(rates):
            line = curves[(curves["method"] == name) & (curves["learning_rate"] == rate)]
            style = "-" if place == 0 else (0, (4, 2))
            ax.plot(line[x], line[y], color=look.color, linestyle=style, linewidth=1.0)
            ax.plot(
                line[x].iloc[-1:], line[y].iloc[-1:], look.marker, color=look.color, markersize=4
            )
            if place == 0:
                last = (float(line[x].iloc[-1]), float(line[y].iloc[-1]))
                ends.append((*last, look.label.removesuffix(" fine-tuning"), look.color))
    ax.set_xscale("symlog", linthresh=1e-3)
    ax.set_xlim(left=0)
    end_labels(ax, ends, 0.08)
