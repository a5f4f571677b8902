"""One figure, for a notebook: the picture itself, without files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deltacontrol.experiments.runs.store import both_homes
from deltacontrol.paper_figures import base, collect
from deltacontrol.theory.arguments import typed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure"]


@typed
def figure(
    name: str, preset: Literal["paper", "quick"] = "paper", *, runs: str | Path = "runs"
) -> Figure:
    """The figure called ``name``.

    Args:
        name: one of `deltacontrol.paper_figures.base.names`.
        preset: "paper" draws from the records that come with the package and computes nothing;
            "quick" runs a small grid on this machine first, skipping what ``runs`` has, except for
            a benchmark.
        runs: the folder of your records.

    Raises:
        InputError: there is no such figure, or its records are missing.

    Example:
        >>> from deltacontrol.paper_figures.drawing import figure
        >>> figure("taxonomy").axes != []
        True
    """
    import matplotlib.style

    module = base.load(name)
    if preset == "paper" or collect.is_fixed(module.STUDY):
        records = collect.committed(module.STUDY)
    else:
        records = collect.computed(both_homes(runs), collect.study(module.STUDY, preset))
    with matplotlib.style.context(["default", base.STYLE]):
        picture = module.draw(module.table(records), module.curves(records))
        # Laid out here, since a style counts while something is drawn, not afterwards.
        picture.canvas.draw()
    return picture
