"""Pontryagin's stationarity along training: ‖∇_u H_t‖ and ‖p_{t+1}‖, layer by layer.

H_t(x, u, p) = ℓ_t(x, u) + ⟨p, f_t(x, u)⟩. Four panels: the residual of each stage for each of two
optimisers; how far J is above the lowest J reached; costate norms at the start and at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates, groups
from deltacontrol.paper_figures.marks import end_labels, joined, letter, looks, method
from deltacontrol.theory.errors import InputError

TITLE = "Stationarity of the discrete Pontryagin conditions along the training of a delta"
STUDY = "pontryagin"

KEYS = ["delta", "optimiser", "seed"]
OPTIMISERS = {"lbfgs": "L-BFGS", "adamw": "AdamW"}
COLORS = {"lbfgs": "#0072B2", "adamw": "#D55E00"}
SMOOTH = 0.03  # share of the iterations that a drawn residual is averaged over
MARKERS = {"lbfgs": "o", "adamw": "^"}


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run and stage: residual and costate norm at the first and last iteration."""
    check_replicates(records, [_key_of(record)[:2] for record in records])
    rows = []
    for record in records:
        curve, result = record.curve(), record.result
        first, last = curve.iloc[0], curve.iloc[-1]
        for position, stage in enumerate(result["stages"]):
            rows.append(
                {
                    **dict(zip(KEYS, _key_of(record), strict=True)),
                    "position": position,
                    "stage": stage,
                    "residual_start": first.get(f"residual_{stage}", np.nan),
                    "residual_end": last.get(f"residual_{stage}", np.nan),
                    "costate_start": first.get(f"costate_{stage}", np.nan),
                    "costate_end": last.get(f"costate_{stage}", np.nan),
                    "total_start": first["residual"],
                    "total_end": last["residual"],
                    "objective_start": first["objective"],
                    "objective_end": last["objective"],
                    "iterations": int(last["iteration"]),
                    "identity_relative_difference": result["identity_relative_difference"],
                    "status": result.get("status", record.status),
                    "run": record.id,
                }
            )
    return _ordered(pd.DataFrame(rows), [*KEYS, "position"])


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """Residual per stage (position -1 is the total), smoothed, and gap of J, a row per iteration.

    The gap is J minus the lowest J that any optimiser reached for the same delta and seed.
    """
    frames = []
    for record in records:
        curve = record.curve()
        columns = {"total": "residual"} | {s: f"residual_{s}" for s in record.result["stages"]}
        for position, (stage, column) in enumerate(columns.items(), start=-1):
            if column in curve:
                frame = curve[["iteration", "objective"]].assign(
                    **dict(zip(KEYS, _key_of(record), strict=True)),
                    position=position,
                    stage=stage,
                    residual=curve[column],
                    smooth=_smoothed(curve[column]),
                )
                frames.append(frame)
    lines = pd.concat(frames)
    lines["gap"] = lines["objective"] - lines.groupby(["delta", "seed"])["objective"].transform(
        "min"
    )
    measured = ["residual", "smooth", "objective", "gap"]
    ordered = lines[[*KEYS, "position", "stage", "iteration", *measured]]
    return _ordered(ordered, [*KEYS, "position", "iteration"])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per run: how far each optimiser came, and the identity of claim 1."""
    runs = table.drop_duplicates("run")
    return pd.DataFrame(
        {
            "delta": [looks([name])[name].label for name in runs["delta"]],
            "optimiser": [_name(optimiser) for optimiser in runs["optimiser"]],
            "seed": runs["seed"].astype(str),
            "iterations": runs["iterations"].astype(str),
            "J at start": runs["objective_start"].map("{:.4g}".format),
            "J at end": runs["objective_end"].map("{:.4g}".format),
            "residual at start": runs["total_start"].map("{:.2e}".format),
            "residual at end": runs["total_end"].map("{:.2e}".format),
            "claim 1: relative difference": runs["identity_relative_difference"].map(
                "{:.1e}".format
            ),
            "status": runs["status"],
        }
    )


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Two rows of two panels per delta."""
    deltas = list(table["delta"].unique())
    optimisers = _optimisers(table)
    if len(optimisers) > 2:
        raise InputError(f"pontryagin compares two optimisers; the records have {optimisers}")
    stages = _stages(table)
    figure = Figure(figsize=(PAGE_WIDTH, 0.4 + 3.75 * len(deltas)), layout="constrained")
    axes = figure.subplots(2 * len(deltas), 2, squeeze=False)
    for index, delta in enumerate(deltas):
        of_delta = curves[curves["delta"] == delta]
        top, bottom = axes[2 * index], axes[2 * index + 1]
        title = "" if len(deltas) == 1 else f"{looks([delta])[delta].label}, "
        top[1].sharey(top[0])
        for ax, optimiser in zip(top, optimisers, strict=False):
            _draw_residuals(ax, of_delta[of_delta["optimiser"] == optimiser], len(stages))
            ax.set_title(f"{title}{_name(optimiser)}: residuals")
        for ax in top[len(optimisers) :]:
            ax.set_visible(False)
        _draw_gaps(bottom[0], of_delta, title)
        _draw_costates(bottom[1], table[table["delta"] == delta], title)
        _add_scale(figure, top, stages)
    letter(ax for ax in axes.flat if ax.get_visible())
    figure.legend(handles=_key(table), loc="outside upper center", ncols=3)
    return figure


