"""Write a figure's files. The same records give the same bytes.

`NAME.pdf`, `NAME.png`, `NAME.csv` (the table), `NAME-curves.csv`, `NAME.tex` (the summary) and
`NAME.txt` (the caption), and `NAME-source.csv` where published results stand beside ours. No file
holds a time, so a redraw that changes nothing changes no file.
"""

from __future__ import annotations

import ast
import hashlib
import os
import unicodedata
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from deltacontrol.experiments.claims.code_digest import normalised
from deltacontrol.experiments.runs.record import Record
from deltacontrol.paper_figures.base import FOLDER, STYLE, FigureModule
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from deltacontrol.paper_figures.agreement import Agreement

PNG_DPI = 300
PACKAGE = "deltacontrol.paper_figures"


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
    compare = getattr(figure, "agreement", None)
    if compare is not None:
        contents[f"{name}-source.csv"] = to_csv(_beside(compare(table)))
    matplotlib.use("Agg")
    # The reset makes a user's own matplotlibrc count for nothing.
    with matplotlib.style.context(["default", STYLE]):
        picture = figure.draw(table, curves)
        contents[f"{name}.pdf"] = _saved(picture, format="pdf", metadata={"CreationDate": None})
        picture.set_layout_engine("none")  # the places are found; finding them takes half the time
        contents[f"{name}.png"] = _saved(
            picture,
            format="png",
            dpi=PNG_DPI,
            metadata={"Software": None, "Source": source_digest(figure, table, curves)},
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = tuple(_replace(out / file, data) for file, data in contents.items())
    except OSError as error:
        raise InputError(f"cannot write figures to {out}: {error.strerror or error}") from error
    return Exported(files, summary, caption)


def _beside(found: Sequence[Agreement]) -> DataFrame:
    """The published results of a figure beside ours."""
    import pandas as pd

    columns = ("experiment", "source", "published", "ours", "verdict")
    return pd.DataFrame([one.cells() for one in found], columns=list(columns))


def source_digest(figure: FigureModule, table: DataFrame, curves: DataFrame) -> str:
    """SHA-256 of what a picture is drawn from; the PNG carries it as the text ``Source``.

    It covers the tables, numbers to nine digits (machines differ in the last ones), the style sheet
    and the code, without comments and imports, of the figure's module and of what it imports of
    `paper_figures`. So most stale pictures are found without drawing; the colours that methods
    carry in their own files are not in it.
    """
    files = sorted(_drawing(Path(str(figure.__file__))))
    code = "".join(map(normalised, files)) + STYLE.read_text(encoding="utf-8")
    data = "".join(t.to_csv(index=False, float_format="%.9g") for t in (table, curves))
    return hashlib.sha256((code + data).encode()).hexdigest()


def _drawing(file: Path) -> set[Path]:
    """A figure's module and the modules of this package that it imports, directly or not."""
    found, waiting = set(), [file]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
                places = (n.removeprefix(PACKAGE).strip(".").replace(".", "/") for n in names)
                waiting += [p for n in places if (p := FOLDER / f"{n}.py").is_file()]
    return found


def to_csv(table: DataFrame) -> bytes:
    """`table` as CSV, with 10 significant digits and Unix line ends."""
    return table.to_csv(index=False, float_format="%.10g", lineterminator="\n").encode()


def to_latex(summary: DataFrame) -> str:
    r"""`summary` as a booktabs tabular; every cell is text already.

    The preamble needs `\usepackage{booktabs}` alone.

    Raises:
        InputError: A cell has a character that LaTeX does not set.
    """
    columns = [_latex(str(column)) for column in summary.columns]
    rows = [[_latex(str(cell)) for cell in row] for row in summary.itertuples(index=False)]
    lines = [f"\\begin{{tabular}}{{{'l' * len(columns)}}}", "\\toprule"]
    lines += [" & ".join(columns) + r" \\", "\\midrule"]
    lines += [" & ".join(row) + r" \\" for row in rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


_GREEK = dict(
    zip(
        "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ",
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau "
        "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega".split(),
        strict=True,
    )
)
# What LaTeX reads as a command, or does not have in its text fonts (< in OT1 is an inverted !). A
# bracket or star in braces is no argument of the line end before it.
_LATEX: dict[str, str] = (
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {character: f"{{{character}}}" for character in "[]*"}
    | {character: f"${character}$" for character in "<>|"}
    | {letter: f"$\\{name}$" for letter, name in _GREEK.items()}
    | {digit: f"$_{i}$" for i, digit in enumerate("₀₁₂₃₄₅₆₇₈₉")}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "·": r"$\cdot$",
        "−": "$-$",
        "≤": r"$\leq$",
        "≥": r"$\geq$",
        "≈": r"$\approx$",
        "∞": r"$\infty$",
        "∇": r"$\nabla$",
        "∂": r"$\partial$",
        "∈": r"$\in$",
        "√": r"$\surd$",
        "→": r"$\rightarrow$",
        "‖": r"$\Vert$",
        "⟨": r"$\langle$",
        "⟩": r"$\rangle$",
        "ℓ": r"$\ell$",
        "²": "$^2$",
        "½": r"$\frac{1}{2}$",
        "–": "--",
        "…": r"\ldots{}",
    }
)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character) or _plain(character) for character in text)


def _plain(character: str) -> str:
    """`character`, where LaTeX sets it as it is: ASCII, and Latin letters with accents."""
    if not character.isascii() and not unicodedata.name(character, "").startswith("LATIN"):
        raise InputError(
            f"{character!r} has no LaTeX form here, so that the table would not compile; add it "
            "to _LATEX in paper_figures/export.py, or rename what bears it"
        )
    return character


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
