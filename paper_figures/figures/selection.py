"""What the convex program of linearised tuning picks, how surely, and whether training agrees.

Six panels: the weight at which each map enters; how many maps, and which rank, are picked along the
path; losses along it; the duality gap; BitFit really trained on picked and on unused maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates, groups
from deltacontrol.paper_figures.marks import (
    SMALL,
    beside,
    end_labels,
    joined,
    letter,
    percent,
    spread,
)
from deltacontrol.theory.errors import InputError

TITLE = "Maps and ranks picked by linearised tuning as a convex program, with certificates"
STUDY = "selection"

GROUPS, NUCLEAR = "group lasso", "nuclear norm"
COLORS = {GROUPS: "#0072B2", NUCLEAR: "#D55E00"}
STYLES = {GROUPS: "-", NUCLEAR: "--"}
SETS = {"head": "head", "selected": "picked", "unused": "unused", "all": "all"}
SET_COLORS = {"head": "#8C8C8C", "selected": "#0072B2", "unused": "#E69F00", "all": "#009E73"}
SITE_ORDER = ("query", "key", "value", "output", "up", "down")
# Where the objective and its bound agree to the last bits, the gap is drawn here.
FLOOR = 1e-16


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run and map, per run and program, and per run and trained set (`part`)."""
    labels = [(r.config["model"], r.config["task"]) for r in records]
    if len(set(labels)) > 1:
        raise InputError(f"selection draws one model and task; the records have {set(labels)}")
    check_replicates(records, labels)
    rows: list[dict[str, Any]] = []
    for record in sorted(records, key=lambda r: r.config["seed"]):
        curve, result = record.curve(), record.result
        own = {"seed": record.config["seed"], "run": record.id}
        lasso = curve[curve["program"] == GROUPS].reset_index(drop=True)
        chosen = lasso.iloc[result["chosen"]]
        for name in result["names"]:
            used = lasso.loc[lasso[f"norm.{name}"] > 0, "share"]
            rows.append(
                {
                    "part": "map",
                    "name": name,
                    "share": used.max() if len(used) else np.nan,
                    "active": int(chosen[f"norm.{name}"] > 0),
                    **own,
                }
            )
        for program, index in ((GROUPS, result["chosen"]), (NUCLEAR, result["chosen_rank"])):
            path = curve[curve["program"] == program]
            point = path.iloc[index]
            active = [n for n in result["names"] if chosen[f"norm.{n}"] > 0]
            names = active if program == GROUPS else [result["rank_site"]]
            rows.append(
                {
                    "part": program,
                    "name": " ".join(names) or "-",
                    "share": point["share"],
                    "active": int(point["num_active" if program == GROUPS else "rank"]),
                    "bound": int(point["rank_bound"]),
                    "train_loss": point["train_loss"],
                    "heldout_loss": point["heldout_loss"],
                    "heldout_loss_real": point["heldout_loss_real"],
                    "heldout_loss_start": path.iloc[0]["heldout_loss"],
                    "worst_gap": path["gap"].max(),
                    "tolerance": result["tolerance"],
                    "optimal": int((path["status"] == "optimal").sum()),
                    "points": len(path),
                    "seconds": path["seconds"].sum(),
                    "linearisation_error": result["linearisation_error"],
                    **own,
                }
            )
        head = {"set": "head", "names": [], "num_trainable": 0}
        head |= {f"test_{m}": result[f"head_test_{m}"] for m in ("loss", "accuracy")}
        for trained in [head, *result["trained"]]:
            rows.append(
                {
                    "part": trained["set"],
                    "name": " ".join(trained["names"]) or "-",
                    "active": len(trained["names"]),
                    "num_trainable": trained["num_trainable"],
                    "train_loss": trained.get("train_loss", np.nan),
                    "test_loss": trained["test_loss"],
                    "test_accuracy": trained["test_accuracy"],
                    **own,
                }
            )
    frame = pd.DataFrame(rows)
    frame["model"], frame["task"] = labels[0]
    return frame


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run, program and weight."""
    wanted = ["program", "weight", "share", "num_active", "rank", "rank_bound", "train_loss"]
    wanted += ["heldout_loss", "heldout_loss_real", "heldout_accuracy", "heldout_accuracy_real"]
    wanted += ["objective", "bound", "gap", "rounds", "status", "seconds"]
    frames = [
        record.curve()[wanted].assign(seed=record.config["seed"])
        for record in sorted(records, key=lambda r: r.config["seed"])
    ]
    return pd.concat(frames).reset_index(drop=True)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """What is picked in each run, then what training on it gives."""
    rows = []
    for program in (GROUPS, NUCLEAR):
        for _, run in table[table["part"] == program].iterrows():
            count = int(run["active"])
            picked = f"{count} maps" if program == GROUPS else f"rank {count}"
            names = str(run["name"]).split()
            which = " ".join(names[:5])
            if len(names) > 5:
                which += f" and {len(names) - 5} more"
            rows.append(
                {
                    "seed": str(run["seed"]),
                    "program": program,
                    "λ/λmax": f"{run['share']:.2f}",
                    "picked": f"{picked} (proved ≤ {int(run['bound'])})",
                    "which": which,
                    "held-out loss": f"{run['heldout_loss']:.3f} ({run['heldout_loss_real']:.3f})",
                    "worst gap": f"{run['worst_gap']:.0e}",
                    "test accuracy (%)": "",
                }
            )
    for part, label in SETS.items():
        accuracy = 100 * table.loc[table["part"] == part, "test_accuracy"]
        if len(accuracy):
            rows.append(
                {
                    "seed": f"{len(accuracy)} runs",
                    "program": f"trained: {label}",
                    "λ/λmax": "",
                    "picked": "",
                    "which": "",
                    "held-out loss": "",
                    "worst gap": "",
                    "test accuracy (%)": spread(accuracy.mean(), accuracy.std()),
                }
            )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Two rows of three panels."""
    figure = Figure(figsize=(PAGE_WIDTH, 4.8), layout="constrained")
    axes = figure.subplots(2, 3)
    _draw_map(figure, axes[0, 0], table[table["part"] == "map"])
    _draw_counts(axes[0, 1], curves)
    _draw_losses(axes[0, 2], table, curves)
    _draw_gaps(axes[1, 0], table, curves)
    _draw_trained(axes[1, 1], table, "test_accuracy", "accuracy")
    _draw_trained(axes[1, 2], table, "test_loss", "loss")
    letter(axes.flat)
    figure.legend(handles=_key(table), loc="outside lower center", ncols=4)
    return figure


