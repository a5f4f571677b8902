"""How costs grow with size, each with its fitted exponent beside the one that theory gives.

Small multiples, both axes logarithmic: time of training steps, the memory that they keep for their
backward pass below, then solvers of control problems and lists of runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import PAGE_WIDTH, groups
from deltacontrol.paper_figures.marks import number

TITLE = "Growth of cost with size, beside the exponents that theory gives"
STUDY = "benchmarks/growth"

COLUMNS = 4
NEAR = 0.1  # an exponent so far from the expected ones, or less, is called near them
PANEL = ["growth", "quantity"]
UNITS = {"seconds": ("time (ms)", 1e3), "kept_bytes": ("kept memory (MiB)", 2.0**-20)}
INK = {"seconds": "#0072B2", "kept_bytes": "#B8500A"}
MARKERS = {"seconds": "o", "kept_bytes": "s"}
GUIDE = "#D9D9D9"


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per panel and size: what it cost, and the panel's line."""
    rows = []
    for record in records:
        result = record.result
        about = {
            "turns": result["turns"],
            "threads": result["threads"],
            "clock": result["clock"],
            "quick": result["quick"],
            "load": max(result["load"]),
            "processor": record.provenance["hardware"]["processor"],
            "cores": record.provenance["hardware"]["cores"],
        }
        for place, growth in enumerate(_ordered(result["growths"])):
            low, high = growth["interval"] or (None, None)
            for point in sorted(growth["points"], key=lambda p: p["size"]):
                rows.append(
                    {
                        "panel": place,
                        "growth": growth["name"],
                        "quantity": growth["quantity"],
                        "work": growth["work"],
                        "along": growth["along"],
                        "at": growth["at"],
                        **{key: point[key] for key in ("size", "median", "q25", "q75")},
                        "fitted": point["size"] >= growth["fitted_from"],
                        "exponent": growth["exponent"],
                        "low": number(low),
                        "high": number(high),
                        "coefficient": growth["coefficient"],
                        "misfit": growth["misfit"],
                        "expected_low": growth["expected"][0],
                        "expected_high": growth["expected"][1],
                        "why": growth["why"],
                        **about,
                    }
                )
    return pd.DataFrame(rows)


