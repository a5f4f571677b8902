"""Markdown from what the code says: escaped text, tables, and docstrings."""

from __future__ import annotations

import inspect
import posixpath
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from deltacontrol.theory.markdown import code, escape, rows_table
from deltacontrol.theory.markdown import fenced as _fenced

ROOT = Path(__file__).resolve().parents[2]
Pages = dict[str, Callable[[], str]]
Resolve = Callable[[str], str | None]  # from a name in backticks to a reference, if it is known

_CODE = re.compile(r"(?::[\w:]+:)?(``.+?``|`[^`]+`)", re.DOTALL)
_SECTION = re.compile(
    r"(Args|Attributes|Class attributes|Returns|Raises|Yields|Examples?|References?|Notes?):$"
)
_FIELDS = ("Args", "Attributes", "Class attributes", "Raises")
_ENTRY = re.compile(r"(\*{0,2}[\w., ]+?):(?:\s+(.*))?$")
_ITEM = re.compile(r"(- |\* |\d+\. )")
_RULE = re.compile(r"=+(?:\s+=+)+\s*$")


def _plain(text: str) -> str:
    """Text without code, its *emphasis* kept."""
    return re.sub(r"(?<![\w\\])\\\*(\w[^*]*?[\w.)])\\\*(?!\w)", r"*\1*", escape(text))


def inline(text: str, resolve: Resolve | None = None) -> str:
    """Text with code in single or double backticks; names that are known become links."""
    pieces, last = [], 0
    for match in _CODE.finditer(text):
        pieces.append(_plain(text[last : match.start()]))
        inner = " ".join(match[1].strip("`").split())
        pieces.append((resolve(inner) if resolve else None) or code(inner))
        last = match.end()
    return "".join([*pieces, _plain(text[last:])])


def fenced(text: str, language: str = "text", css: str = "") -> str:
    """A code block; with a class of the style sheet where one is named."""
    block = _fenced(text, language)
    return f":::{{div}} {css}\n{block}\n:::" if css else block


def table(head: Sequence[str], rows: Iterable[Sequence[str]], css: str = "") -> str:
    """A table of cells that are Markdown already, which scrolls by itself on a narrow screen."""
    return "\n".join([f":::{{div}} wide-table {css}".rstrip(), rows_table(head, rows), ":::"])


def facts(rows: Mapping[str, str]) -> str:
    """A table of two columns without a heading of its own; rows without a value are left out."""
    cells = [(f"**{name}**", value) for name, value in rows.items() if value]
    return table(("", ""), cells, "facts")


def toctree(pages: Iterable[str], *, hidden: bool = False, caption: str = "") -> str:
    """A table of contents of these pages."""
    options = [":maxdepth: 1", ":hidden:" if hidden else "", f":caption: {caption}" * bool(caption)]
    return "\n".join(["```{toctree}", *filter(None, options), "", *pages, "```"])


def code_link(page: str, file: Path | str, text: str = "") -> str:
    """A link from a page to the page that shows a file of the checkout."""
    place = Path(file).resolve().relative_to(ROOT) if Path(file).is_absolute() else Path(file)
    target = posixpath.relpath(f"code/{place.as_posix()}.html", posixpath.dirname(page) or ".")
    shown = escape(text or place.as_posix())  # between tags Markdown reads on
    return f'<a class="code-link" href="{target}"><code>{shown}</code></a>'


def docstring(text: str | None, resolve: Resolve | None = None) -> str:
    """A docstring as Markdown: paragraphs, lists, formulas, tables, examples, sections."""
    return _blocks(inspect.cleandoc(text or "").splitlines(), resolve)


def after_first(text: str | None) -> str:
    """A docstring without its first paragraph."""
    return inspect.cleandoc(text or "").partition("\n\n")[2]