def caption(table: pd.DataFrame) -> str:
    """What fell by how much; the identity of claim 1, from the records."""
    runs = table.drop_duplicates("run")
    worst = runs["identity_relative_difference"].max()
    identity = f"differ by at most {worst:.1e} (relative)" if worst else "are equal to the last bit"
    seeds = runs["seed"].nunique()
    falls, states = [], []
    for (delta, optimiser), of_pair in groups(runs, ["delta", "optimiser"]):
        name = f"{_name(optimiser)} on {looks([delta])[delta].label}"
        factor = (of_pair["total_end"] / of_pair["total_start"]).median()
        falls.append(f"{factor:.0e} ({name})")
        states.append(
            f"{name}: at most {of_pair['iterations'].max()} iterations, status "
            f"{joined(sorted(of_pair['status'].unique()))}"
        )
    over = f", mean and range over {seeds} seeds" if seeds > 1 else ""
    return " ".join([
        f"Training multiplies the Pontryagin residual by {joined(falls)}.",
        f"{TITLE}. Upper panels: ‖∇_u H_t‖ of each stage t, and of all stages together (black), "
        f"smoothed by a running geometric mean over {100 * SMOOTH:g} % of the iterations"
        f"{'; thin grey lines are the totals of other seeds' if seeds > 1 else ''}. Lower left: "
        "objective above the lowest J that either optimiser reached from the same seed. Lower "
        f"right: costate norms ‖p_{{t+1}}‖ before and after training{over}. Claim 1: in float64, "
        f"∇_u H_t along the costates and the gradient of J {identity}, over {len(runs)} runs.",
        f"{'; '.join(states)}.",
    ])  # fmt: skip


def _key_of(record: Record) -> tuple[str, str, int]:
    config = record.config
    deltas = config["deltas"] if "deltas" in config else [config["delta"]]
    return method(deltas), str(config["optimiser"]), int(config["seed"])


def _smoothed(residual: pd.Series) -> pd.Series:
    """The running geometric mean; what is zero stays away."""
    window = max(1, round(SMOOTH * len(residual)))
    logs = np.log(residual.where(residual > 0))
    return np.exp(logs.rolling(window, center=True, min_periods=1).mean())


def _key(table: pd.DataFrame) -> list[Line2D]:
    """All stages together, then each optimiser before and after."""
    made = [Line2D([], [], color="black", linewidth=1.6, label="all stages together")]
    if table["seed"].nunique() > 1:
        made.append(Line2D([], [], color="#999999", linewidth=0.6, label="other seeds"))
    for optimiser in _optimisers(table):
        color, marker = COLORS.get(optimiser, "#009E73"), MARKERS.get(optimiser, "s")
        for when, face in (("before", "white"), ("after", color)):
            style = {"linestyle": "", "markerfacecolor": face}
            label = f"costates {when} {_name(optimiser)}"
            made.append(Line2D([], [], color=color, marker=marker, label=label, **style))
    return made


def _ordered(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    order = {name: index for index, name in enumerate(_optimisers(frame))}
    return frame.sort_values(
        keys, key=lambda column: column.map(order) if column.name == "optimiser" else column
    ).reset_index(drop=True)


def _name(optimiser: str) -> str:
    return OPTIMISERS.get(optimiser, optimiser)


def _optimisers(table: pd.DataFrame) -> list[str]:
    present = set(table["optimiser"])
    return [o for o in OPTIMISERS if o in present] + sorted(present - set(OPTIMISERS))


def _stages(table: pd.DataFrame) -> list[str]:
    stages = table.drop_duplicates("position").sort_values("position")["stage"]
    short = {"input": "in", "readout": "out"}
    return [short.get(str(stage), str(stage).removeprefix("block.")) for stage in stages]


def _palette(num_stages: int) -> ListedColormap:
    # Viridis without its pale end, which vanishes on white.
    return ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.92, num_stages)))


