"""What a figure is, and where figures are found.

A figure is one module of the folder `figures` that defines everything in `FigureModule`. The path
is always records → `table`, `curves` → `draw`: nothing is drawn that is not in a table, and each
table is written beside the picture, so a picture can be checked, or drawn otherwise, from its CSV
files.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from deltacontrol.experiments.runs.experiment import canonical_json
from deltacontrol.experiments.runs.record import Record
from deltacontrol.theory import plugins
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

FOLDER = Path(__file__).parent
FIGURES = FOLDER / "figures"
STYLE = FOLDER / "style.mplstyle"
GALLERY = FOLDER / "gallery"

COLUMN_WIDTH = 3.5
PAGE_WIDTH = 7.2


@runtime_checkable
class FigureModule(Protocol):
    """What the module of a figure defines.

    The rows of `table` and `curves` are sorted, under a plain index: they do not depend on the
    order of the records.

    Attributes:
        TITLE: One line that says what the figure shows.
        STUDY: The module of `deltacontrol.experiments.studies` whose records it is drawn from, or
            ``benchmarks/NAME`` for the committed record of a benchmark, or ``claims``.
    """

    __file__: str
    TITLE: str
    STUDY: str

    def table(self, records: Sequence[Record]) -> DataFrame:
        """One row per run (or per run and layer): every number drawn as a point."""
        ...

    def curves(self, records: Sequence[Record]) -> DataFrame:
        """Every number drawn as part of a line, in long form."""
        ...

    def summary(self, table: DataFrame) -> DataFrame:
        """The table that readers see, formatted, with spread over seeds."""
        ...

    def draw(self, table: DataFrame, curves: DataFrame) -> Figure:
        """The picture."""
        ...

    def caption(self, table: DataFrame) -> str:
        """The caption: what the figure shows in its first sentence, with numbers from `table`."""
        ...


def names() -> list[str]:
    """Names of all figures: the modules of the folder `figures`, and users' with a `STUDY`."""
    return list(plugins.merged("figure", dict.fromkeys(_own()), added().items()))


def _own() -> list[str]:
    return sorted(path.stem for path in FIGURES.glob("*.py") if path.stem != "__init__")


def added() -> dict[str, Any]:
    """Users' own figures by name."""
    return {
        Path(m.__file__ or m.__name__).stem: m for m in plugins.modules() if hasattr(m, "STUDY")
    }


def load(name: str) -> FigureModule:
    """Import the figure called `name`.

    Raises:
        InputError: There is no such figure, or its module lacks a part of `FigureModule`.
    """
    if name not in names():
        raise unknown("figure", name, names())
    module = added().get(name) or importlib.import_module(
        f"deltacontrol.paper_figures.figures.{name}"
    )
    if not isinstance(module, FigureModule):
        wanted = (w for w in FigureModule.__dict__ if not w.startswith("_"))
        annotated = FigureModule.__annotations__
        lacking = [w for w in (*annotated, *wanted) if not hasattr(module, w)]
        raise InputError(f"{module.__file__} must define {', '.join(lacking)}")
    return cast(FigureModule, module)


def finding(caption: str) -> str:
    """The first sentence of a caption: what the figure shows, with its numbers.

    Example:
        >>> finding("LoRA reaches 81.6 % of attn. output. Dots are seeds.")
        'LoRA reaches 81.6 % of attn. output.'
    """
    return re.split(r"(?<=\.) (?=[A-Z0-9(])", caption, maxsplit=1)[0]


def groups(frame: DataFrame, keys: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], DataFrame]]:
    """Rows of `frame` by the values of `keys`, in order of first appearance."""
    for values, rows in frame.groupby(list(keys), sort=False):
        yield (values if isinstance(values, tuple) else (values,)), rows


def check_replicates(records: Sequence[Record], labels: Sequence[object]) -> None:
    """Check that records of the same group differ in nothing but their seed.

    Means and spreads over seeds are taken within a group; pooling two settings there would draw a
    number that belongs to neither.

    Args:
        records: The records.
        labels: For each record, the group that it is averaged in.

    Raises:
        InputError: Two records of a group have different configurations or the same seed.
    """
    settings: dict[object, str] = {}
    seen: set[tuple[object, object]] = set()
    for record, group in zip(records, labels, strict=True):
        seed = record.config.get("seed")
        rest = canonical_json({k: v for k, v in record.config.items() if k != "seed"})
        if settings.setdefault(group, rest) != rest:
            raise InputError(
                f"records of {group} differ in more than their seed (run {record.id}); "
                "draw from a folder that holds the runs of one study only"
            )
        if (group, seed) in seen:
            raise InputError(
                f"two records of {group} have seed {seed} (run {record.id}), computed with other "
                "model or data files; delete the one that is out of date"
            )
        seen.add((group, seed))