def first_line(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def attributes(kind: type) -> dict[str, str]:
    """What the docstrings of a class, and of those above it, say of each attribute."""
    found: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        lines = inspect.cleandoc(parent.__dict__.get("__doc__") or "").splitlines()
        for place, line in enumerate(lines):
            if line in ("Attributes:", "Class attributes:", "Args:"):
                for names, text in _entries(_indented(lines, place + 1)):
                    found |= {name.strip(" *"): text for name in names.split(",")}
    return found


def without_sections(text: str | None, *names: str) -> str:
    """A docstring without some of its sections."""
    lines, kept, place = inspect.cleandoc(text or "").splitlines(), [], 0
    while place < len(lines):
        if lines[place].rstrip(":") in names and lines[place].endswith(":"):
            place += 1 + len(_indented(lines, place + 1))
            continue
        kept.append(lines[place])
        place += 1
    return "\n".join(kept)


def _indented(lines: Sequence[str], start: int) -> list[str]:
    """The lines from `start` on that are blank or indented."""
    found = []
    for line in lines[start:]:
        if line.strip() and not line.startswith(" "):
            break
        found.append(line)
    return found


def _entries(lines: Sequence[str]) -> list[tuple[str, str]]:
    """Name and text of each entry of a section; an entry begins in the first column."""
    found: list[tuple[str, list[str]]] = []
    for line in textwrap.dedent("\n".join(lines)).splitlines():
        match = _ENTRY.match(line)
        if match and not line.startswith(" "):
            found.append((match[1], [match[2] or ""]))
        elif found:
            found[-1][1].append(line.strip())
        elif line.strip():
            found.append(("", [line]))
    return [(name, "\n".join(text).strip()) for name, text in found]


def _blocks(lines: list[str], resolve: Resolve | None) -> str:
    out: list[str] = []
    place = 0
    while place < len(lines):
        line = lines[place]
        if not line.strip():
            place += 1
        elif _SECTION.match(line):
            inside = _indented(lines, place + 1)
            out.append(_section(line[:-1], inside, resolve))
            place += 1 + len(inside)
        elif _RULE.match(line):
            ends = [n for n in range(place, len(lines)) if _RULE.match(lines[n])][:3]
            out.append(_simple_table(lines[ends[0] : ends[-1] + 1], resolve))
            place = ends[-1] + 1
        elif line.startswith(" "):
            block = _indented(lines, place)
            inside = textwrap.dedent("\n".join(block)).strip("\n").splitlines()
            is_table = bool(inside and _RULE.match(inside[0]))
            out.append(_blocks(inside, resolve) if is_table else _literal(block))
            place += len(block)
        elif line.startswith(">>> "):
            block = _until_blank(lines, place)
            out.append(fenced("\n".join(block), "pycon"))
            place += len(block)
        elif _ITEM.match(line):
            block = [line, *_item_rest(lines, place + 1)]
            marker = _ITEM.match(line)
            assert marker is not None
            rest = " ".join(text.strip() for text in (line[marker.end() :], *block[1:]))
            out.append(f"{marker[1]}{inline(rest, resolve)}")
            place += len(block)
        else:
            block = _paragraph(lines, place)
            text = re.sub(r"::$", ":", " ".join(block))
            out.append(inline(text, resolve))
            place += len(block)
    return "\n\n".join(filter(None, out))


def _until_blank(lines: Sequence[str], start: int) -> list[str]:
    found = []
    for line in lines[start:]:
        if not line.strip():
            break
        found.append(line)
    return found


def _item_rest(lines: Sequence[str], start: int) -> list[str]:
    found = []
    for line in lines[start:]:
        if not line.startswith(" "):
            break
        found.append(line)
    return found


def _paragraph(lines: Sequence[str], start: int) -> list[str]:
    found = []
    for line in lines[start:]:
        if not line.strip() or (found and (line.startswith("    ") or _ITEM.match(line))):
            break
        found.append(line.strip())
    return found


def _literal(block: Sequence[str]) -> str:
    text = textwrap.dedent("\n".join(block)).strip("\n")
    if text.startswith(">>> "):
        return fenced(text, "pycon")
    python = re.match(r"(import|from) \w|\w+ = dc\.|deltacontrol ", text)
    return fenced(text, ("shell" if text.startswith("deltacontrol ") else "python") if python
                  else "text")  # fmt: skip


def _section(name: str, inside: list[str], resolve: Resolve | None) -> str:
    if name.startswith("Example"):
        return f"**Example**\n\n{_blocks(_dedented(inside), resolve)}"
    if name not in _FIELDS:
        return f"**{name}**\n\n{_blocks(_dedented(inside), resolve)}"
    title = {"Args": "Arguments"}.get(name, name)
    rows = []
    for entry, text in _entries(inside):
        shown = f"{code(entry)}: " if entry else ""
        body = _blocks(text.splitlines(), resolve)
        rows.append(textwrap.indent(f"{shown}{body}", "  ").replace("  ", "- ", 1))
    return f"**{title}**\n\n" + "\n".join(rows)


def _dedented(lines: Sequence[str]) -> list[str]:
    return textwrap.dedent("\n".join(lines)).splitlines()


def _simple_table(lines: Sequence[str], resolve: Resolve | None) -> str:
    """A table between rules of equal signs, whose gaps tell the columns."""
    spans = [(m.start(), m.end()) for m in re.finditer("=+", lines[0])]
    ends = [*(start for start, _ in spans[1:]), None]
    rows: list[list[str]] = []
    for line in lines:
        if _RULE.match(line):
            continue
        cells = [line[a:b].strip() for (a, _), b in zip(spans, ends, strict=True)]
        if rows and not cells[0]:
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
        else:
            rows.append(cells)
    return table(rows[0], [[inline(cell, resolve) for cell in row] for row in rows[1:]])
