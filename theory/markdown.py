"""Markdown of texts that may hold anything: escaped words, code, tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

__all__ = ["code", "escape", "fenced", "replaced", "rewritten", "rows_table"]

_SPECIAL = re.compile(r"([\\`*_\[\]<>$#|~{}^])")


def escape(text: str) -> str:
    r"""Plain text, so that Markdown shows it as it is.

    Example:
        >>> print(escape("a_b <c>"))
        a\_b \<c\>
    """
    return _SPECIAL.sub(r"\\\1", text)


def code(text: str) -> str:
    """A code span that holds any text, on one line."""
    text = " ".join(text.split())
    fence = "`" * (max([0, *(len(run) for run in re.findall("`+", text))]) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def fenced(text: str, language: str = "text") -> str:
    """A code block that holds any text."""
    fence = "`" * max([2, *(len(run) for run in re.findall("`{3,}", text))]) + "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def rows_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already, each put on one line."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = (re.sub(r"(?<!\\)\|", r"\\|", " ".join(cell.split())) for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replaced(text: str, begin: str, end: str, block: str) -> str | None:
    r"""`text` with `block` between two markers; None where one of them is not there.

    Example:
        >>> replaced("a <b>old</b> c", "<b>", "</b>", "new")
        'a <b>new</b> c'
    """
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    return before + begin + block + end + after if found and closed else None


def rewritten(file: Path, begin: str, end: str, block: Callable[[], str]) -> bool:
    """Put what `block` makes between two markers of a file; False where no file has them."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if replaced(text, begin, end, "") is None:
        return False
    file.write_text(str(replaced(text, begin, end, block())), encoding="utf-8")
    return True
