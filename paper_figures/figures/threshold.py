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
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, check_replicates, groups
from deltacontrol.paper_figures.marks import SMALL, Look, joined, letter, looks, number

TITLE = "Predicted and measured dimension at which random subspaces reach a target loss"
STUDY = "threshold"

BAND = 0.2
SIDE = 1.07  # by which equal predictions are moved apart
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
    """Exact solves above, fine-tuning below: predicted against measured, then what is behind it."""
    figure = Figure(figsize=(PAGE_WIDTH, 5.6), layout="constrained")
    axes = figure.subplots(2, 2)
    tuned = _looks(table.loc[table["kind"] == "fine-tuned", "of"])
    _draw_exact(axes[0, 0], table[table["kind"].isin(list(EXACT))])
    _draw_success(axes[0, 1], curves)
    _draw_tuned(axes[1, 0], table[table["kind"] == "fine-tuned"], tuned)
    _draw_losses(axes[1, 1], curves, tuned)
    letter(axes.flat)
    return figure


def caption(table: pd.DataFrame) -> str:
    """How far the prediction is off, where the loss is quadratic and where it is not."""
    parts = []
    for kind in EXACT:
        cases = table[table["kind"] == kind]
        if len(cases):
            parts.append(f"{100 * cases['error'].max():.1f} % ({EXACT[kind].label}, {len(cases)})")
    tuned = table[table["kind"] == "fine-tuned"]
    reached = tuned[np.isfinite(tuned["measured"])]
    far = ""
    if len(reached):
        ratios = _range(reached["measured"] / reached["predicted"], 2)
        far = f"; fine-tuning needs {ratios} times the predicted dimension"
    text = (
        "The spectrum foretells the dimension at which random subspaces reach a loss to within "
        f"{joined(parts)} of exact solves{far}. {TITLE}. (a) Predicted without training, measured "
        "as the median over subspaces, bars: interval of the median. (b) Share of subspaces that "
        "reach the target, over the distance from the prediction in widths. (c) The same as (a) "
        "for the real model, trained; arrows: reached in no dimension that was trained (up), or in "
        "the least one (down); hollow: predicted with the cross-entropy itself in the place of its "
        "quadratic; equal predictions are drawn side by side. (d) Final training losses of the "
        "real model, a dot a subspace; trainings end a tenth below the lowest target."
    )
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


def _diagonal(ax: Axes, low: float, high: float, spot: float) -> None:
    """The line on which the prediction is right, and its band, both named at the share `spot`."""
    line = np.array([low, high])
    ax.fill_between(line, (1 - BAND) * line, (1 + BAND) * line, color="#E4E4E4", lw=0, zorder=0)
    ax.plot(line, line, color="#555555", lw=0.7, zorder=1)
    at = low * (high / low) ** spot
    name = f"measured as\npredicted, ±{100 * BAND:g} %"
    ax.text(1.12 * at, (1 - 1.6 * BAND) * at, name, va="top", fontsize=SMALL, color="#555555")
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    ax.set_xlabel("predicted dimension d*")
    ax.set_ylabel("measured dimension")


def _draw_exact(ax: Axes, cases: pd.DataFrame) -> None:
    ends = cases[["measured", "predicted"]].to_numpy(float)
    _diagonal(ax, 0.6 * np.nanmin(ends), 1.7 * np.nanmax(ends[np.isfinite(ends)]), 0.42)
    for kind, look in EXACT.items():
        rows = cases[(cases["kind"] == kind) & np.isfinite(cases["measured"])]
        bars = np.array([rows["measured"] - rows["low"], rows["high"] - rows["measured"]])
        ax.errorbar(
            rows["predicted"], rows["measured"], yerr=bars.clip(0.0), fmt=look.marker, ms=3.5,
            lw=0.8, color=look.color, markeredgecolor="white", mew=0.4,
        )  # fmt: skip
    handles = [
        Line2D([], [], linestyle="", marker=look.marker, color=look.color, ms=3.5, label=look.label)
        for kind, look in EXACT.items()
        if (cases["kind"] == kind).any()
    ]
    ax.legend(handles=handles, loc="upper left")
    ax.set_title("exact solves: predicted and measured")


