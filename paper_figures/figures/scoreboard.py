"""Every part of every claim: measured number and interval against its threshold, controls beside.

Numbers of different kinds share one axis: how far each is beyond its bound, in bounds. Zero is the
bound, everything to the left of it is on the good side, and -1 is the best that there is for an
error (zero). For a pair of bounds the middle is at -1. The axis is linear between -1 and 1 and
logarithmic beyond.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH
from deltacontrol.theory.evidence import CONFIDENCE, Evidence

TITLE = "Claims: measured against their thresholds, with intervals and controls"
STUDY = "claims"

#         verdict: colour, marker
VERDICTS = {
    "holds": ("#009E73", "o"),
    "fails": ("#D55E00", "X"),
    "inconclusive": ("#0072B2", "s"),
    "assumption_not_met": ("#CC79A7", "^"),
}
CONTROL = "#7A7A7A"
FARTHEST, BEST = 1e6, -3.0  # what is further on either side is drawn there
LABEL_WIDTH, TITLE_WIDTH = 42, 41  # characters on a line
ONE_COLUMN = 40  # lines; more are set in two columns


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row a part: its numbers, and where they lie in bounds beyond the threshold."""
    rows = []
    for record in records:
        outcome = record.result
        for part in outcome["parts"]:
            threshold = part["threshold"]
            row: dict[str, Any] = {
                "part": f"{outcome['id']}{part['name']}",
                "claim": outcome["title"] if part["name"] else "",
                "title": part["title"],
                "on": part["on"],
                "condition": _condition(threshold),
                "verdict": part["verdict"],
                "revised": bool(outcome["revised"]),
                "exact": part["evidence"]["interval"] is None,
            }
            scale = _scale(threshold, part["control"])
            for name in ("evidence", "control", "passing"):
                if part[name] is None:
                    row |= {name: math.nan, f"{name}_low": math.nan, f"{name}_high": math.nan}
                    row |= {f"{name}_at": math.nan, f"{name}_left": math.nan}
                    row[f"{name}_right"] = math.nan
                    continue
                found = Evidence(**part[name])
                low, high = found.bounds(part["confidence"] if name == "evidence" else CONFIDENCE)
                at = [_beyond(x, threshold, scale) for x in (found.value, low, high)]
                inside = [at[1], at[2], at[0]]
                row |= {name: found.value, f"{name}_low": low, f"{name}_high": high}
                row |= {f"{name}_at": at[0], f"{name}_left": min(inside)}
                row[f"{name}_right"] = max(inside)
            rows.append(row)
    return pd.DataFrame(rows)


def _condition(threshold: Mapping[str, Any]) -> str:
    value = threshold["value"]
    if isinstance(value, list | tuple):
        return f"within [{value[0]:g}, {value[1]:g}]"
    return f"{threshold['op']} {value:g}"


def _scale(threshold: Mapping[str, Any], control: Mapping[str, Any]) -> float:
    """The bound; half the distance of two; the control where the bound is zero."""
    value = threshold["value"]
    if isinstance(value, list | tuple):
        return (value[1] - value[0]) / 2
    return abs(value) or abs(float(control["value"])) or 1.0


def _beyond(x: float, threshold: Mapping[str, Any], scale: float) -> float:
    """How far a number is on the bad side of its threshold, in bounds."""
    value = threshold["value"]
    if isinstance(value, list | tuple):
        return (abs(x - (value[0] + value[1]) / 2) - scale) / scale
    return (x - value) / scale * (1 if threshold["op"] in ("<", "<=") else -1)


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """There are none."""
    return pd.DataFrame({"part": []})


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a part."""
    shown = table[["part", "title", "on", "condition", "evidence", "control", "verdict"]].copy()
    shown["verdict"] = shown["verdict"].str.replace("_", " ")
    for name in ("evidence", "control"):
        shown[name] = [f"{x:.3g}" for x in shown[name]]
    return shown


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """A line a part, from the first claim at the top; the parts of one claim below its title."""
    del curves
    columns = _columns(_lines(table))
    tallest = max(sum(line.height for line in column) for column in columns)
    figure = Figure(figsize=(PAGE_WIDTH, 1.0 + 0.109 * tallest), layout="constrained")
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for ax, column in zip(axes, columns, strict=True):
        _draw_column(ax, column, tallest)
    figure.supxlabel("beyond the threshold, in bounds (left of 0: good)", fontsize=8)
    handles = [
        Line2D([], [], color=c, marker=m, lw=1.2, ms=4, label=v.replace("_", " "))
        for v, (c, m) in VERDICTS.items()
        if v in set(table["verdict"])
    ]
    handles += [
        Line2D([], [], color=CONTROL, marker="D", mfc="white", lw=0.8, ms=3.5, label="control"),
        Line2D([], [], color=CONTROL, marker="|", lw=0, ms=5, label="where the control passes"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


@dataclass(frozen=True)
class _Line:
    """A label on as many lines as it needs, and the row behind it; a claim's title has none."""

    label: str
    row: dict[str, Any] | None

    @property
    def height(self) -> int:
        return self.label.count("\n") + 1

    @property
    def begins(self) -> bool:
        """Whether a claim begins here."""
        return self.row is None or not self.row["claim"]


