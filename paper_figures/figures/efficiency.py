"""Memory, time and stored bytes of a training, by batch size, length and model.

Memory is what the process took at most beyond what it had before the training: gradients, the
optimiser's state, what the backward pass needs, and copies of weights. Stored bytes are those of
the controls in float32, the head's included.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.agreement import Agreement, on_side
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates
from deltacontrol.paper_figures.clusters import Estimate
from deltacontrol.paper_figures.marks import by_method, joined, letter, looks, method, number
from deltacontrol.theory.errors import InputError

TITLE = "What a training costs"
STUDY = "efficiency"

KEYS = ("parameters", "batch_size", "max_length")
SETTING = ("model", "batch_size", "max_length")
REFERENCE = "full"
# Ding et al., Nature Machine Intelligence 5, 2023, abstract: optimising a small part of the
# parameters cuts down computation and storage costs.
PUBLISHED = {
    "seconds": "deltas cut down computation (time of an update over that of full fine-tuning)",
    "stored_mb": "deltas cut down storage (bytes of what is trained, over those of all)",
}
BYTES = 4


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run."""
    labels = [_setting(record) for record in records]
    check_replicates(records, labels)
    rows = []
    for record, (model, batch, length, name) in zip(records, labels, strict=True):
        result = record.result
        if result.get("copies_trained_together", 1) > 1:
            raise InputError(
                f"run {record.id} shared its passes with others, so that its time and its memory "
                "are not those of one training; run it alone"
            )
        peak, before = (number(result[f"{n}_memory_bytes"]) for n in ("peak", "baseline"))
        rows.append(
            {
                "model": model,
                "parameters": result["num_total"],
                "batch_size": batch,
                "max_length": length,
                "method": name,
                "seed": record.config["seed"],
                "memory_mb": (peak - before) / 1e6,
                "seconds": number(result["seconds_per_step"]),
                "stored_mb": BYTES * result["num_trainable"] / 1e6,
                "steps": record.config["steps"],
                "run": record.id,
            }
        )
    return by_method(pd.DataFrame(rows), [*KEYS, "method", "seed"])


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """Means over seeds by setting and method."""
    keys = ["model", "parameters", "batch_size", "max_length", "method"]
    means = table(records).groupby(keys, sort=False)[["memory_mb", "seconds", "stored_mb"]].mean()
    return means.reset_index()


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method at the middle setting."""
    own = _middle(table)
    rows = []
    for name, look in looks(own["method"]).items():
        runs = own[own["method"] == name]
        row = {
            "method": look.label,
            "memory (MB)": f"{runs['memory_mb'].mean():.0f}",
            "s/step": f"{runs['seconds'].mean():.3g}",
            "stored (MB)": f"{runs['stored_mb'].iloc[0]:.3g}",
        }
        if name != REFERENCE:
            row |= {
                "memory, of full": ratio(table, name, "memory_mb").text(2),
                "time, of full": ratio(table, name, "seconds").text(2),
            }
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Memory and time against batch size, length and model."""
    middle = _middle(table).iloc[0]
    own = {n: curves[n] == middle[n] for n in ("model", "batch_size", "max_length")}
    panels = [
        ("batch_size", "rows of a batch", own["model"] & own["max_length"]),
        ("max_length", "tokens of a text", own["model"] & own["batch_size"]),
        ("parameters", "parameters of the model", own["batch_size"] & own["max_length"]),
    ]
    panels = [p for p in panels if curves.loc[p[2], p[0]].nunique() > 1]
    figure = Figure(figsize=(PAGE_WIDTH, 4.2), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False, sharex="col", sharey="row")
    shown = looks(curves["method"])
    for column, (x, label, mask) in enumerate(panels):
        for row, (y, title) in enumerate((("memory_mb", "memory"), ("seconds", "time"))):
            _draw_lines(axes[row, column], curves[mask], x, y)
            axes[row, column].set_title(title)
        axes[1, column].set_xlabel(label)
    axes[0, 0].set_ylabel("memory beyond the model (MB)")
    axes[1, 0].set_ylabel("seconds a step")
    letter(axes.flat)
    handles = [axes[0, 0].lines[i] for i in range(len(shown))]
    names = [look.label for look in shown.values()]
    figure.legend(handles, names, loc="outside upper center", ncols=4)
    return figure


