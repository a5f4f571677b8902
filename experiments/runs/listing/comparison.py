"""Two records side by side: what they were asked, what they rest on, what came out."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from deltacontrol.experiments.runs.experiment import canonical_json
from deltacontrol.experiments.runs.listing.fields import is_number
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.table import PLAIN, flat

Cells = tuple[str, ...]


def lines(first: Record, second: Record, width: int) -> list[str]:
    """Fields that differ, then all results with their difference, then what is the same.

    A cell that is too wide for the terminal is cut.

    Args:
        first: A record.
        second: Another one.
        width: letters a line.
    """
    configs = [{"kind": r.kind, **flat(r.config)} for r in (first, second)]
    different, same = _parted(*configs)
    rests, _ = _parted(_rests(first), _rests(second))
    sections: list[tuple[str, list[Cells]]] = [
        ("configuration", different or [("the same", "", "")]),
        ("what it rests on", rests or [("the same", "", "")]),
        ("result", _results(first, second)),
    ]
    heading = ("", first.id, second.id, "difference")
    rows = [cells for _, section in sections for cells in section]
    sizes = _sizes([heading, *rows], width)
    found = [_line(heading, sizes)]
    for title, section in sections:
        found.append(f"{title}:")
        found += [_line(cells, sizes) for cells in section]
    if same:
        found += textwrap.wrap(
            f"the same in both: {', '.join(same)}", width, subsequent_indent="  "
        )
    return found


def _parted(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[Cells], list[str]]:
    """Rows of what differs, and what does not, as words."""
    different, same = [], []
    for name in dict.fromkeys([*a, *b]):
        if name in a and name in b and a[name] == b[name]:
            same.append(f"{name} {_text(a[name])}")
        else:
            cells = (_text(side[name]) if name in side else "-" for side in (a, b))
            different.append((f"  {name}", *cells))
    return different, same


def _rests(record: Record) -> dict[str, Any]:
    """Digests, code, machine and packages of a record."""
    given = record.provenance
    digests, project = given.get("digests") or {}, given.get("project") or {}
    modified = " and changes" if project.get("modified") else ""
    found = {f"{name} files": str(digest)[:12] for name, digest in digests.items() if digest}
    found |= {"project": f"{project.get('commit') or 'unknown'}"[:12] + modified}
    found |= {f"{name}": value for name, value in (given.get("hardware") or {}).items()}
    return found | {f"{name}": value for name, value in (given.get("packages") or {}).items()}


def _results(first: Record, second: Record) -> list[Cells]:
    sides = [
        {"status": r.status, **({"message": r.message} if r.message else {}), **r.result}
        for r in (first, second)
    ]
    sides = [s | {"finished": r.provenance.get("finished"),
                  "wall_seconds": r.provenance.get("wall_seconds")}
             for s, r in zip(sides, (first, second), strict=True)]  # fmt: skip
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        a, b = (side.get(name) for side in sides)
        if is_number(a) and is_number(b):
            rows.append((f"  {name}", _text(a), _text(b), f"{b - a:+.4g}" if a != b else "0"))
        elif _is_plain(a) and _is_plain(b):
            rows.append((f"  {name}", _text(a), _text(b), "" if a == b else "differs"))
        else:
            equal = canonical_json(a) == canonical_json(b)
            rows.append((f"  {name}", _amount(a), _amount(b), "same" if equal else "differs"))
    return rows


def _amount(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, list | dict) else _text(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, PLAIN)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if is_number(value) and abs(value) >= 10_000:
        return f"{value:,d}"
    return "none" if value is None else str(value)


def _sizes(rows: Sequence[Cells], width: int) -> list[int]:
    """Widths of the columns; the two of the records share what the others leave."""
    sizes = [max(len(row[i]) for row in rows if i < len(row)) for i in range(4)]
    room = max(24, width - sizes[0] - sizes[3] - 6)
    if sizes[1] + sizes[2] > room:
        small = min(sizes[1], sizes[2], room // 2)
        sizes[1:3] = [small, room - small] if sizes[1] <= sizes[2] else [room - small, small]
    return sizes


def _line(cells: Cells, sizes: Sequence[int]) -> str:
    shown = []
    for cell, size in zip(cells, sizes, strict=False):
        text = cell if len(cell) <= size else cell[: size - 1] + "…"
        shown.append(text.ljust(size))
    return "  ".join(shown).rstrip()