def _draw_residuals(ax: Axes, curves: pd.DataFrame, num_stages: int) -> None:
    palette = _palette(num_stages)
    first = curves["seed"].min()
    for (seed, position), line in groups(curves, ["seed", "position"]):
        positive = line[line["smooth"] > 0]  # a stage without controls has residual zero
        iteration, residual = positive["iteration"].to_numpy(), positive["smooth"].to_numpy()
        if seed == first and position >= 0:
            ax.plot(iteration, residual, color=palette(int(position)), linewidth=1.0)
        elif seed == first:
            ax.plot(iteration, residual, color="black", linewidth=1.6, zorder=4)
        elif position < 0:
            ax.plot(iteration, residual, color="#999999", linewidth=0.6, zorder=1)
    ax.set_yscale("log")
    ax.set_xlabel("iteration")
    ax.set_ylabel(r"$\|\nabla_u H_t\|$")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.yaxis.set_major_locator(LogLocator(numticks=7))


def _add_scale(figure: Figure, axes: Sequence[Axes], stages: list[str]) -> None:
    from matplotlib.cm import ScalarMappable

    norm = BoundaryNorm(np.arange(len(stages) + 1) - 0.5, len(stages))
    scale = ScalarMappable(norm, _palette(len(stages)))
    step = -(-len(stages) // 12)
    ticks = range(0, len(stages), step)
    bar = figure.colorbar(scale, ax=list(axes), ticks=list(ticks), pad=0.01, aspect=25)
    bar.ax.set_yticklabels([stages[tick] for tick in ticks])
    bar.ax.tick_params(length=0)
    bar.set_label("stage $t$")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _draw_gaps(ax: Axes, curves: pd.DataFrame, title: str) -> None:
    totals = curves[curves["position"] < 0]
    ends = []
    for (optimiser, seed), line in groups(totals, ["optimiser", "seed"]):
        positive = line[line["gap"] > 0]  # the lowest point of all has no logarithm
        first = seed == totals["seed"].min()
        at, gap = positive["iteration"].to_numpy(), positive["gap"].to_numpy()
        color = COLORS.get(optimiser, "#009E73")
        style = {"linestyle": "-" if optimiser == "lbfgs" else "--"}
        style |= {"linewidth": 1.2, "alpha": 1.0} if first else {"linewidth": 0.6, "alpha": 0.6}
        ax.plot(at, gap, color=color, **style)
        if first and len(at):
            ends.append((at[-1], gap[-1], _name(optimiser), color))
    ax.set_yscale("log")
    ax.set_xlabel("iteration")
    ax.set_ylabel("$J$ − lowest $J$")
    ax.set_title(f"{title}objective gap")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.yaxis.set_major_locator(LogLocator(numticks=7))
    end_labels(ax, ends)


def _draw_costates(ax: Axes, table: pd.DataFrame, title: str) -> None:
    optimisers = _optimisers(table)
    for index, optimiser in enumerate(optimisers):
        runs = table[table["optimiser"] == optimiser]
        shift = 0.16 * (index - (len(optimisers) - 1) / 2)
        color, marker = COLORS.get(optimiser, "#009E73"), MARKERS.get(optimiser, "s")
        for when, face in (("start", "white"), ("end", color)):
            norms = runs.groupby("position")[f"costate_{when}"].agg(["mean", "min", "max"])
            norms = norms[norms["mean"] > 0]
            mean, at = norms["mean"].to_numpy(), norms.index.to_numpy() + shift
            ax.plot(at, mean, marker, color=color, markerfacecolor=face)
            if runs["seed"].nunique() > 1:
                bars = np.vstack([mean - norms["min"].to_numpy(), norms["max"].to_numpy() - mean])
                ax.errorbar(at, mean, yerr=bars, fmt="none", ecolor=color, elinewidth=0.8)
    stages = _stages(table)
    step = -(-len(stages) // 12)
    ax.set_xticks(range(0, len(stages), step), stages[::step])
    ax.set_yscale("log")
    ax.set_xlabel("stage $t$")
    ax.set_ylabel(r"$\|p_{t+1}\|$")
    ax.set_title(f"{title}costates")
