"""Deltas and full fine-tuning on models of one recipe that differ in size.

Points are 100 × accuracy on test rows, means over seeds. Slopes are least squares in log₁₀ of the
model's parameters, so that a slope is what ten times as many gain. The spread of placements is the
variance over the methods that choose which parameters are trained, less what it would be if seeds
alone made it: the mean variance over seeds, over their number. These methods do not train equally
many parameters. Every task is of a corpus of its own, and intervals draw tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.studies.scale.grid import TASKS
from deltacontrol.paper_figures.agreement import Agreement, same_side
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates
from deltacontrol.paper_figures.clusters import Clusters, Estimate
from deltacontrol.paper_figures.marks import (
    counted,
    end_labels,
    joined,
    letter,
    looks,
    method,
    number,
)
from deltacontrol.paper_figures.progress import looks_of, nearly_done

TITLE = "Deltas as the model grows"
STUDY = "scale"

REFERENCE = "full"
PLACEMENTS = ("last-layers", "selected-modules", "random-mask")
# Ding et al., Nature Machine Intelligence 5, 2023, Figure 3: T5 small, base and XXL.
PUBLISHED = ("houlsby", "lora", "prefix", "last-layers", "selected-modules")
INK = "#222222"


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run: its points, and the step at which it is nearly done."""
    labels = [
        (str(r.config["model"]), str(r.config["task"]), method(r.config["deltas"])) for r in records
    ]
    check_replicates(records, labels)
    rows = []
    for record, (model, task, name) in zip(records, labels, strict=True):
        result, majority = record.result, number(record.result["majority_share"])
        found = number(result["accuracy"])
        seen, config = looks_of(record), record.config
        rows.append(
            {
                "model": model,
                "parameters": result["num_total"] - result["num_head"],
                "task": task,
                "method": name,
                "seed": record.config["seed"],
                "points": 100 * (majority if np.isnan(found) else found),
                "steps_95": nearly_done(
                    seen["step"],
                    seen["accuracy"],
                    majority,
                    rows=config["eval_limit"],
                    last=config["steps"],
                ),
                "trainable_share": result["trainable_share"],
                "learning_rate": record.config["learning_rate"],
                "steps": record.config["steps"],
                "batch_size": record.config["batch_size"],
                "status": record.status,
                "run": record.id,
            }
        )
    frame = pd.DataFrame(rows)
    order = {name: index for index, name in enumerate(looks(frame["method"]))}
    places = {task: place for place, task in enumerate(TASKS)}
    return frame.sort_values(
        ["parameters", "model", "task", "method", "seed"],
        key=lambda column: (
            column.map({"method": order, "task": places}[str(column.name)])
            if column.name in ("method", "task")
            else column
        ),
    ).reset_index(drop=True)


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """Means over tasks with their intervals, by method and size."""
    frame = table(records)
    clusters, rows = _clusters(frame), []
    sizes = frame.groupby("model", sort=False)["parameters"].median()
    for what in ("points", "gap", "log_steps"):
        for (model, name), values in _by_size(frame, what).items():
            found = clusters.of_means(values.to_frame())
            size = float(sizes[model])
            rows.append(
                {"what": what, "model": model, "parameters": size, "method": name, **vars(found)}
            )
    for model, values in _spreads(frame).items():
        found = clusters.of_means(values.to_frame())
        size = float(sizes[str(model)])
        rows.append(
            {"what": "spread", "model": model, "parameters": size, "method": "", **vars(found)}
        )
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method: what ten times as many parameters gain."""
    rows = []
    for name, look in looks(table["method"]).items():
        runs = table[table["method"] == name]
        shares = 100 * runs.groupby("model", sort=False)["trainable_share"].median()
        rows.append(
            {
                "method": look.label,
                "points": slope(table, "points", name).text(sign="+"),
                "gap to full": ""
                if name == REFERENCE
                else slope(table, "gap", name).text(sign="+"),
                "log10 steps to 95 %": slope(table, "log_steps", name).text(2, sign="+"),
                "trained (%)": f"{shares.min():.2g} to {shares.max():.2g}",
                "learning rates": ", ".join(f"{x:g}" for x in dict.fromkeys(runs["learning_rate"])),
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Accuracy, gap, steps and the spread of placements against size."""
    figure = Figure(figsize=(PAGE_WIDTH, 4.6), layout="constrained")
    axes = figure.subplots(2, 2)
    shown = looks(table["method"])
    panels = (
        ("points", "accuracy", "test accuracy (%)"),
        ("gap", "gap to full fine-tuning", "points"),
        ("log_steps", "convergence", "steps to 95 %"),
    )
    for ax, (what, title, label) in zip(axes.flat, panels, strict=False):
        ends = []
        for name, look in shown.items():
            line = curves[(curves["what"] == what) & (curves["method"] == name)]
            if what == "gap" and name == REFERENCE:
                continue
            values = 10 ** line["value"] if what == "log_steps" else line["value"]
            ax.plot(line["parameters"], values, color=look.color, marker=look.marker, markersize=3)
            name_shown = look.label.removesuffix(" fine-tuning")
            ends.append((line["parameters"].iloc[-1], values.iloc[-1], name_shown, look.color))
        _by_log_size(ax, title, label)
        if what == "gap":
            ax.axhline(0, color=INK, linewidth=0.8, zorder=0)
        end_labels(ax, ends, 0.09)
    spread = curves[curves["what"] == "spread"]
    ax = axes[1, 1]
    for size, low, high in zip(spread["parameters"], spread["low"], spread["high"], strict=True):
        ax.plot([size, size], [low, high], color=INK, marker="_", markersize=5)
    ax.plot(spread["parameters"], spread["value"], "D-", color="#0072B2", markersize=4)
    _by_log_size(ax, "spread of placements", "variance (points²)")
    ax.axhline(0, color=INK, linewidth=0.8, zorder=0)
    letter(axes.flat)
    return figure


