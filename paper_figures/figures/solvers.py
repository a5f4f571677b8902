"""Solver convergence: one LoRA fine-tuning, loss and stationarity against work and time.

Four panels: how far J is above the lowest J that any solver reached from the same seed, and the
residual (Σ_t ‖∇_u H_t‖²)^½; each against gradients spent and against processor seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates, groups
from deltacontrol.paper_figures.marks import joined, letter, number

TITLE = "Solver convergence on one fine-tuning as an optimal-control problem"
STUDY = "solvers"

KEYS = ["solver", "seed"]
NAMES = {
    "newton-cg": "Newton-CG",
    "gauss-newton": "Gauss-Newton",
    "lbfgs": "shooting (L-BFGS)",
    "adamw": "AdamW",
    "msa": "MSA (gradient step)",
}
COLORS = {
    "newton-cg": "#0072B2",
    "gauss-newton": "#009E73",
    "lbfgs": "#D55E00",
    "adamw": "#CC79A7",
    "msa": "#8C8C8C",
}
STYLES = {
    "newton-cg": "-",
    "gauss-newton": (0, (5, 1.5)),
    "lbfgs": (0, (3, 1, 1, 1)),
    "adamw": (0, (1.2, 1.2)),
    "msa": (0, (7, 2, 1, 2)),
}
MARKERS = {"newton-cg": "o", "gauss-newton": "s", "lbfgs": "^", "adamw": "D", "msa": "v"}


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run: where it ended, and the rate that was chosen for it."""
    check_replicates(records, [record.config["solver"] for record in records])
    rows = []
    for record in records:
        result, config = record.result, record.config
        rows.append(
            {
                "solver": str(config["solver"]),
                "seed": int(config["seed"]),
                "objective": number(result["objective"]),
                "residual": number(result["residual"]),
                "iterations": int(result["iterations"]),
                "gradients": number(result["gradients"]),
                "seconds": number(result["seconds"]),
                "rate": number(result.get("rate")),
                "given_up": _given_up(result.get("search", [])),
                "budget": config["gradients"],
                "num_controls": result["num_controls"],
                "num_examples": config["num_examples"],
                "max_length": config["max_length"],
                "weight_decay": config["weight_decay"],
                "model": str(config["model"]),
                "status": result.get("status", record.status),
                "run": record.id,
            }
        )
    frame = pd.DataFrame(rows)
    lowest = frame.groupby("seed")["objective"].transform("min")
    frame["gap"] = frame["objective"] - lowest
    return _ordered(frame, KEYS)


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """One row per iterate; the gap is J minus the lowest J of any solver from the same seed."""
    frames = []
    for record in records:
        curve = record.curve()
        columns = ["iteration", "gradients", "seconds", "objective", "residual"]
        frames.append(
            curve[columns].assign(
                solver=str(record.config["solver"]), seed=int(record.config["seed"])
            )
        )
    lines = pd.concat(frames)
    lines["gap"] = lines["objective"] - lines.groupby("seed")["objective"].transform("min")
    return _ordered(lines[[*KEYS, *columns, "gap"]], [*KEYS, "iteration"])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per solver: medians over seeds, with the range of the residual."""
    rows = []
    for (solver,), runs in groups(table, ["solver"]):
        low, high = runs["residual"].min(), runs["residual"].max()
        rates = sorted(runs["rate"].dropna().unique())
        rows.append(
            {
                "solver": _name(solver),
                "seeds": str(runs["seed"].nunique()),
                "iterations": f"{runs['iterations'].median():.0f}",
                "gradients": f"{runs['gradients'].median():.0f}",
                "seconds": f"{runs['seconds'].median():.0f}",
                "J above lowest": f"{runs['gap'].median():.1e}",
                "residual": f"{runs['residual'].median():.1e} ({low:.1e} to {high:.1e})",
                "chosen rate": ", ".join(f"{rate:g}" for rate in rates) or "none",
                "status": joined(sorted(runs["status"].unique())),
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Rows: gap and residual. Columns: gradients and seconds."""
    figure = Figure(figsize=(PAGE_WIDTH, 4.6), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for row, quantity in zip(axes, ("gap", "residual"), strict=True):
        for ax, cost in zip(row, ("gradients", "seconds"), strict=True):
            _draw_lines(ax, curves, cost, quantity)
    axes[0, 0].set_ylabel("$J$ − lowest $J$")
    axes[1, 0].set_ylabel(r"residual $(\sum_t \|\nabla_u H_t\|^2)^{1/2}$")
    axes[1, 0].set_xlabel("work, in gradients")
    axes[1, 1].set_xlabel("processor seconds, one thread")
    titles = ("objective against work", "objective against time")
    titles += ("residual against work", "residual against time")
    for ax, title in zip(axes.flat, titles, strict=True):
        ax.set_title(title, loc="left")
    letter(axes.flat)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    return figure


def caption(table: pd.DataFrame) -> str:
    """What was solved, how work and time are counted, and where each solver ended."""
    first, seeds = table.iloc[0], table["seed"].nunique()
    lines = f"thick lines are seed {table['seed'].min()}, thin ones the others; " * (seeds > 1)
    sentences = [
        f"{TITLE}: LoRA and the head of {first['model']} ({first['num_controls']:,} controls) on "
        f"{first['num_examples']} fixed examples of at most {first['max_length']} tokens, weight "
        f"decay {first['weight_decay']:g}, float64, {seeds} seed{'s' * (seeds > 1)} "
        f"({lines}the budget is {first['budget']} gradients). One gradient is a sweep forward and "
        "one backward; a Gauss-Newton product counts one gradient, a product with the Hessian one "
        "and a half, a rejected trial a half. Every run has one thread, and time is that of the "
        "processor."
    ]
    tuned = []
    for (solver,), runs in groups(table.dropna(subset=["rate"]), ["solver"]):
        chosen = joined([f"{rate:g}" for rate in sorted(runs["rate"].unique())])
        given_up = sorted(
            {r for text in runs["given_up"] for r in text.split() if r != "-"}, key=float
        )
        tuned.append(f"{_name(solver)} {chosen} ({joined(given_up or ['none'])} given up)")
    if tuned:
        sentences.append(
            "Rates are the largest of those tried at which J never rose to twice its lowest, over "
            f"the seeds: {'; '.join(tuned)}."
        )
    for (solver,), runs in groups(table, ["solver"]):
        converged = int((runs["status"] == "converged").sum())
        ends = f", converged from {converged} of {len(runs)} seeds" if converged else ""
        gap = runs["gap"].median()
        above = f"J {gap:.0e} above the lowest" if gap > 0 else "the lowest J"
        medians = " (medians)" * (len(runs) > 1)
        sentences.append(
            f"{_name(solver)}: residual {runs['residual'].median():.0e} and {above}{medians} after "
            f"{runs['iterations'].median():.0f} iterations{ends}."
        )
    return " ".join(sentences)


def _given_up(search: Sequence[Mapping[str, Any]]) -> str:
    """The rates that became unstable, separated by spaces, or a dash."""
    return " ".join(f"{t['rate']:g}" for t in search if t["status"] == "unstable") or "-"


def _name(solver: str) -> str:
    return NAMES.get(solver, solver)


def _ordered(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    present = set(frame["solver"])
    known = [s for s in NAMES if s in present] + sorted(present - set(NAMES))
    order = {name: index for index, name in enumerate(known)}
    return frame.sort_values(
        keys, key=lambda column: column.map(order) if column.name == "solver" else column
    ).reset_index(drop=True)


def _evenly(cost: np.ndarray, count: int = 8) -> list[int]:
    """Indices at which a logarithmic axis is met at about equal distances."""
    if not len(cost):
        return []
    wanted = np.geomspace(cost[0], cost[-1], count)
    return sorted({int(np.abs(np.log(cost / value)).argmin()) for value in wanted})


def _draw_lines(ax: Axes, curves: pd.DataFrame, cost: str, quantity: str) -> None:
    first_seed = curves["seed"].min()
    for (solver, seed), line in groups(curves, KEYS):
        shown = line[(line[quantity] > 0) & (line[cost] > 0)]  # a logarithm has no zero
        first = seed == first_seed
        ax.plot(
            shown[cost].to_numpy(),
            shown[quantity].to_numpy(),
            color=COLORS.get(solver, "#555555"),
            linestyle=STYLES.get(solver, "-"),
            linewidth=1.5 if first else 0.6,
            alpha=1.0 if first else 0.55,
            marker=MARKERS.get(solver, "x"),
            markevery=_evenly(shown[cost].to_numpy()),
            markersize=3.5 if first else 0,
            label=_name(solver) if first else None,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(numticks=8))
    ax.yaxis.set_minor_locator(NullLocator())
