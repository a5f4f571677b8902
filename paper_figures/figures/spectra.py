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
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates, groups
from deltacontrol.paper_figures.figures.reachability import SITES
from deltacontrol.paper_figures.marks import joined, letter, seed_dot, sentence, spread

TITLE = "Spectrum of the full fine-tuning update, and LoRA over its ranks"
STUDY = "spectra"

KEYS = ["model", "task"]
NUM_POINTS = 60  # indices drawn of a spectrum
GAPS = {
    "tail_share": ("share of the update beyond rank $r$", "#000000", "-", "s"),
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
    """Over layers and seeds, with quartiles: spectra by index; stable ranks and overlaps by step.

    A spectrum is relative to its largest value and averaged geometrically; of stable ranks it is
    the median, of overlaps the mean.
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
    over = pd.DataFrame({"low": found.quantile(0.25), "high": found.quantile(0.75)})
    middles = {"overlap": found.mean(), "spectrum": found.agg(_geometric)}
    over["y"] = found.median()
    for curve, middle in middles.items():
        of_curve = over.index.get_level_values("curve") == curve
        over.loc[of_curve, "y"] = middle[of_curve]
    return over.reset_index()


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
    figure = Figure(figsize=(PAGE_WIDTH, 5.1), layout="constrained")
    axes = figure.subplots(2, len(tasks) + 1, squeeze=False)
    for (upper, lower), key in zip(axes.T, tasks, strict=False):
        _draw_spectra(upper, _of(curves, key, "spectrum"), key[1])
        _draw_gaps(lower, _of(table, key), key[1])
    _draw_ranks(axes[0, -1], _of(curves, tasks[0], "stable rank"), tasks[0][1])
    _draw_overlaps(axes[1, -1], _of(table, tasks[0]), curves, tasks[0])
    letter(axes.flat)
    present = set(curves.loc[curves["curve"] == "spectrum", "site"])
    sites = [
        Line2D([], [], color=color, marker=marker, markersize=3.2, label=label)
        for site, (label, color, marker) in SITES.items()
        if site in present
    ]
    middle = Patch(facecolor="#DDDDDD", label="quartiles over layers and seeds, of any map")
    figure.legend(handles=[*sites, middle], loc="outside upper center", ncols=4)
    figure.legend(handles=_lower_key(table), loc="outside lower center", ncols=4)
    return figure


def _lower_key(table: pd.DataFrame) -> list[Line2D]:
    """What is missing, then subspaces: colour is the side, the dash when."""
    made = [
        Line2D([], [], color=color, linestyle=style, marker=marker, markersize=3.2, label=label)
        for label, color, style, marker in GAPS.values()
    ]
    count = table["seed"].nunique()
    made.append(seed_dot(label=f"a seed{f', bars: range of {count} seeds' if count > 1 else ''}"))
    made += [
        Line2D([], [], color=color, marker=marker, markersize=3.2, label=f"{label} directions")
        for label, color, marker in SIDES.values()
    ]
    early = Line2D([], [], color="#333333", linestyle="--", lw=0.8, label="at the first snapshot")
    chance = Line2D([], [], color="#333333", linestyle=":", lw=0.8, label="random subspaces")
    return [*made, early, chance]


def caption(table: pd.DataFrame) -> str:
    """How low the rank is, and how well the tail predicts, all from the table."""
    models, seeds = sorted(table["model"].unique()), table["seed"].nunique()
    found = [_found(task, runs) for (_, task), runs in groups(table, KEYS)]
    sentences = [
        f"{sentence('; '.join(text for text, _ in found))}.",
        f"{TITLE} ({joined(models)}; {seeds} {'seed' if seeds == 1 else 'seeds'}). Top: singular "
        "values of the update of each linear map, relative to the largest (geometric mean over "
        "layers and seeds), and stable rank during training (median, bars: quartiles over layers "
        "and seeds). Bottom: share of the gain over the head alone that is missing at rank r, in "
        "LoRA and in the update cut to rank r, beside the share of the update's energy beyond r "
        "(a dot a seed, bars: range over seeds); overlap of LoRA's subspaces with the r leading "
        "singular directions of the update. Below zero LoRA reaches a smaller loss than full "
        "fine-tuning in the same steps.",
        *(text for _, text in found),
    ]
    return " ".join(sentences)


def _found(task: str, runs: pd.DataFrame) -> tuple[str, str]:
    """A piece of the first sentence, and a sentence of its own."""
    means = runs.groupby("rank")[["gap", "tail_share", "loss"]].mean()
    error = np.linalg.norm(means["gap"] - means["tail_share"]) / np.linalg.norm(means["gap"])
    correlation = means["loss"].corr(means["tail_share"], method="spearman")
    piece = (
        f"on {task} the stable rank is {runs['stable_rank'].mean():.1f} on average, "
        f"{100 * runs['share_of_gaussian'].mean():.1f} % of a Gaussian matrix's"
    )
    rest = (
        f"On {task} tail energy and LoRA's loss have the rank correlation {correlation:.2f}, and "
        f"the tail misses the measured gaps by {100 * error:.0f} % of their size."
    )
    return piece, rest


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
    span = lines.groupby("x").agg(low=("low", "min"), high=("high", "max"))
    at = span.index.to_numpy(float)
    ax.fill_between(at, span["low"], span["high"], color="#DDDDDD", linewidth=0, zorder=0)
    for place, (site, line) in enumerate(lines.groupby("site", sort=False)):
        _, color, marker = _look(str(site))
        x, y = line["x"].to_numpy(float), line["y"].to_numpy(float)
        ax.plot(
            x, y, color=color, linewidth=1.0, marker=marker, markersize=2.8,
            markevery=(2 * place, 12),
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(bottom=max(1e-3, 0.5 * float(lines["y"].min())))
    _whole(ax)
    ax.set_xlabel("index $i$")
    ax.set_ylabel("$s_i\\,/\\,s_1$")
    ax.set_title(f"{task}: the update's spectrum")


def _draw_ranks(ax: Axes, lines: pd.DataFrame, task: str) -> None:
    sites, steps = list(dict.fromkeys(lines["site"])), np.sort(lines["x"].unique())
    room = float(np.diff(steps).min()) if len(steps) > 1 else 1.0
    for place, (site, line) in enumerate(lines.groupby("site", sort=False)):
        _, color, marker = _look(str(site))
        y = line["y"].to_numpy()
        bars = np.vstack([y - line["low"], line["high"] - y]).clip(0.0)
        shift = 0.11 * room * (place - (len(sites) - 1) / 2)
        ax.errorbar(
            line["x"] + shift, y, yerr=bars, elinewidth=0.6, linewidth=0.7, color=color,
            marker=marker, markersize=3.2,
        )  # fmt: skip
    ax.set_yscale("log")
    ax.set_xticks(steps)
    ax.set_xlabel("step")
    ax.set_ylabel("stable rank")
    ax.yaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_title(f"{task}: stable rank")


def _draw_gaps(ax: Axes, runs: pd.DataFrame, task: str) -> None:
    for place, (name, (_, color, style, marker)) in enumerate(GAPS.items()):
        over = runs.groupby("rank")[name].agg(["mean", "min", "max"])
        beside = 2.0 ** (0.17 * (place - 1))
        mean, at = over["mean"].to_numpy(), over.index.to_numpy() * beside
        ax.plot(at, mean, color=color, linestyle=style, marker=marker, markersize=3.2)
        if runs["seed"].nunique() > 1:
            bars = np.vstack([mean - over["min"], over["max"] - mean])
            ax.errorbar(at, mean, yerr=bars, fmt="none", ecolor=color, elinewidth=0.7)
        ax.scatter(runs["rank"] * beside, runs[name], s=3, color=color, linewidths=0, zorder=3)
    ax.axhline(0, color="#555555", linewidth=0.6)
    _ranks(ax, runs["rank"])
    ax.set_ylabel("share missing")
    ax.set_title(f"{task}: gain missing at rank $r$")


def _draw_overlaps(
    ax: Axes, runs: pd.DataFrame, curves: pd.DataFrame, key: tuple[str, ...]
) -> None:
    paths = _of(curves, key, "overlap")
    first = paths[paths["x"] == paths["x"].min()].set_index("site")["y"]
    for side, (_, color, marker) in SIDES.items():
        over = runs.groupby("rank")[[side, f"{side}_by_chance"]].mean()
        ranks = over.index.to_numpy()
        ax.plot(ranks, over[side], color=color, marker=marker, markersize=3.2)
        early = [first[f"{side}, rank {rank}"] for rank in ranks]
        ax.plot(ranks, early, color=color, linestyle="--", linewidth=0.8)
        ax.plot(ranks, over[f"{side}_by_chance"], color=color, linestyle=":", linewidth=0.8)
    _ranks(ax, runs["rank"])
    ax.set_yscale("log")
    ax.set_ylabel("overlap")
    ax.set_title(f"{key[1]}: LoRA's subspaces")


def _ranks(ax: Axes, ranks: pd.Series) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(ranks))))
    _whole(ax)
    ax.set_xlabel("rank $r$")


def _whole(ax: Axes) -> None:
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