def _key(table: pd.DataFrame) -> list[Line2D | Patch]:
    count = table["seed"].nunique()
    draws = f"{count} draw{'s' * (count > 1)} of the training rows"
    least = Line2D([], [], linestyle="", marker="D", color=COLORS[GROUPS], mfc="white", ms=4)
    least.set_label("least held-out loss of a draw")
    return [
        Line2D([], [], color="#333333", label=f"median of {draws}"),
        Patch(facecolor="#BBBBBB", label="their range"),
        least,
        Line2D([], [], linestyle="", marker="o", color="#333333", ms=3.5, label="a training"),
        Line2D([], [], color="black", linewidth=1.2, label="mean of the trainings"),
    ]


def caption(table: pd.DataFrame) -> str:
    """What is picked, how surely, and what training says; every number from the table."""
    lasso, nuclear = (table[table["part"] == p] for p in (GROUPS, NUCLEAR))
    maps = table[table["part"] == "map"]
    counts = maps.groupby("name", sort=False)["active"].sum()
    runs = len(lasso)
    most = [f"{n} ({c})" for n, c in counts[counts > 0].sort_values(ascending=False).items()][:5]
    picked = f"Picked most often: {joined(most)} of {runs} runs" if most else "Nothing is picked"
    trained = table[table["part"] == "selected"]
    programs = pd.concat([lasso, nuclear])
    sentences = [
        f"At the λ of least held-out loss the group lasso picks {_range(lasso['active'])} of "
        f"{len(counts)} maps, and the held-out loss goes from "
        f"{lasso['heldout_loss_start'].mean():.3f} to {lasso['heldout_loss'].mean():.3f} in the "
        f"linear and {lasso['heldout_loss_real'].mean():.3f} in the real model.",
        f"{TITLE}: {table['model'].iloc[0]} on {table['task'].iloc[0]}, linearised around the "
        f"frozen model with a fitted head; {runs} draws of the training rows. The group lasso acts "
        f"on the biases of {len(counts)} linear maps named layer.site, the nuclear norm on the "
        "weight of the map picked first. (a) Largest λ/λmax at which each map is picked (mean "
        "over draws; a number says in how many draws it is picked at the λ of least held-out "
        "loss). (b) Maps and rank along the path. "
        "(c) Losses of the group lasso: the linear model on training rows, and on held-out rows, "
        "and the real model with the same changes. (d) Duality gap. (e, f) "
        f"BitFit trained on the maps picked first ({_range(trained['active'])} of them) and on as "
        f"many, of the same widths, that the program proves unused there, and on all. {picked}; "
        f"the rank is {_range(nuclear['active'])}.",
        f"{int(programs['optimal'].sum())} of {int(programs['points'].sum())} solutions are "
        f"certified to the tolerance; the largest duality gap is "
        f"{programs['worst_gap'].max():.1e}, and the features differ from the derivatives of the "
        f"model by {programs['linearisation_error'].max():.0e} (relative).",
    ]
    parts = []
    for part, label in SETS.items():
        rows = table[table["part"] == part]
        if len(rows):
            accuracy = 100 * rows["test_accuracy"]
            text = f"{label} {spread(accuracy.mean(), accuracy.std())} %"
            parts.append(f"{text} (loss {rows['test_loss'].mean():.3f}, {len(rows)} runs)")
    sentences.append(f"Test accuracy after real training: {joined(parts)}.")
    unused = table[table["part"] == "unused"]
    if len(unused):
        pairs = unused.merge(trained, on="seed", suffixes=("", "_picked"))
        better = int((pairs["test_accuracy_picked"] > pairs["test_accuracy"]).sum())
        lower = int((pairs["test_loss_picked"] < pairs["test_loss"]).sum())
        sentences.append(
            f"Of {len(pairs)} comparisons on the same training rows, the picked maps have the "
            f"higher accuracy in {better} and the lower loss in {lower}."
        )
    return " ".join(sentences)