def caption(table: pd.DataFrame) -> str:
    """What deltas save against full fine-tuning, and how it was measured."""
    shown, first = looks(table["method"]), _middle(table).iloc[0]
    deltas = [name for name in shown if name != REFERENCE]
    memory = {name: ratio(table, name, "memory_mb") for name in deltas}
    time = {name: ratio(table, name, "seconds") for name in deltas}
    least = min(deltas, key=lambda name: memory[name].value)
    told = [
        f"{shown[name].label} {memory[name].value:.2f} and {time[name].value:.2f}"
        for name in deltas
    ]
    return (
        f"{shown[least].label} takes {memory[least].text(2)} of the memory of full fine-tuning and "
        f"{time[least].text(2)} of its time (geometric mean, least and largest of the settings). "
        f"{TITLE}: medians of the updates after the fifth, of {first['steps']}; where nothing "
        f"else is said {first['model']}, batches of {first['batch_size']} texts of "
        f"{first['max_length']} tokens, on one machine. Memory is what the process took at most "
        "beyond "
        f"the model. Memory and time over those of full fine-tuning: {joined(told)}."
    )


def agreement(table: pd.DataFrame) -> list[Agreement]:
    """What the source says of costs, beside the ratios of all deltas in all settings."""
    deltas = [name for name in looks(table["method"]) if name != REFERENCE]
    found = []
    for what, says in PUBLISHED.items():
        ratios = pd.concat([_ratios(table, name, what) for name in deltas])
        ours = _spanned(ratios)
        row = f"efficiency, {len(deltas)} deltas in up to {len(_settings(table))} settings"
        agrees = on_side(ours, 1.0, above=False)
        told = f"{ours.value:.2g} [{ours.low:.2g}, {ours.high:.2g}]"
        found.append(Agreement(row, says, "below 1", told, agrees))
    return found


def ratio(table: pd.DataFrame, name: str, what: str) -> Estimate:
    """Of a method over full fine-tuning: geometric mean, least and largest over the settings.

    Raises:
        InputError: a number is not positive, so that nothing was measured there.
    """
    return _spanned(_ratios(table, name, what))


def _ratios(table: pd.DataFrame, name: str, what: str) -> pd.Series:
    """By setting, where both were measured."""
    means = table.groupby([*SETTING, "method"])[what].mean().unstack("method")
    own = means[[name, REFERENCE]]
    if (own <= 0).any(axis=None):
        where = own.index[(own <= 0).any(axis=1)][0]
        raise InputError(
            f"{what} at {where} is not above 0 for {name} or {REFERENCE}: the process had freed as "
            "much before; measure these runs again"
        )
    return (own[name] / own[REFERENCE]).dropna()


def _spanned(ratios: pd.Series) -> Estimate:
    """Geometric mean, least and largest."""
    mean = float(np.exp(np.log(ratios).mean()))
    return Estimate(mean, float(ratios.min()), float(ratios.max()))


def _settings(table: pd.DataFrame) -> pd.DataFrame:
    return table[list(SETTING)].drop_duplicates()


def _middle(table: pd.DataFrame) -> pd.DataFrame:
    """The setting that most others differ from in one thing only."""
    settings = _settings(table)
    shared = [int(((settings == row).sum(axis=1) == 2).sum()) for _, row in settings.iterrows()]
    chosen = settings.iloc[int(np.argmax(shared))]
    return table[(table[list(SETTING)] == chosen).all(axis=1)]


def _setting(record: Record) -> tuple[str, int, int, str]:
    config = record.config
    name = method(config["deltas"])
    return str(config["model"]), int(config["batch_size"]), int(config["max_length"]), name


def _draw_lines(ax: Axes, rows: pd.DataFrame, x: str, y: str) -> None:
    for name, look in looks(rows["method"]).items():
        line = rows[rows["method"] == name].sort_values(x)
        ax.plot(line[x], line[y], color=look.color, marker=look.marker, markersize=3.5)
    ax.set(xscale="log", yscale="log")
    ticks = sorted(set(rows[x]))
    names = [f"{value / 1e6:.0f}M" if value >= 1e6 else f"{value:g}" for value in ticks]
    ax.set_xticks(ticks, names)
    ax.xaxis.set_minor_locator(NullLocator())
