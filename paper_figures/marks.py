"""The looks of delta methods, and the marks that several figures share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deltacontrol.paper_figures.methods import Look, declared

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


def letter(axes: Iterable[Axes]) -> None:
    """Put (a), (b), … before each title."""
    for index, ax in enumerate(axes):
        ax.set_title(f"({chr(ord('a') + index)}) {ax.get_title(loc='left')}", loc="left")


def percent(axis: Axis) -> None:
    """Label shares as percentages; the axis label says that they are."""
    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))


def headroom(ax: Axes, share: float) -> None:
    """Raise the top of a logarithmic axis by `share` of its height, for a legend."""
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** share)


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
