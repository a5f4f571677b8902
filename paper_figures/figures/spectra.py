"""The update of full fine-tuning: spectra, stable ranks, and what LoRA of each rank makes of it.

D is the change of the weight of a linear map, s_1 >= s_2 >= ... its singular values. The share of
the gain that is missing is (loss - loss of full) / (loss of the head alone - loss of full).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates, groups
from deltacontrol.paper_figures.figures.reachability import SITES
from deltacontrol.paper_figures.marks import joined, letter, spread

TITLE = "Spectrum of the full fine-tuning update, and LoRA over its ranks"
STUDY = "spectra"

KEYS = ["model", "task"]
NUM_POINTS = 60  # indices drawn of a spectrum
GAPS = {
    "tail_share": ("tail energy", "#000000", "-", "s"),
    "truncated_gap": ("update cut to rank $r$", "#E69F00", "-.", "D"),
    "gap": ("LoRA of rank $r$", "#0072B2", "-", "o"),
}
SIDES = {"left": ("left", "#D55E00", "^"), "right": ("right", "#009E73", "v")}


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run and rank."""
    check_replicates(records, [_group(record) for record in records])
    rows = []
    for record in records:
        result, modules = record.result, _modules(record)
        last = modules[modules["step"] == modules["step"].max()]
        ends = result["losses"]
        overlaps = pd.DataFrame(result["overlaps"]).query(f"step == {record.config['steps']}")
        overlaps = overlaps.set_index("rank")
        for row in result["ranks"]:
            rows.append(
                {
                    **dict(zip(KEYS, _group(record), strict=True)),
                    "seed": record.config["seed"],
                    "rank": row["rank"],
                    "loss": row["loss"],
                    "full_loss": ends["full"],
                    "head_loss": ends["head"],
                    "gap": (row["loss"] - ends["full"]) / (ends["head"] - ends["full"]),
                    "truncated_gap": (row["truncated_loss"] - ends["full"])
                    / (ends["full_without_update"] - ends["full"]),
                    "tail_share": row["tail_share"],
                    **overlaps.loc[row["rank"]].drop("step").to_dict(),
                    "stable_rank": last["stable_rank"].mean(),
                    "share_of_gaussian": (last["stable_rank"] / last["gaussian"]).mean(),
                }
            )
    return pd.DataFrame(rows).sort_values([*KEYS, "seed", "rank"]).reset_index(drop=True)


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """Mean and range over seeds (and layers): spectra by index, stable ranks and overlaps by step.

    A spectrum is relative to its largest value; its mean is the geometric one.
    """
    parts = []
    for record in records:
        key = dict(zip(KEYS, _group(record), strict=True))
        values = record.curve()
        values["y"] = values["value"] / values.groupby(["layer", "site"])["value"].transform("max")
        kept = np.unique(np.geomspace(1, values["index"].max(), NUM_POINTS).round().astype(int))
        values = values[values["index"].isin(kept)].rename(columns={"index": "x"})
        parts.append(values[["site", "x", "y"]].assign(curve="spectrum", **key))
        modules = _modules(record).rename(columns={"step": "x", "stable_rank": "y"})
        parts.append(modules[["site", "x", "y"]].assign(curve="stable rank", **key))
        overlaps = pd.DataFrame(record.result["overlaps"])
        for side in SIDES:
            part = overlaps.rename(columns={"step": "x", side: "y"})
            name = part["rank"].map(lambda rank, side=side: f"{side}, rank {rank}")
            parts.append(part[["x", "y"]].assign(site=name, curve="overlap", **key))
    found = pd.concat(parts).groupby([*KEYS, "curve", "site", "x"])["y"]
    over = found.agg(["min", "max"]).assign(mean=found.mean(), geometric=found.agg(_geometric))
    over = over.reset_index()
    spectrum = over["curve"] == "spectrum"
    return over.assign(y=over["mean"].where(~spectrum, over["geometric"])).drop(
        columns=["mean", "geometric"]
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per task and rank: means over seeds, with their standard deviation."""
    rows = []
    for (model, task, rank), runs in groups(table, [*KEYS, "rank"]):
        percent = {
            name: spread(100 * runs[name].mean(), 100 * runs[name].std())
            for name in ("tail_share", "gap", "truncated_gap", "left", "right")
        }
        rows.append(
            {
                "model": model,
                "task": task,
                "rank": str(rank),
                "LoRA's loss": spread(runs["loss"].mean(), runs["loss"].std(), 3),
                "tail energy (%)": percent["tail_share"],
                "gain missing, LoRA (%)": percent["gap"],
                "gain missing, cut update (%)": percent["truncated_gap"],
                "overlap left (%)": percent["left"],
                "overlap right (%)": percent["right"],
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Spectra and gaps of up to two tasks; stable ranks and overlaps of the first."""
    tasks = [key for key, _ in groups(table, KEYS)][:2]
    figure = Figure(figsize=(PAGE_WIDTH, 4.4), layout="constrained")
    axes = figure.subplots(2, len(tasks) + 1, squeeze=False)
    for (upper, lower), key in zip(axes.T, tasks, strict=False):
        _draw_spectra(upper, _of(curves, key, "spectrum"), key[1])
        _draw_gaps(lower, _of(table, key), key[1])
    _draw_ranks(axes[0, -1], _of(curves, tasks[0], "stable rank"), tasks[0][1])
    _draw_overlaps(axes[1, -1], _of(table, tasks[0]), curves, tasks[0])
    axes[1, 0].legend(fontsize=6.5, loc="upper right")
    letter(axes.flat)
    present = set(curves.loc[curves["curve"] == "spectrum", "site"])
    handles = [
        Line2D([], [], color=color, marker=marker, markersize=3.2, label=label)
        for site, (label, color, marker) in SITES.items()
        if site in present
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def caption(table: pd.DataFrame) -> str:
    """How low the rank is, and how well the tail predicts, all from the table."""
    models, seeds = sorted(table["model"].unique()), table["seed"].nunique()
    sentences = [
        f"{TITLE} ({joined(models)}; {seeds} {'seed' if seeds == 1 else 'seeds'}). Top: singular "
        "values of the update of each linear map, relative to the largest (geometric mean over "
        "layers and seeds; shaded: range), and stable rank during training (mean and range). "
        "Bottom: share of the gain over the head alone that is missing at rank r, in LoRA and in "
        "the update cut to rank r, beside the share of the update's energy beyond r; overlap of "
        "LoRA's subspaces with the r leading singular directions of the update (solid: at the end, "
        "dashed: at the first snapshot, dotted: of random subspaces). Below zero LoRA "
        "reaches a smaller loss than full fine-tuning in the same steps. Bars: range over seeds."
    ]
    for (_, task), runs in groups(table, KEYS):
        means = runs.groupby("rank")[["gap", "tail_share", "loss"]].mean()
        error = np.linalg.norm(means["gap"] - means["tail_share"]) / np.linalg.norm(means["gap"])
        correlation = means["loss"].corr(means["tail_share"], method="spearman")
        sentences.append(
            f"On {task} the stable rank is {runs['stable_rank'].mean():.1f} on average, "
            f"{100 * runs['share_of_gaussian'].mean():.1f} % of a Gaussian matrix's; tail energy "
            f"and LoRA's loss have the rank correlation {correlation:.2f}, and the tail misses the "
            f"measured gaps by {100 * error:.0f} % of their size."
        )
    return " ".join(sentences)


def _group(record: Record) -> tuple[str, str]:
    return str(record.config["model"]), str(record.config["task"])


def _geometric(values: pd.Series) -> float:
    return float(np.exp(np.log(np.maximum(values, 1e-300)).mean()))


def _modules(record: Record) -> pd.DataFrame:
    """One row per snapshot and module, with what a Gaussian matrix of the shape has.

    ‖G‖_F² / ‖G‖_2² tends to m n / (√m + √n)² for an (m, n) matrix of independent entries.
    """
    rows = pd.DataFrame(record.result["modules"])
    shapes = np.array(rows["shape"].tolist(), dtype=float)
    rows["gaussian"] = shapes.prod(axis=1) / np.sqrt(shapes).sum(axis=1) ** 2
    return rows.drop(columns="shape")


def _of(frame: pd.DataFrame, key: tuple[str, ...], curve: str | None = None) -> pd.DataFrame:
    kept = (frame["model"] == key[0]) & (frame["task"] == key[1])
    return frame[kept & (frame["curve"] == curve)] if curve else frame[kept]


def _look(site: str) -> tuple[str, str, str]:
    return SITES.get(site, (site, "#7A5C3E", "h"))


def _draw_spectra(ax: Axes, lines: pd.DataFrame, task: str) -> None:
    for site, line in lines.groupby("site", sort=False):
        x, y, low, high = (line[c].to_numpy(float) for c in ("x", "y", "min", "max"))
        ax.plot(x, y, color=_look(str(site))[1], linewidth=1.0)
        ax.fill_between(x, low, high, color=_look(str(site))[1], alpha=0.12, linewidth=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(bottom=max(1e-4, 0.5 * float(lines["y"].min())))
    _whole(ax)
    ax.set_xlabel("index $i$")
    ax.set_ylabel("$s_i\\,/\\,s_1$")
    ax.set_title(f"{task}: spectrum of the update")


def _draw_ranks(ax: Axes, lines: pd.DataFrame, task: str) -> None:
    for site, line in lines.groupby("site", sort=False):
        _, color, marker = _look(str(site))
        y = line["y"].to_numpy()
        bars = np.vstack([y - line["min"], line["max"] - y])
        style = {"color": color, "marker": marker, "markersize": 3.2}
        ax.errorbar(line["x"], y, yerr=bars, elinewidth=0.4, capsize=0, **style)
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("stable rank")
    ax.yaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_title(f"{task}: stable rank")


def _draw_gaps(ax: Axes, runs: pd.DataFrame, task: str) -> None:
    for name, (label, color, style, marker) in GAPS.items():
        over = runs.groupby("rank")[name].agg(["mean", "min", "max"])
        mean = over["mean"].to_numpy()
        bars = np.vstack([mean - over["min"], over["max"] - mean])
        ax.errorbar(
            over.index.to_numpy(),
            mean,
            yerr=bars,
            color=color,
            linestyle=style,
            marker=marker,
            markersize=3.2,
            elinewidth=0.6,
            label=label,
        )
    ax.axhline(0, color="#555555", linewidth=0.6)
    _ranks(ax, runs["rank"])
    ax.set_ylabel("share missing")
    ax.set_title(f"{task}: gain missing at rank $r$")


def _draw_overlaps(
    ax: Axes, runs: pd.DataFrame, curves: pd.DataFrame, key: tuple[str, ...]
) -> None:
    paths = _of(curves, key, "overlap")
    first = paths[paths["x"] == paths["x"].min()].set_index("site")["y"]
    for side, (label, color, marker) in SIDES.items():
        over = runs.groupby("rank")[[side, f"{side}_by_chance"]].mean()
        ranks = over.index.to_numpy()
        ax.plot(ranks, over[side], color=color, marker=marker, markersize=3.2, label=label)
        early = [first[f"{side}, rank {rank}"] for rank in ranks]
        ax.plot(ranks, early, color=color, linestyle="--", linewidth=0.8)
        ax.plot(ranks, over[f"{side}_by_chance"], color=color, linestyle=":", linewidth=0.8)
    _ranks(ax, runs["rank"])
    ax.set_yscale("log")
    ax.set_ylabel("overlap")
    ax.set_title(f"{key[1]}: LoRA's subspaces")
    ax.legend(title="singular directions", title_fontsize=6.5, fontsize=6.5, loc="lower right")


def _ranks(ax: Axes, ranks: pd.Series) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(ranks))))
    _whole(ax)
    ax.set_xlabel("rank $r$")


def _whole(ax: Axes) -> None:
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
