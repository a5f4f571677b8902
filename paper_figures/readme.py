"""The gallery in README.md: each figure's picture, what it shows, and the command that draws it.

What a figure shows is the first sentence of its caption, whose numbers are computed from the
committed records.
"""

from __future__ import annotations

from pathlib import Path

from deltacontrol.experiments.runs.store import COMMITTED
from deltacontrol.paper_figures import base, collect
from deltacontrol.theory.markdown import code, rewritten, rows_table

README = COMMITTED.parents[1] / "README.md"
BEGIN, END = "<!-- figures:begin -->\n", "<!-- figures:end -->"
WIDTH = 320  # of a picture, in pixels


def markdown() -> str:
    """The gallery as a table of Markdown."""
    return rows_table(["figure", "what it shows"], [cells(name) for name in own()]) + "\n"


def own() -> list[str]:
    """Names of this project's figures, which are in the gallery."""
    return [name for name in base.names() if name not in base.added()]


def cells(name: str) -> tuple[str, str]:
    """The picture, and beside it name, finding and command."""
    figure = base.load(name)
    caption = figure.caption(figure.table(collect.committed(figure.STUDY)))
    path = f"paper_figures/gallery/{name}.png"
    picture = f'<a href="{path}"><img src="{path}" alt="{figure.TITLE}" width="{WIDTH}"></a>'
    command = code(f"deltacontrol figures --only {name} --preset paper")
    return picture, f"**{name}.** {base.finding(caption)}<br><br>{command}"


def update(readme: Path | None = None) -> bool:
    """Put the gallery between the README's markers; False where there is no README with them."""
    return rewritten(readme or README, BEGIN, END, markdown)