def _ordered(growths: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Times that have a memory, their memories below, then the other times."""
    with_memory = {g["name"] for g in growths if g["quantity"] == "kept_bytes"}

    def row(growth: dict[str, Any]) -> int:
        return 2 if growth["name"] not in with_memory else int(growth["quantity"] == "kept_bytes")

    return sorted(growths, key=row)


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """The fitted line of each panel over the sizes of its fit, and the expected ones over all.

    Expected lines go through the middle of the fitted one, so that they differ in slope alone.
    """
    rows = []
    for (place, growth, quantity), points in groups(table(records), ["panel", *PANEL]):
        first, sizes = points.iloc[0], points["size"].to_numpy(dtype=float)
        own = points.loc[points["fitted"], "size"].to_numpy(dtype=float)
        middle = float(np.exp(np.log(own).mean()))
        level = first["coefficient"] * middle ** first["exponent"]
        lines = [("fitted", first["exponent"], own)]
        for end in ("low", "high"):
            lines.append((f"expected {end}", first[f"expected_{end}"], sizes))
        for line, exponent, span in lines:
            for size in np.geomspace(span[0], span[-1], 9):
                cost = level * (size / middle) ** exponent
                rows.append(
                    {
                        "panel": place,
                        "growth": growth,
                        "quantity": quantity,
                        "line": line,
                        "size": size,
                        "cost": cost,
                    }
                )
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per panel."""
    rows = []
    for _, points in groups(table, ["panel"]):
        first, own = points.iloc[0], points[points["fitted"]]
        rows.append(
            {
                "cost": UNITS[first["quantity"]][0].split(" (")[0],
                "of": first["work"],
                "along": first["along"],
                "at": first["at"],
                "fitted over": f"{own['size'].min():,} to {own['size'].max():,}",
                "exponent": _exponent(first, " to "),
                "expected": _expected(first),
                "largest misfit": f"{100 * (first['misfit'] - 1):.0f} %",
                "because": first["why"],
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """A panel for each growth and cost, and a legend in the place behind the last."""
    count = table["panel"].nunique()
    rows = -(-(count + 1) // COLUMNS)
    figure = Figure(figsize=(PAGE_WIDTH, 0.25 + 1.68 * rows), layout="constrained")
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    before = ""
    for (place,), points in groups(table, ["panel"]):
        _draw_panel(axes[place], points, curves[curves["panel"] == place])
        # One label for a row of the same costs.
        if place % COLUMNS == 0 or points.iloc[0]["quantity"] != before:
            before = points.iloc[0]["quantity"]
            axes[place].set_ylabel(UNITS[before][0], labelpad=1)
        axes[place].set_title(f"({chr(ord('a') + place)}) {points.iloc[0]['work']}", fontsize=7)
    for ax in axes[count:]:
        ax.set_axis_off()
    axes[count].legend(handles=_handles(table), loc="center left", borderaxespad=0.0)
    return figure


def caption(table: pd.DataFrame) -> str:
    """Which exponents are near the expected ones, and which are not; how it was measured."""
    first = table.iloc[0]
    panels = table.drop_duplicates("panel")
    times, memory = (panels[panels["quantity"] == quantity] for quantity in UNITS)
    clock = "processor seconds" if first["clock"] == "cpu" else "seconds of the clock"
    kept = "; memory, what autograd keeps for the backward pass" * bool(len(memory))
    far = panels.loc[_distance(panels).idxmax()]
    near = int((_distance(panels) <= NEAR).sum())
    most = f"; furthest from it grows the {UNITS[far['quantity']][0].split(' (')[0]} of "
    most += f"{_name(far)}, {far['exponent']:.2f} instead of {_expected(far)}"
    sentences = [
        f"{near} of {len(panels)} exponents of growth are within {NEAR:g} of what theory gives"
        f"{most if near < len(panels) else ''}.",
        f"{TITLE}. Time: {clock} of {first['threads']} thread{'s' * bool(first['threads'] > 1)}, "
        f"medians and quartiles of {first['turns']} turns in which all sizes take part "
        f"({first['processor']}, {first['cores']} cores, load up to {first['load']:.1f}){kept}. "
        "A line is fitted to the logarithms over the upper half of the sizes (filled), which was "
        "fixed before; the number is its slope, with the interval of 95 % of a bootstrap over "
        "turns, and the pale line or wedge has the expected slope.",
    ]
    if first["quick"]:
        sentences.append("This is a quick run over small sizes, whose exponents mean nothing.")
    for what, rows in (("time", times), ("memory", memory)):
        if not len(rows):
            continue
        apart = rows[_distance(rows) > NEAR]
        count = len(rows) - len(apart)
        text = f"Of {len(rows)} exponents of {what}, {count} are within {NEAR:g} of the expected"
        named = [
            f"{_name(row)} {_exponent(row, ' to ')}, between the two largest sizes "
            f"{_last(table[table['panel'] == row['panel']]):.2f}, expected {_expected(row)}"
            for _, row in apart.iterrows()
        ]
        sentences.append(text + (f"; the others: {'; '.join(named)}." if named else "."))
    worst = panels.sort_values("misfit", kind="stable").iloc[-1]
    sentences.append(
        f"No fitted median is further than {100 * (worst['misfit'] - 1):.0f} % from its line "
        f"({_name(worst)})."
    )
    return " ".join(sentences)


def _last(points: pd.DataFrame) -> float:
    """The slope between the two largest sizes, where terms of lower order count least."""
    logs = np.log(points[["size", "median"]].to_numpy(dtype=float)[-2:])
    step = logs[1] - logs[0]
    return float(step[1] / step[0])


def _distance(rows: pd.DataFrame) -> pd.Series:
    """How far each exponent is from the nearest expected one."""
    below, above = rows["expected_low"] - rows["exponent"], rows["exponent"] - rows["expected_high"]
    return pd.concat([below, above], axis=1).max(axis=1).clip(lower=0.0)


def _name(row: pd.Series) -> str:
    return f"{row['work']} over {row['along']}"


def _exponent(row: pd.Series, between: str) -> str:
    text = f"{row['exponent']:.2f}"
    if row["low"] != row["low"]:
        return text
    return f"{text} ({row['low']:.2f}{between}{row['high']:.2f})"


def _expected(row: pd.Series) -> str:
    ends = dict.fromkeys((row["expected_low"], row["expected_high"]))
    return " to ".join(f"{end:g}" for end in ends)


def _draw_panel(ax: Axes, points: pd.DataFrame, lines: pd.DataFrame) -> None:
    first = points.iloc[0]
    scale = UNITS[first["quantity"]][1]
    ink, marker = INK[first["quantity"]], MARKERS[first["quantity"]]
    named = {line: rows for (line,), rows in groups(lines, ["line"])}
    low, high = named["expected low"], named["expected high"]
    x = low["size"].to_numpy()
    if first["expected_low"] == first["expected_high"]:
        ax.plot(x, scale * low["cost"].to_numpy(), color=GUIDE, linewidth=4, zorder=1)
    else:
        edges = (scale * low["cost"].to_numpy(), scale * high["cost"].to_numpy())
        ax.fill_between(x, *edges, color=GUIDE, linewidth=0, zorder=1)
    fitted = named["fitted"]
    ax.plot(fitted["size"].to_numpy(), scale * fitted["cost"].to_numpy(), color=ink, zorder=2)
    for chosen, face in ((points["fitted"], ink), (~points["fitted"], "white")):
        some = points[chosen]
        median = scale * some["median"].to_numpy()
        bars = [median - scale * some["q25"], scale * some["q75"] - median]
        ax.errorbar(
            some["size"].to_numpy(), median, yerr=np.array(bars).clip(0.0), fmt=marker, color=ink,
            markerfacecolor=face, markersize=3.2, markeredgewidth=0.8, elinewidth=0.8, zorder=3,
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    measured = scale * points[["q25", "q75"]].to_numpy()
    ax.set_ylim(measured.min() / 2.2, measured.max() * 2.2)
    for axis in (ax.xaxis, ax.yaxis):
        ticks = _ticks(*axis.get_view_interval())
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        plain = 1e-2 <= ticks[0] and ticks[-1] < 1e5
        axis.set_major_formatter(FuncFormatter(_plain if plain else _power))
    ax.set_xlabel(str(first["along"]), labelpad=1)
    ax.text(
        0.05, 0.97, f"slope {_exponent(first, '–')}\nexpected {_expected(first)}",
        transform=ax.transAxes, va="top", fontsize=6.5, linespacing=1.25,
    )  # fmt: skip


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten, at most four of them; with their threes where there would be but one."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = [10.0**p for p in powers if low <= 10.0**p <= high]
    if len(decades) > 1:
        return decades[:: -(-len(decades) // 4)]
    return [t for p in powers for t in (10.0**p, 3 * 10.0**p) if low <= t <= high]


def _plain(value: float, _: object) -> str:
    return f"{value:,.6g}"


def _power(value: float, _: object) -> str:
    exponent = math.floor(math.log10(value) + 1e-9)
    front = round(value / 10.0**exponent)
    power = f"10^{{{exponent}}}"
    return f"${power}$" if front == 1 else rf"${front} \cdot {power}$"


def _handles(table: pd.DataFrame) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = []
    for quantity in dict.fromkeys(table["quantity"]):
        ink, marker = INK[quantity], MARKERS[quantity]
        name = UNITS[quantity][0].split(" (")[0]
        handles.append(
            Line2D([], [], color=ink, marker=marker, markersize=3.2, label=f"{name}, with fit")
        )
        handles.append(
            Line2D(
                [], [], color=ink, marker=marker, markersize=3.2, markerfacecolor="white",
                linestyle="", label=f"{name}, not fitted",
            )
        )  # fmt: skip
    handles.append(Patch(color=GUIDE, linewidth=0, label="expected slope"))
    bar = Line2D([], [], color="#333333", marker="|", linestyle="", markersize=6)
    bar.set_label(f"bars: quartiles of {table['turns'].iloc[0]} turns\nbrackets: 95 % bootstrap")
    handles.append(bar)
    return handles
