"""A list of records in the width of a terminal: what tells them apart, and what came out.

The columns are the fields of the configuration that differ between the rows, then steps,
parameters, score and date. Where the width does not hold them all, the least telling ones are left
out and named below. What all rows have in common stands in one line below the list.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from deltacontrol.experiments.runs.listing.fields import CHIEF, deltas, differing, headline
from deltacontrol.experiments.runs.record import Record

Row = tuple[Record, dict[str, Any]]
# In this order from left to right; other fields of the configuration stand before the steps.
FIRST = ("id", *CHIEF)
LAST = ("steps", "parameters", "score", "status", "date")
# Of these, the first to be kept where there is little room; then other fields by their order.
KEPT = ("id", "delta", "score", "task", "model", "seed", "rate", "status", "kind", "parameters",
        "steps")  # fmt: skip
CHIEFLY = KEPT[:4]  # for which longer cells are cut, where there is little room
WIDEST = (34, 26, 20)  # letters of a cell
LEAST_ID = 8
# Names of one thing that another column shows already.
_SHOWN_ELSEWHERE = {"deltas", "learning_rate", "result.steps"}


def lines(rows: Sequence[Row], ids: Sequence[str], width: int) -> list[str]:
    """The list, its heading first.

    Args:
        rows: records with their fields (`fields.fields`), in order.
        ids: the ids of all records from which one is to be told by the beginning of its id.
        width: letters a line.
    """
    if not rows:
        return []
    whole = table(rows, ids)
    heading = {name: [title(name, rows)] for name in whole}
    for widest in WIDEST:
        columns = {name: [_cut(cell, widest) for cell in cells] for name, cells in whole.items()}
        sizes = {name: max(map(len, (*heading[name], *columns[name]))) for name in columns}
        shown, left_out = _fitting(sizes, width)
        if not set(CHIEFLY) & set(left_out):
            break
    right = {name for name in shown if all(_is_numeral(cell) for cell in columns[name])}
    found = []
    for source in (heading, columns):
        for i in range(len(source["id"])):
            cells = (
                source[name][i].rjust(sizes[name])
                if name in right
                else source[name][i].ljust(sizes[name])
                for name in shown
            )
            found.append("  ".join(cells).rstrip())
    if len(rows) > 1 and (common := _common(rows)):
        found += _filled(f"all: {', '.join(common)}", width)
    if left_out:
        found += _filled(f"no room for: {', '.join(left_out)}", width)
    return found


def table(rows: Sequence[Row], ids: Sequence[str] = ()) -> dict[str, list[str]]:
    """The columns of the list as text, however wide, by name; `title` gives their headings.

    Of one row, the chief fields of its configuration are columns. An id is as long as tells it
    from `ids` and from the others.
    """
    length = id_length([*ids, *(record.id for record, _ in rows)])
    different = differing([_told(record, row) for record, row in rows])
    results = {name for record, row in rows for name in row if name not in _configured(record)}
    if len(rows) == 1:
        different = [name for name in CHIEF if rows[0][1].get(name) is not None]
    inside = {f"{d['name']}." for record, _ in rows for d in deltas(record)}
    others = [
        name
        for name in different
        if name not in (*FIRST, *LAST, *_SHOWN_ELSEWHERE)
        and name not in results
        and not name.startswith(tuple(inside))  # in the cell of the delta
    ]
    names = [name for name in FIRST if name == "id" or name in different]
    names += others
    names += [name for name in LAST if name != "status" or _ended_otherwise(rows)]
    fields = _differing_fields(rows)
    columns = {}
    for name in names:
        if name == "delta":
            columns[name] = [delta_text(record, fields) for record, _ in rows]
        elif name == "id":
            columns[name] = [record.id[:length] for record, _ in rows]
        elif name == "date":
            columns[name] = [str(row[name])[:16].replace("T", " ") for _, row in rows]
        elif name == "score":
            columns[name] = [_score(record, row, rows) for record, row in rows]
        else:
            columns[name] = [_text(row.get(name)) for _, row in rows]
    return {name: cells for name, cells in columns.items() if any(cells)}


def title(name: str, rows: Sequence[Row]) -> str:
    """The heading of a column: of the score the metric, where all rows have the same."""
    metrics = {headline(record) for record, _ in rows}
    if name == "score" and len(metrics) == 1:
        return metrics.pop() or name
    return name


def label(row: Row, rows: Sequence[Row]) -> str:
    """A few words that tell a row from the others: those of its columns before the steps."""
    record, _ = row
    place = next(i for i, (other, _) in enumerate(rows) if other is record)
    columns = table(rows)
    names = [name for name in columns if name not in ("id", *LAST)]
    words = [
        cell if name in ("delta", "model", "task", "kind") else f"{name} {cell}"
        for name in names
        if (cell := columns[name][place])
    ]
    return ", ".join(words) or record.id[:LEAST_ID]


def delta_text(record: Record, named: Mapping[str, Sequence[str]]) -> str:
    """The names of the deltas, joined by +, with the `named` fields of each as in --delta."""
    parts = []
    for delta in deltas(record):
        given = [
            f"{field}={_argument(delta[field])}"
            for field in named.get(delta["name"], ())
            if field in delta
        ]
        parts.append(":".join([delta["name"], *filter(None, [",".join(given)])]))
    return "+".join(parts)


def id_length(ids: Sequence[str]) -> int:
    """How many letters tell all ids apart, at least eight."""
    longest = max(map(len, ids), default=LEAST_ID)
    return next(
        (n for n in range(LEAST_ID, longest) if len({text[:n] for text in ids}) == len(set(ids))),
        longest,
    )


def _told(record: Record, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the deltas' text in full, so that rows with other fields of a delta differ."""
    fields = {d["name"]: [n for n in d if n != "name"] for d in deltas(record)}
    return {**row, "delta": delta_text(record, fields) or None}