def _range(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


def _draw_map(figure: Figure, ax: Axes, maps: pd.DataFrame) -> None:
    names = maps["name"].str.split(".", n=1, expand=True)
    maps = maps.assign(layer=names[0].astype(int), site=names[1])
    present = set(maps["site"])
    sites = [s for s in SITE_ORDER if s in present] + sorted(present - set(SITE_ORDER))
    layers = sorted(maps["layer"].unique())
    shares, counts = np.zeros((len(sites), len(layers))), np.zeros((len(sites), len(layers)), int)
    for (site, layer), rows in groups(maps, ["site", "layer"]):
        place = sites.index(site), layers.index(layer)
        shares[place] = rows["share"].fillna(0.0).mean()
        counts[place] = rows["active"].sum()
    image = ax.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[row, column] > 0.6 else "black"
            ax.text(column, row, str(count), ha="center", va="center", fontsize=7, color=color)
    ax.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    ax.set_yticks(range(len(sites)), sites)
    ax.set_xlabel("layer (number: draws that pick it)")
    ax.set_title("where a map enters")
    ax.grid(False)
    ax.tick_params(length=0)
    bar = figure.colorbar(image, cax=beside(ax))
    bar.set_label("$\\lambda/\\lambda_{max}$ at entry")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _path_axis(ax: Axes, curves: pd.DataFrame) -> None:
    ax.set_xscale("log")
    low, high = curves["share"].min(), curves["share"].max()
    ax.set_xlim(high * 1.05, low / 1.05)
    ticks = [t for t in (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01) if low / 1.05 <= t]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("$\\lambda/\\lambda_{max}$")


def _over_draws(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Median and range over draws at each point of the path."""
    places = rows.groupby("seed").cumcount()
    chosen = rows[["share"]].assign(value=rows[column])
    over = chosen.groupby(places)
    found = over["value"].agg(["min", "median", "max"])
    return found.assign(share=over["share"].mean())


def _draw_path(
    ax: Axes, rows: pd.DataFrame, column: str, color: str, style: str, steps: bool = False
) -> tuple[float, float]:
    """Draw a line over the path with its range; where it ends."""
    over = _over_draws(rows, column)
    share, middle = over["share"].to_numpy(), over["median"].to_numpy()
    kind = {"step": "post"} if steps else {}
    ax.fill_between(share, over["min"], over["max"], color=color, alpha=0.18, linewidth=0, **kind)
    drawn = "steps-post" if steps else "default"
    ax.plot(share, middle, color=color, linestyle=style, linewidth=1.3, drawstyle=drawn)
    return float(share[-1]), float(middle[-1])


def _draw_counts(ax: Axes, curves: pd.DataFrame) -> None:
    ends = []
    for program, column, name in ((GROUPS, "num_active", "maps"), (NUCLEAR, "rank", "rank")):
        rows = curves[curves["program"] == program]
        end = _draw_path(ax, rows, column, COLORS[program], STYLES[program], steps=True)
        ends.append((*end, name, COLORS[program]))
    _path_axis(ax, curves)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel("picked")
    ax.set_title("maps and rank picked")
    end_labels(ax, ends)


def _draw_losses(ax: Axes, table: pd.DataFrame, curves: pd.DataFrame) -> None:
    rows = curves[curves["program"] == GROUPS]
    lines = {
        "train_loss": ("linear,\ntraining", "#8C8C8C", ":"),
        "heldout_loss": ("linear,\nheld out", COLORS[GROUPS], "-"),
        "heldout_loss_real": ("real,\nheld out", "#000000", "--"),
    }
    ends = []
    for column, (label, color, style) in lines.items():
        ends.append((*_draw_path(ax, rows, column, color, style), label, color))
    chosen = table[table["part"] == GROUPS]
    ax.scatter(
        chosen["share"],
        chosen["heldout_loss"],
        s=16,
        marker="D",
        facecolor="white",
        edgecolor=COLORS[GROUPS],
        zorder=4,
    )
    _path_axis(ax, rows)
    ax.set_ylabel("cross-entropy")
    ax.set_title("losses, group lasso")
    end_labels(ax, ends, gap=0.17)


def _draw_gaps(ax: Axes, table: pd.DataFrame, curves: pd.DataFrame) -> None:
    curves = curves.assign(gap=np.maximum(curves["gap"], FLOOR))
    ends = []
    for program in (GROUPS, NUCLEAR):
        rows = curves[curves["program"] == program]
        end = _draw_path(ax, rows, "gap", COLORS[program], STYLES[program])
        ends.append((*end, program.replace(" ", "\n"), COLORS[program]))
    tolerance = float(table["tolerance"].max())
    ax.axhline(tolerance, color="#555555", linestyle=":", linewidth=0.9)
    ax.text(
        curves["share"].max(), 2 * tolerance, "tolerance", fontsize=SMALL, color="#555555",
        va="bottom", ha="left",
    )  # fmt: skip
    ax.set_yscale("log")
    ax.set_ylim(FLOOR / 3, tolerance * 100)
    ax.yaxis.set_major_locator(LogLocator(numticks=6))
    _path_axis(ax, curves)
    ax.set_ylabel("objective − bound")
    ax.set_title("duality gap")
    end_labels(ax, ends, gap=0.17)


def _draw_trained(ax: Axes, table: pd.DataFrame, column: str, name: str) -> None:
    shown = [part for part in SETS if (table["part"] == part).any()]
    for place, part in enumerate(shown):
        rows = table[table["part"] == part]
        seeds = sorted(rows["seed"].unique())
        for (seed,), values in groups(rows, ["seed"]):
            shift = 0.22 * (seeds.index(seed) - (len(seeds) - 1) / 2)
            x = np.full(len(values), place + shift)
            ax.scatter(x, values[column], s=14, color=SET_COLORS[part], alpha=0.8, linewidths=0)
        mean = rows[column].mean()
        ax.hlines(mean, place - 0.35, place + 0.35, color="black", linewidth=1.2, zorder=3)
    ax.set_xticks(range(len(shown)), [SETS[part] for part in shown], fontsize=6)
    ax.set_xlim(-0.6, len(shown) - 0.4)
    ax.grid(axis="x", visible=False)
    ax.set_title(f"trained: test {name}")
    if column == "test_accuracy":
        percent(ax.yaxis)
        ax.set_ylabel("test accuracy (%)")
    else:
        ax.set_ylabel("test cross-entropy")