def _lines(table: pd.DataFrame) -> list[_Line]:
    """A claim of several parts has its title in a line of its own."""
    lines: list[_Line] = []
    before = ""
    for found in table.to_dict("records"):
        row = {str(name): value for name, value in found.items()}
        if row["claim"] and row["claim"] != before:
            lines.append(_Line(_wrapped(row["claim"], TITLE_WIDTH), None))
        before = row["claim"]
        lines.append(_Line(f"{_wrapped(row['title'], LABEL_WIDTH)}  {row['part']}", row))
    return lines


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _columns(lines: list[_Line]) -> list[list[_Line]]:
    """All in one column, or in two of about the same height, where no claim is torn apart."""
    whole = sum(line.height for line in lines)
    begins = [i for i, line in enumerate(lines) if i and line.begins]
    if whole <= ONE_COLUMN or not begins:
        return [lines]
    above = [sum(line.height for line in lines[:i]) for i in begins]
    cut = min(zip(begins, above, strict=True), key=lambda pair: abs(pair[1] - whole / 2))[0]
    return [lines[:cut], lines[cut:]]


def _draw_column(ax: Axes, lines: list[_Line], tallest: int) -> None:
    ax.axvspan(-FARTHEST * 10, 0, color="#F1F6F3", lw=0)
    ax.axvline(0, color="black", lw=0.8)
    ends = np.cumsum([line.height for line in lines])
    places = ends - np.array([line.height for line in lines]) / 2
    for y, line in zip(places, lines, strict=True):
        if line.row is not None:
            _draw_part(ax, float(y), line.row)
    ax.set_xscale("symlog", linthresh=1.0)
    ax.set_xlim(BEST * 1.1, FARTHEST * 1.9)
    ax.xaxis.set_major_locator(FixedLocator([-1, 0, 1, 1e2, 1e4, 1e6]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x)))
    ax.set_yticks(places, [line.label for line in lines])
    for label, line in zip(ax.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if line.row is None else "normal")
        label.set_linespacing(1.0)
    ax.set_ylim(tallest + 0.2, -0.2)
    ax.tick_params(axis="y", length=0, labelsize=6)
    ax.tick_params(axis="x", labelsize=6.5)
    ax.grid(axis="y", visible=False)


def _draw_part(ax: Axes, y: float, row: dict[str, Any]) -> None:
    colour, marker = VERDICTS[row["verdict"]]
    for name, ink, kind, filled in (
        ("control", CONTROL, "D", False),
        ("passing", CONTROL, "|", True),
        ("evidence", colour, marker, True),
    ):
        at = _seen(row[f"{name}_at"])
        if math.isnan(at):
            continue
        wide, size = (1.2, 4.0) if name == "evidence" else (0.8, 3.5)
        ends = _seen(row[f"{name}_left"]), _seen(row[f"{name}_right"])
        ax.plot(ends, [y] * 2, color=ink, lw=wide)
        face = ink if filled else "white"
        ax.plot(at, y, kind, color=ink, ms=size, mfc=face, mew=0.8)


def _seen(at: float) -> float:
    return float(np.clip(at, BEST, FARTHEST)) if at == at else at


def _tick(x: float) -> str:
    if abs(x) < 100:
        return f"{x:g}"
    power = rf"10^{{{round(math.log10(abs(x)))}}}"
    return rf"$\geq{power}$" if x >= FARTHEST else f"${power}$"


def caption(table: pd.DataFrame) -> str:
    """How many parts hold, fail, are open, and of which the control tells nothing."""
    counts = table["verdict"].value_counts()
    told = [f"{counts[v]} {_words(v, counts[v])}" for v in VERDICTS if counts.get(v)]
    exact = int(table["exact"].sum())
    weak = table[table["control_left"] <= 0]["part"].tolist()
    revised = table[table["revised"]]["part"].tolist()
    sentences = [
        f"Of the claims' {len(table)} parts: {', '.join(told)}. Each number is drawn by how far "
        "it is beyond its threshold, in bounds; intervals are of 95 % (parts of one claim "
        f"together, by Holm's rule), over the unit that the claim names; {exact} parts are exact.",
    ]
    if weak:
        sentences.append(
            "The control does not lie wholly on the bad side, so that the check has no power, in "
            f"{', '.join(weak)}."
        )
    if revised:
        sentences.append(f"The check is another one than that of an earlier result in "
                         f"{len(revised)} parts.")  # fmt: skip
    return " ".join(sentences)


def _words(verdict: str, count: int) -> str:
    plural = {"holds": "hold", "fails": "fail", "inconclusive": "are inconclusive"}
    single = {"holds": "holds", "fails": "fails", "inconclusive": "is inconclusive"}
    words = (single if count == 1 else plural).get(verdict)
    return words or "whose assumptions were not met"
