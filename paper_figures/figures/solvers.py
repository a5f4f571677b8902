"""Solver convergence: one LoRA fine-tuning, loss and stationarity against work and time.

Four panels: how far J is above the lowest J that any solver reached from the same seed, and the
residual (Σ_t ‖∇_u H_t‖²)^½; each against gradients spent and against processor seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates, groups
from deltacontrol.paper_figures.marks import end_labels, joined, letter, number

TITLE = "Solver convergence on one fine-tuning as an optimal-control problem"
STUDY = "solvers"

KEYS = ["solver", "seed"]
COSTS = ("gradients", "seconds")
QUANTITIES = ("gap", "residual")
BINS = 10  # of the logarithm of cost, a decade
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


def iterates(records: Sequence[Record]) -> pd.DataFrame:
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


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """Median and middle four fifths of the iterates of all seeds, in bins of the logarithm of cost.

    What is zero has no place on a logarithmic axis, and is left out.
    """
    rows = []
    for (solver,), lines in groups(iterates(records), ["solver"]):
        for cost, quantity in itertools.product(COSTS, QUANTITIES):
            shown = lines[(lines[quantity] > 0) & (lines[cost] > 0)]
            place = np.floor(BINS * np.log10(shown[cost]))
            for _, found in shown.groupby(place):
                low, middle, high = found[quantity].quantile([0.1, 0.5, 0.9])
                rows.append(
                    {
                        "solver": solver,
                        "cost": cost,
                        "quantity": quantity,
                        "at": float(np.exp(np.log(found[cost]).mean())),
                        "low": low,
                        "median": middle,
                        "high": high,
                    }
                )
    return pd.DataFrame(rows)


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
    for row, quantity in zip(axes, QUANTITIES, strict=True):
        for ax, cost in zip(row, COSTS, strict=True):
            chosen = (curves["cost"] == cost) & (curves["quantity"] == quantity)
            _draw_lines(ax, curves[chosen])
    axes[0, 0].set_ylabel("$J$ − lowest $J$")
    axes[1, 0].set_ylabel(r"residual $(\Sigma_t \|\nabla_u H_t\|^2)^{1/2}$")
    axes[1, 0].set_xlabel("work, in gradients")
    axes[1, 1].set_xlabel("processor seconds, one thread")
    titles = ("objective by work", "objective by time", "residual by work", "residual by time")
    for ax, title in zip(axes.flat, titles, strict=True):
        ax.set_title(title, loc="left")
    letter(axes.flat)
    for ax, quantity in zip(axes[:, 1], QUANTITIES, strict=True):
        chosen = curves[(curves["cost"] == COSTS[1]) & (curves["quantity"] == quantity)]
        lasts = [(solver, line.iloc[-1]) for (solver,), line in groups(chosen, ["solver"])]
        ends = [(row["at"], row["median"], _name(s), _color(s)) for s, row in lasts]
        end_labels(ax, ends)
    band = Patch(facecolor="#BBBBBB", label=f"middle 80 % of the iterates of {_seeds(table)}")
    line = Line2D([], [], color="#333333", label="median")
    figure.legend(handles=[line, band], loc="outside lower center", ncols=2)
    return figure


def caption(table: pd.DataFrame) -> str:
    """Who ends lowest, what was solved, how work and time are counted, where each solver ended."""
    first = table.iloc[0]
    medians = table.groupby("solver", sort=False)["residual"].median().sort_values(kind="stable")
    best, worst = medians.index[0], medians.index[-1]
    sentences = [
        f"Of {len(medians)} solvers with {first['budget']} gradients each, {_name(best)} ends at "
        f"the lowest residual, {medians.iloc[0]:.0e}, and {_name(worst)} at the highest, "
        f"{medians.iloc[-1]:.0e} (medians of {_seeds(table)}).",
        f"{TITLE}: LoRA and the head of {first['model']} ({first['num_controls']:,} controls) on "
        f"{first['num_examples']} fixed examples of at most {first['max_length']} tokens, weight "
        f"decay {first['weight_decay']:g}, float64. Lines: medians of the iterates of "
        f"{_seeds(table)} within bins of the cost, {BINS} a decade; bands: their middle 80 %. One "
        "gradient is a sweep forward and one backward; a Gauss-Newton product counts one "
        "gradient, a product with the Hessian one and a half, a rejected trial a half. Every run "
        "has one thread, and time is that of the processor.",
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
        over = " (medians)" * (len(runs) > 1)
        sentences.append(
            f"{_name(solver)}: residual {runs['residual'].median():.0e} and {above}{over} after "
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


def _color(solver: str) -> str:
    return COLORS.get(solver, "#555555")


def _seeds(table: pd.DataFrame) -> str:
    count = table["seed"].nunique()
    return f"{count} seed{'s' * (count > 1)}"


def _draw_lines(ax: Axes, lines: pd.DataFrame) -> None:
    for (solver,), line in groups(lines, ["solver"]):
        at, low, middle, high = (line[c].to_numpy() for c in ("at", "low", "median", "high"))
        ax.fill_between(at, low, high, color=_color(solver), alpha=0.2, linewidth=0)
        ax.plot(
            at,
            middle,
            color=_color(solver),
            linestyle=STYLES.get(solver, "-"),
            linewidth=1.4,
            marker=MARKERS.get(solver, "x"),
            markevery=5,
            markersize=3.2,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(numticks=8))
    ax.yaxis.set_minor_locator(NullLocator())