def _draw_success(ax: Axes, curves: pd.DataFrame) -> None:
    rows = curves[curves["kind"].isin(list(EXACT))]
    for kind, look in EXACT.items():
        of_kind = rows[rows["kind"] == kind]
        ax.plot(
            of_kind["position"], of_kind["measured"], linestyle="", marker=look.marker, ms=1.6,
            color=look.color, alpha=0.45, mew=0,
        )  # fmt: skip
    line = rows.sort_values("position")
    ax.plot(line["position"], line["predicted"], color="#D55E00", lw=1.4)
    names = [("predicted", "#D55E00", "-", "")]
    names += [
        (f"measured, {look.label}", look.color, "", look.marker)
        for kind, look in EXACT.items()
        if (rows["kind"] == kind).any()
    ]
    handles = [
        Line2D([], [], color=color, linestyle=style, marker=marker, ms=3, label=label)
        for label, color, style, marker in names
    ]
    ax.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 0.03))
    ax.axvline(0.0, color="#555555", lw=0.7, ls=":")
    ax.set_xlim(-3.2, 4.6)
    ax.set_xlabel("(d − d*) / width s of the transition")
    ax.set_ylabel("share of subspaces\nthat reach the target")
    ax.set_title("exact solves: success around d*")


def _draw_tuned(ax: Axes, cases: pd.DataFrame, tuned: dict[str, Look]) -> None:
    finite = cases[np.isfinite(cases["measured"])]
    reach = [*cases["predicted"], *cases["cone"].dropna(), *finite["measured"]]
    top = 1.6 * max([*reach, *cases["largest"]], default=6.0)
    low = 0.55 * min(reach, default=2.0)
    _diagonal(ax, low, top, 0.5)
    for place, (of, look) in enumerate(tuned.items()):
        beside = SIDE ** (place - (len(tuned) - 1) / 2)
        own = cases[cases["of"] == of]
        there = own[np.isfinite(own["measured"])]
        y, high = there["measured"], there["high"].clip(upper=top)
        bars = np.array([y - there["low"], high - y]).clip(0.0)
        x, cone = there["predicted"] * beside, there["cone"] * beside
        ax.hlines(y, cone, x, color=look.color, lw=0.4)
        style = {"color": look.color, "ms": 4, "lw": 0.8}
        ax.errorbar(x, y, yerr=bars, fmt=look.marker, label=look.label, **style)
        ax.plot(cone, y, look.marker, mfc="white", mew=0.8, **style)
        beyond = own[~np.isfinite(own["measured"])]
        least = there[there["measured"] == there["smallest"]]
        for bounded, at, arrow in (
            (beyond, "largest", r"$\uparrow$"),
            (least, "smallest", r"$\downarrow$"),
        ):
            height = bounded[at] * (1.15 if at == "largest" else 0.85)
            ax.plot(
                bounded["predicted"] * beside, height, linestyle="", marker=arrow, ms=6,
                color=look.color,
            )  # fmt: skip
    handles = [
        Line2D([], [], linestyle="", marker=look.marker, color=look.color, ms=4, label=look.label)
        for look in tuned.values()
    ]
    for label, face in (("d* of the quadratic", "#333333"), ("d* of the cross-entropy", "white")):
        made = Line2D([], [], linestyle="", marker="o", color="#333333", mfc=face, ms=4)
        made.set_label(label)
        handles.append(made)
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    ax.set_title("fine-tuned: predicted and measured")


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
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, ms=3, label=look.label)
        for look in tuned.values()
    ]
    handles.append(Line2D([], [], color="#333333", label="measured"))
    expected = Line2D([], [], color="#333333", ls="--", lw=0.9)
    expected.set_label("expected of its\nGauss-Newton model")
    ax.legend(handles=[*handles, expected], loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    ax.set_xlabel("dimension d of the subspace")
    ax.set_ylabel("loss / loss at the start")
    ax.set_title("fine-tuned: loss by dimension")
