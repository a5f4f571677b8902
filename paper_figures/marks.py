"""The looks of delta methods, and the marks that several figures share.

Every figure keeps these rules. Each seed is a dot. A bar is an interval or a range that the picture
names, with caps, and never the only mark; of a share it stays within 0 and 1. Series that meet at
one place stand side by side. Lines are named at their ends, and a legend lies beside the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deltacontrol.paper_figures.methods import Look, declared
from deltacontrol.theory.evidence import CONFIDENCE, Interval

SMALL = 6.5  # points, of words inside a panel; nothing is smaller than 6
EDGE = 1e-3  # a share nearer to 0 or 1 counts as one at this distance: its log-odds are finite
INTERVAL = f"{100 * CONFIDENCE:g} % Student t interval of the mean log-odds"
_HAIRLINE = {"arrowstyle": "-", "lw": 0.5, "shrinkA": 1, "shrinkB": 2}
_SPARE = ("#56B4E9", "#7A5C3E", "#882255", "#44AA99", "#999933")


def method(deltas: Sequence[Mapping[str, Any]]) -> str:
    """Name of a combination of deltas: the head counts only where it is all that is trained."""
    names = [str(delta["name"]) for delta in deltas]
    return "+".join([name for name in names if name != "head"] or names)


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """A look for each method, by its place in legends; those without one get spare colours."""
    known, present = declared(), sorted(set(methods))
    own = {name: known[name].look for name in present if name in known}
    found = {name: look for name, look in own.items() if look is not None}
    for index, name in enumerate(name for name in present if name not in found):
        found[name] = Look(name, _SPARE[index % len(_SPARE)], "hxd*p"[index % 5])
    return dict(sorted(found.items(), key=lambda item: item[1].place))


def by_method(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Rows sorted by the keys, methods in the order of legends, under a plain index."""
    order = {name: index for index, name in enumerate(looks(frame["method"]))}
    return frame.sort_values(
        list(keys), key=lambda column: column.map(order) if column.name == "method" else column
    ).reset_index(drop=True)


def letter(axes: Iterable[Axes]) -> None:
    """Put (a), (b), … before each title."""
    for index, ax in enumerate(axes):
        ax.set_title(f"({chr(ord('a') + index)}) {ax.get_title(loc='left')}", loc="left")


def percent(axis: Axis, nbins: int = 6) -> None:
    """Label shares as percentages; the axis label says that they are."""
    axis.set_major_locator(MaxNLocator(nbins=nbins, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))


def share_interval(shares: Iterable[float]) -> tuple[float, float] | None:
    """`INTERVAL` of the mean of shares; None for fewer than two.

    Student's t of log(s / (1 - s)), taken back: the ends are shares themselves.
    """
    kept = [min(max(float(s), EDGE), 1 - EDGE) for s in shares if s == s]
    if len(kept) < 2:
        return None
    odds = tuple(math.log(s / (1 - s)) for s in kept)
    low, high = (0.5 + 0.5 * math.tanh(x / 2) for x in Interval("t", "seed", len(odds), odds).at())
    return low, high


def apart(
    places: Sequence[float] | np.ndarray,
    gap: float,
    low: float = -math.inf,
    high: float = math.inf,
) -> np.ndarray:
    """The places nearest to `places`, in the sense of least squares, that are `gap` apart.

    With q_i = z_i + i·gap in the order of the places, z is the isotonic regression of p_i - i·gap,
    and clipped it is that within bounds. Where there is no room, the bound `low` is kept.
    """
    from scipy.optimize import isotonic_regression

    found = np.asarray(places, dtype=float)
    order = np.argsort(found, kind="stable")
    steps = gap * np.arange(len(found))
    moved = np.empty(len(found))
    if len(found):
        z = isotonic_regression(found[order] - steps).x
        moved[order] = np.maximum(np.minimum(z, high - steps[-1]), low) + steps
    return moved


def end_labels(ax: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 0.075) -> None:
    """Name lines to the right of their ends, which a hairline joins; call it with final limits.

    Args:
        ax: the panel.
        ends: x, y, name and colour of each line.
        gap: between two names, as a share of the panel's height.
    """
    (left, right), (low, high) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
    to_axes = ax.transData + ax.transAxes.inverted()
    inside = [(min(max(x, left), right), min(max(y, low), high)) for x, y, *_ in ends]
    heights = [float(to_axes.transform(place)[1]) for place in inside]
    moved = apart(heights, gap, 0.02, 0.98)
    for place, height, (_, _, name, color) in zip(inside, moved, ends, strict=True):
        ax.annotate(
            name,
            place,
            (1.045, height),
            textcoords="axes fraction",
            va="center",
            fontsize=SMALL,
            color=color,
            arrowprops={"relpos": (0, 0.5), "color": color, **_HAIRLINE},
            annotation_clip=False,
        )


def beside(ax: Axes) -> Axes:
    """A place for a colour bar that touches its panel."""
    return ax.inset_axes((1.03, 0.04, 0.045, 0.92))


def seed_dot(color: str = "#333333", label: str = "a seed") -> Line2D:
    """What a legend shows for the dots of seeds."""
    return Line2D([], [], linestyle="", marker="o", markersize=2.5, color=color, label=label)


def number(value: float | None) -> float:
    """A recorded number, which is None where it was not finite, as a float."""
    return float("nan") if value is None else float(value)


def spread(mean: float, deviation: float, digits: int = 1) -> str:
    """`mean ± sd`, or the mean alone where one seed gives no spread."""
    text = f"{mean:.{digits}f}"
    return text if deviation != deviation else f"{text} ± {deviation:.{digits}f}"


def joined(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def counted(number: int, unit: str) -> str:
    """``3 tasks``, or ``1 task``."""
    return f"{number} {unit}{'' if number == 1 else 's'}"


def sentence(text: str) -> str:
    """`text` with a capital at its beginning."""
    return text[:1].upper() + text[1:]