def _configured(record: Record) -> set[str]:
    names = {f"{d['name']}.{field}" for d in deltas(record) for field in d}
    return {"id", "kind", "delta", "rate", *record.config, *names}


def _differing_fields(rows: Sequence[Row]) -> dict[str, list[str]]:
    """For each delta, those of its fields that differ between rows which have it."""
    found: dict[str, list[str]] = {}
    values: dict[str, list[Mapping[str, Any]]] = {}
    for record, _ in rows:
        for delta in deltas(record):
            values.setdefault(delta["name"], []).append(delta)
    for name, given in values.items():
        found[name] = differing(given)
    return found


def _ended_otherwise(rows: Sequence[Row]) -> bool:
    return any(row["status"] != "completed" for _, row in rows)


def _score(record: Record, row: Mapping[str, Any], rows: Sequence[Row]) -> str:
    one = len({headline(other) for other, _ in rows}) == 1
    text = _text(row["score"])
    return text if one or not text else f"{text} {headline(record)}"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:,d}"
    return str(value)


def _argument(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else _text(value).replace(",", "")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _is_numeral(text: str) -> bool:
    return not text or text.lstrip("-")[:1].isdigit() and " " not in text and ":" not in text


def _fitting(sizes: Mapping[str, int], width: int) -> tuple[list[str], list[str]]:
    """The columns of these widths that fit, in their order, and those that do not."""
    ranks = {name: place for place, name in enumerate(KEPT)}
    by_rank = sorted(sizes, key=lambda name: ranks.get(name, len(KEPT) + (name == "date")))
    kept, used = set(), -2
    for name in by_rank:
        if not kept or used + 2 + sizes[name] <= width:
            kept.add(name)
            used += 2 + sizes[name]
    return [n for n in sizes if n in kept], [n for n in sizes if n not in kept]


def _common(rows: Sequence[Row]) -> list[str]:
    told = [_told(record, row) for record, row in rows]
    found = []
    for name in CHIEF:
        values = {str(row.get(name)) for row in told}
        value = rows[0][1].get(name)
        if len(values) == 1 and value is not None:
            found.append(f"{name} {_text(value)}")
    return found


def _filled(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False)
