"""Predicted and measured thresholds of random subspaces, success curves, and trained losses.

Panels: predicted against measured dimension, with the band of ±20 %; the share of subspaces that
reach a target, around the predicted dimension; losses of a model trained in subspaces, beside what
its Gauss-Newton model expects.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates, groups
from deltacontrol.paper_figures.marks import Look, joined, letter, looks, number

TITLE = "Predicted and measured dimension at which random subspaces reach a target loss"
STUDY = "threshold"

BAND = 0.2
EXACT = {
    "quadratic": Look("quadratic losses", "#000000", "s"),
    "linearised": Look("linearised model", "#882255", "p"),
}
BLOCKS = {"selected-modules": Look("all blocks", "#7A5C3E", ">")}


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run, target and kind of measurement."""
    check_replicates(records, [_group(record) for record in records])
    rows = []
    for record in records:
        config, result = record.config, record.result
        for case in result["cases"]:
            rows.append(
                {
                    "kind": case["kind"],
                    "problem": _group(record),
                    "of": _of(config),
                    "seed": config["seed"],
                    "target": case["target"],
                    "predicted": case["predicted"],
                    "standard_error": number(case["standard_error"]),
                    "width": case["width"],
                    "measured": _bound(case["measured"]),
                    "low": _bound(case["low"]),
                    "high": _bound(case["high"]),
                    "draws": case["draws"],
                    "published": number(case["published"]),
                    "cone": number(case.get("cone")),
                    "cone_error": number(case.get("cone_error")),
                    "smallest": min(config.get("dimensions") or [0]),
                    "largest": max(config.get("dimensions") or [0]),
                    "run": record.id,
                }
            )
    found = _ordered(pd.DataFrame(rows), ["problem", "seed", "target"])
    found["error"] = (found["predicted"] / found["measured"] - 1).abs()
    return found


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """Success shares around each threshold (of exact solves), and losses of every training."""
    frames = []
    for record in records:
        curve = record.curve()
        own = {"problem": _group(record), "of": _of(record.config), "seed": record.config["seed"]}
        for case in record.result["cases"]:
            if case["kind"] == "fine-tuned":
                continue
            rows = curve[(curve["kind"] == case["kind"]) & (curve["target"] == case["target"])]
            frames.append(
                pd.DataFrame(
                    {
                        "kind": case["kind"],
                        **own,
                        "target": case["target"],
                        "dimension": rows["dimension"],
                        "position": (rows["dimension"] - case["predicted"]) / case["width"],
                        "predicted": rows["predicted"],
                        "measured": rows["measured"],
                    }
                )
            )
        if record.config.get("dimensions"):
            rows = curve[curve["kind"] == "training"]
            frames.append(
                pd.DataFrame(
                    {
                        "kind": "training",
                        **own,
                        "dimension": rows["dimension"],
                        "subspace": curve.loc[rows.index, "seed"],
                        "predicted": rows["expected"] / record.result["start"],
                        "measured": rows["loss"] / record.result["start"],
                    }
                )
            )
    order = ["problem", "seed", "target", "dimension", "subspace"]
    found = pd.concat(frames, ignore_index=True)
    return _ordered(found, [name for name in order if name in found])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Errors of the prediction by kind and what the subspaces are of."""
    rows = []
    for (kind, of), cases in groups(table, ["kind", "of"]):
        reached = cases[np.isfinite(cases["measured"])]
        errors = 100 * reached["error"]
        within = int((cases["error"] <= BAND).sum())
        rows.append(
            {
                "measured in": kind,
                "subspaces of": _label(of),
                "cases": str(len(cases)),
                "predicted d*": _range(cases["predicted"]),
                "measured": _range(cases["measured"]),
                "error (%)": _range(errors) if len(reached) else "-",
                f"within {100 * BAND:g} %": f"{within} of {len(cases)}",
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Three panels in a row."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.75), layout="constrained")
    axes = figure.subplots(1, 3)
    tuned = _looks(table.loc[table["kind"] == "fine-tuned", "of"])
    _draw_thresholds(axes[0], table, tuned)
    _draw_success(axes[1], curves)
    _draw_losses(axes[2], curves, tuned)
    letter(axes)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def caption(table: pd.DataFrame) -> str:
    """The largest errors of each kind of measurement."""
    parts = []
    for kind in ("quadratic", "linearised"):
        cases = table[table["kind"] == kind]
        if len(cases):
            parts.append(f"{100 * cases['error'].max():.1f} % ({EXACT[kind].label}, {len(cases)})")
    text = (
        f"{TITLE}. (a) Predicted from the spectrum without training, measured as the median over "
        "subspaces, interval of the median; the band is ±20 %; arrows: reached in no dimension "
        "that was trained (up), or in the least one (down); hollow: predicted with the "
        "cross-entropy itself in the place of its quadratic. (b) Share of subspaces that reach the "
        "target, over the distance from the prediction in widths; line: predicted. (c) Final "
        "training losses of the real model, "
        "a dot a subspace; trainings end a tenth below the lowest target; dashed: what its "
        f"Gauss-Newton model at the start expects. Largest error of exact solves: {joined(parts)}."
    )
    tuned = table[table["kind"] == "fine-tuned"]
    for (of,), cases in groups(tuned, ["of"]):
        reached = cases[np.isfinite(cases["measured"])]
        missed = len(cases) - len(reached)
        found = f"Fine-tuning in subspaces of {_label(of)}: "
        if len(reached):
            ratios = reached["measured"] / reached["predicted"]
            found += f"{_range(ratios, 2)} times the predicted dimension"
            if reached["cone"].notna().any():
                ratios = reached["measured"] / reached["cone"]
                found += f" ({_range(ratios, 2)} with the cross-entropy itself)"
        if missed:
            found += f"{', and ' if len(reached) else ''}{missed} of {len(cases)} targets not "
            found += f"reached up to d = {int(cases['largest'].max())}"
        text += f" {found}."
    return text


def _ordered(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Exact problems first, then the model linearised, then trained."""
    order = {kind: index for index, kind in enumerate([*EXACT, "fine-tuned", "training"])}
    return frame.sort_values(
        ["kind", *keys],
        key=lambda column: column.map(order) if column.name == "kind" else column,
        kind="stable",
    ).reset_index(drop=True)


