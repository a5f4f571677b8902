"""Synthetic records of the figures, written as real runs are: through a `RunStore`.

A module of ``grids`` makes those of the figure of its name, and says a piece of the caption that
the figure must draw from them. A figure that has none is tested on its committed records.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import COMMITTED, RunStore
from deltacontrol.paper_figures import base
from tests.paper_figures.made_up import Grid, Synthetic

__all__ = ["GRIDS", "MODULES", "Grid", "Synthetic", "committed", "write"]

MODULES: dict[str, ModuleType] = {
    path.stem: importlib.import_module(f"tests.paper_figures.grids.{path.stem}")
    for path in sorted(Path(__file__).with_name("grids").glob("*.py"))
}
GRIDS: dict[str, Callable[..., Grid]] = {name: module.grid for name, module in MODULES.items()}


def write(store: RunStore, grid: Grid) -> list[Record]:
    return [store.write(e, result, curve, status="completed") for e, result, curve in grid]


def committed(name: str) -> list[Record]:
    """The committed records of a figure; a failure where there are none."""
    folder = COMMITTED / "figures" / base.load(name).STUDY
    found = RunStore(folder).records() if folder.exists() else []
    assert found, (
        f"the figure {name} has no records to be tested on: publish them (deltacontrol figures "
        f"--only {name} --preset paper --publish), or write tests/paper_figures/grids/{name}.py"
    )
    return list(found)
