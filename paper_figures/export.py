"""Write a figure's files. The same records give the same bytes.

`NAME.pdf`, `NAME.png`, `NAME.csv` (the table), `NAME-curves.csv`, `NAME.tex` (the summary) and
`NAME.txt` (the caption). No file holds a time, so a redraw that changes nothing changes no file.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import STYLE, FigureModule
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

PNG_DPI = 300


@dataclass(frozen=True)
class Exported:
    """What was written: the files, and the two texts that a reader sees first."""

    files: tuple[Path, ...]
    summary: DataFrame
    caption: str


def export(name: str, figure: FigureModule, records: Sequence[Record], out: Path) -> Exported:
    """Compute the tables of `figure` from `records`, draw it, and write everything to `out`.

    Raises:
        InputError: `out` cannot be written.
    """
    import matplotlib.style

    table = figure.table(records)
    curves = figure.curves(records)
    summary, caption = figure.summary(table), figure.caption(table)
    contents: dict[str, bytes] = {
        f"{name}.csv": to_csv(table),
        f"{name}-curves.csv": to_csv(curves),
        f"{name}.tex": to_latex(summary).encode(),
        f"{name}.txt": f"{caption}\n".encode(),
    }
    matplotlib.use("Agg")
    # The reset makes a user's own matplotlibrc count for nothing.
    with matplotlib.style.context(["default", STYLE]):
        picture = figure.draw(table, curves)
        contents[f"{name}.pdf"] = _saved(picture, format="pdf", metadata={"CreationDate": None})
        picture.set_layout_engine("none")  # the places are found; finding them takes half the time
        contents[f"{name}.png"] = _saved(
            picture, format="png", dpi=PNG_DPI, metadata={"Software": None}
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = tuple(_replace(out / file, data) for file, data in contents.items())
    except OSError as error:
        raise InputError(f"cannot write figures to {out}: {error.strerror or error}") from error
    return Exported(files, summary, caption)


def to_csv(table: DataFrame) -> bytes:
    """`table` as CSV, with 10 significant digits and Unix line ends."""
    return table.to_csv(index=False, float_format="%.10g", lineterminator="\n").encode()


def to_latex(summary: DataFrame) -> str:
    """`summary` as a booktabs tabular; every cell is text already."""
    columns = [_latex(str(column)) for column in summary.columns]
    rows = [[_latex(str(cell)) for cell in row] for row in summary.itertuples(index=False)]
    lines = [f"\\begin{{tabular}}{{{'l' * len(columns)}}}", "\\toprule"]
    lines += [" & ".join(columns) + r" \\", "\\midrule"]
    lines += [" & ".join(row) + r" \\" for row in rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


_LATEX: dict[str, str] = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "–": "--",
    "‖": r"$\Vert$",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _saved(picture: Figure, **options: object) -> bytes:
    buffer = BytesIO()
    save: Callable[..., None] = picture.savefig
    save(buffer, **options)
    return buffer.getvalue()


def _replace(path: Path, data: bytes) -> Path:
    """Write through a neighbour, so that a reader never meets half a file."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