def caption(table: pd.DataFrame) -> str:
    """What ten times as many parameters do to the gap, and how it was measured."""
    shown, first = looks(table["method"]), table.iloc[0]
    deltas = [name for name in shown if name != REFERENCE]
    told = [
        f"{shown[name].label} {slope(table, 'gap', name).text(sign='+')}"
        for name in deltas
        if name not in PLACEMENTS
    ]
    sizes = table.drop_duplicates("model")["parameters"]
    return (
        f"Ten times as many parameters move the gap to full fine-tuning by {joined(told)} points, "
        f"and the variance over placements by {spread_slope(table).text(sign='+')}. {TITLE}: "
        f"{len(sizes)} encoders of one recipe with {sizes.min() / 1e6:.2g} to "
        f"{sizes.max() / 1e6:.2g} million parameters, each pre-trained once, wider ones deeper, "
        f"{first['steps']} updates of "
        f"{first['batch_size']} rows, {counted(table['task'].nunique(), 'task')} of as many "
        "corpora, "
        f"{counted(table['seed'].nunique(), 'seed')}, each method at a rate that validation rows "
        "chose for "
        "its size. Lines are means over tasks. (a) Points of test accuracy. (b) Points above full "
        "fine-tuning. (c) Updates until 95 % of the way from the majority's accuracy to the last "
        f"one, geometric mean. (d) Variance over "
        f"{joined([shown[name].label for name in PLACEMENTS])}, less that over seeds, mean over "
        "tasks with its 95 % interval, drawn from tasks. Intervals are those of tasks: what "
        "another pre-training of these models would change is not in them."
    )


def agreement(table: pd.DataFrame) -> list[Agreement]:
    """What the source says of scale beside ours; its slopes are not published as numbers."""
    shown, found = looks(table["method"]), []
    for name in PUBLISHED:
        label = shown[name].label
        text = f"{label} is more accurate on larger models (points per ten times the parameters)"
        found.append(_signed("scale, accuracy", text, 1.0, slope(table, "points", name)))
        text = f"{label} converges faster on larger models (log10 of steps)"
        found.append(_signed("scale, convergence", text, -1.0, slope(table, "log_steps", name)))
    text = "larger models close the gap between LoRA and full fine-tuning"
    found.append(_signed("scale, gap", text, 1.0, slope(table, "gap", "lora")))
    text = "which parameters are trained matters less in larger models (points²)"
    found.append(_signed("scale, placement", text, -1.0, spread_slope(table)))
    return found


def _signed(row: str, text: str, side: float, ours: Estimate) -> Agreement:
    """A sign without a published size."""
    return replace(
        same_side(row, text, side, ours, digits=2), published="above 0" if side > 0 else "below 0"
    )


def slope(table: pd.DataFrame, what: str, name: str) -> Estimate:
    """Per ten times as many parameters, of points, gap or log₁₀ steps of a method."""
    values = {model: v for (model, other), v in _by_size(table, what).items() if other == name}
    return _slope(table, pd.DataFrame(values))


def spread_slope(table: pd.DataFrame) -> Estimate:
    """The same of the spread of placements."""
    return _slope(table, _spreads(table))


def _slope(table: pd.DataFrame, values: pd.DataFrame) -> Estimate:
    """Least squares of the columns' means in log₁₀ of the sizes, one column a model."""
    sizes = table.groupby("model", sort=False)["parameters"].median()
    x = np.log10([float(sizes[str(model)]) for model in values])
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return _clusters(table).of_means(values, lambda means: means @ weights)


def _by_size(table: pd.DataFrame, what: str) -> dict[tuple[str, str], pd.Series]:
    """By model and method, a number a task: the mean over seeds."""
    frame = table.assign(log_steps=np.log10(table["steps_95"]))
    if what == "gap":
        full = frame[frame["method"] == REFERENCE].set_index(["model", "task", "seed"])["points"]
        keys = [tuple(k) for k in frame[["model", "task", "seed"]].to_numpy()]
        frame["gap"] = frame["points"] - full.loc[keys].to_numpy()
    found = {}
    for (model, name), rows in frame.groupby(["model", "method"], sort=False):
        means = rows.groupby("task")[what].mean()
        found[str(model), str(name)] = means.loc[_tasks(table)]
    return found


def _spreads(table: pd.DataFrame) -> pd.DataFrame:
    """The spread of placements in points²: a row a task, a column a model."""
    own = table[table["method"].isin(PLACEMENTS)]
    cells = own.groupby(["model", "task", "method"], sort=False)["points"]
    means, variances, counts = cells.mean(), cells.var(), cells.count()
    between = means.groupby(["model", "task"], sort=False).var()
    noise = (variances / counts).fillna(0.0).groupby(["model", "task"], sort=False).mean()
    wide = (between - noise).unstack("model")
    return wide.loc[_tasks(table), list(dict.fromkeys(table["model"]))]


def _tasks(table: pd.DataFrame) -> list[str]:
    return [task for task in TASKS if task in set(table["task"])]


def _clusters(table: pd.DataFrame) -> Clusters:
    """Every task is a corpus of its own."""
    return Clusters(_tasks(table))


def _by_log_size(ax: Axes, title: str, label: str) -> None:
    ax.set_xscale("log")
    ax.set(title=title, ylabel=label, xlabel="parameters")
