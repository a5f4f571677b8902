"""The empirical results of the primary source beside ours, over all figures that have some.

`markdown` is what README.md and the site show: one row a published result, the number of rows that
agree, and a paragraph on each that does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from deltacontrol.paper_figures import base, collect
from deltacontrol.paper_figures.agreement import WORDS, Agreement
from deltacontrol.paper_figures.marks import counted
from deltacontrol.paper_figures.readme import README
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.markdown import escape, rewritten, rows_table

BEGIN, END = "<!-- source:begin -->\n", "<!-- source:end -->"
HEAD = ("experiment", "the source finds", "theirs", "ours", "verdict")


def agreements(names: Iterable[str] | None = None) -> list[Agreement]:
    """The published results of the chosen figures; of all that have committed records by default.

    Raises:
        InputError: a chosen figure has no committed records, or no published results.
    """
    found: list[Agreement] = []
    for name in base.names() if names is None else names:
        figure = base.load(name)
        compare = getattr(figure, "agreement", None)
        if compare is None:
            if names is not None:
                raise InputError(f"the figure {name} has no published results beside its own")
            continue
        if names is None and not collect.is_published(figure.STUDY):
            continue
        found += compare(figure.table(collect.committed(figure.STUDY)))
    return found


def sentence(found: list[Agreement]) -> str:
    """How many agree, in one sentence.

    Example:
        >>> sentence([])
        'No published result stands beside ours yet.'
    """
    if not found:
        return "No published result stands beside ours yet."
    counts = Counter(one.verdict for one in found)
    told = []
    for word in WORDS.values():
        plural = word.removesuffix("s") if counts[word] > 1 else word
        told += [f"{counts[word]} {plural}"] if counts[word] else []
    rows = counted(len(dict.fromkeys(one.row for one in found)), "experiment")
    return f"Of {counted(len(found), 'published result')} in {rows}, {', '.join(told)}."


def markdown() -> str:
    """Sentence, table, and a paragraph on each disagreement."""
    found = agreements()
    parts = [sentence(found)]
    if found:
        parts.append(rows_table(HEAD, [[escape(cell) for cell in one.cells()] for one in found]))
    parts += [
        f"**{escape(one.row)}: {escape(one.says)}.** {escape(one.why)}"
        for one in found
        if one.agrees is False and one.why
    ]
    return "\n\n".join(parts) + "\n"


def update(readme: Path | None = None) -> bool:
    """Put it between the README's markers; False where there is no README with them."""
    return rewritten(readme or README, BEGIN, END, markdown)