def _group(record: Record) -> str:
    config = record.config
    if "exponent" in config:
        return f"eigenvalues i^-{config['exponent']:g}"
    trained = " trained" if config["dimensions"] else ""
    return f"{config['model']} {config['task']} {'+'.join(config['deltas'])}{trained}"


def _of(config: dict[str, Any]) -> str:
    """What the subspaces are of: a delta's name, or the whole space."""
    names = [str(text).partition(":")[0] for text in config.get("deltas", ())]
    return next((name for name in names if name != "head"), names[0] if names else "all")


def _label(of: str) -> str:
    return "all directions" if of == "all" else _looks([of])[of].label


def _looks(names: Iterable[str]) -> dict[str, Look]:
    return {name: BLOCKS.get(name, look) for name, look in looks(names).items()}


def _bound(value: float | None) -> float:
    return math.inf if value is None else float(value)


def _range(values: pd.Series, digits: int = 3) -> str:
    low, high = float(values.min()), float(values.max())
    texts = [f"{v:.{digits}g}" if math.isfinite(v) else "not reached" for v in (low, high)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"


def _draw_thresholds(ax: Axes, table: pd.DataFrame, tuned: dict[str, Look]) -> None:
    finite = table[np.isfinite(table["measured"])]
    top = 1.5 * max(finite[["measured", "predicted"]].max().max(), table["largest"].max())
    low = 0.6 * finite[["measured", "predicted"]].min().min()
    line = np.array([low, top])
    ax.fill_between(line, (1 - BAND) * line, (1 + BAND) * line, color="#e4e4e4", lw=0, zorder=0)
    ax.plot(line, line, color="#555555", lw=0.7)
    series = [(EXACT[kind], table[table["kind"] == kind]) for kind in EXACT]
    series += [
        (
            look,
            table[(table["kind"] == "fine-tuned") & (table["of"] == of)],
        )
        for of, look in tuned.items()
    ]
    for look, cases in series:
        there = cases[np.isfinite(cases["measured"])]
        high = there["high"].clip(upper=top)
        error = np.array([there["measured"] - there["low"], high - there["measured"]])
        ax.errorbar(
            there["predicted"], there["measured"], yerr=error, fmt=look.marker, color=look.color,
            ms=3.5, lw=0.8, label=look.label,
        )  # fmt: skip
        ax.errorbar(
            there["cone"], there["measured"], xerr=there["cone_error"], fmt=look.marker,
            color=look.color, ms=3.5, lw=0.5, mfc="none",
        )  # fmt: skip
        beyond = cases[~np.isfinite(cases["measured"])]
        least = there[(there["kind"] == "fine-tuned") & (there["measured"] == there["smallest"])]
        for bounded, at, arrow in (
            (beyond, "largest", r"$\uparrow$"),
            (least, "smallest", r"$\downarrow$"),
        ):
            position = bounded[at] * (1.15 if at == "largest" else 0.87)
            ax.plot(
                bounded["predicted"], position, linestyle="", marker=arrow, ms=6, color=look.color
            )
    ax.set(xscale="log", yscale="log", xlim=(low, top), ylim=(low, top))
    ax.set_xlabel("predicted d*")
    ax.set_ylabel("measured dimension")
    ax.set_title("threshold")


def _draw_success(ax: Axes, curves: pd.DataFrame) -> None:
    rows = curves[curves["kind"].isin(list(EXACT))]
    for kind, look in EXACT.items():
        of_kind = rows[rows["kind"] == kind]
        ax.plot(
            of_kind["position"], of_kind["measured"], linestyle="", marker=look.marker, ms=1.6,
            color=look.color, alpha=0.45, mew=0,
        )  # fmt: skip
    line = rows.sort_values("position")
    ax.plot(line["position"], line["predicted"], color="#D55E00", lw=1.2)
    ax.set_xlim(-3.2, 3.2)
    ax.set_xlabel("(d - d*) / s")
    ax.set_ylabel("share of subspaces that reach it")
    ax.set_title("success")


def _draw_losses(ax: Axes, curves: pd.DataFrame, tuned: dict[str, Look]) -> None:
    rows = curves[curves["kind"] == "training"]
    for of, look in tuned.items():
        runs = rows[rows["of"] == of]
        means = runs.groupby("dimension")[["measured", "predicted"]].mean()
        ax.plot(means.index, means["measured"], color=look.color)
        ax.plot(means.index, means["predicted"], color=look.color, ls="--", lw=0.9)
        ax.plot(
            runs["dimension"], runs["measured"], linestyle="", marker=look.marker, ms=3,
            color=look.color, mew=0, alpha=0.7,
        )  # fmt: skip
    ax.set_xscale("log")
    ticks = sorted(set(rows["dimension"].astype(int)))
    kept = [t for i, t in enumerate(ticks) if i == 0 or t in (24, 96, 384) or len(ticks) < 5]
    ax.xaxis.set_major_locator(FixedLocator(kept))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([str(t) for t in kept])
    ax.set_xlabel("dimension d")
    ax.set_ylabel("loss / loss at the start")
    ax.set_title("fine-tuned")
