"""The fields of a record by name, and records chosen and sorted by them.

Names are those of the configuration (a delta's own fields are DELTA.FIELD, such as lora.rank) and
of the result, where it has another meaning result.FIELD, and these:

    id, kind, status, date    of the record; date is when it finished
    delta                     the names of the deltas, joined by +
    rate                      the learning rate
    parameters                how many are trained
    score                     the first of `HEADLINES` that is a number in the result
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.table import PLAIN, flat
from deltacontrol.theory.errors import InputError, unknown

HEADLINES = ("accuracy", "pearson", "perplexity", "dimension", "objective", "loss")
CHIEF = ("kind", "model", "task", "delta", "seed", "rate")
PARAMETERS = ("num_trainable", "num_controls", "num_parameters")


def fields(record: Record) -> dict[str, Any]:
    """All plain fields of a record by name."""
    config, result = flat(record.config), record.result
    head = {
        "id": record.id,
        "kind": record.kind,
        "status": record.status,
        "date": record.provenance.get("finished", ""),
    }
    found = head | {name: value for name, value in config.items() if name not in head}
    for name, value in result.items():
        if value is None or isinstance(value, PLAIN):
            found[f"result.{name}" if name in found else name] = value
    named = "+".join(delta["name"] for delta in deltas(record))
    others = {
        "rate": config.get("learning_rate"),
        "steps": result.get("num_steps"),
        "parameters": next((result[n] for n in PARAMETERS if is_number(result.get(n))), None),
        "score": result.get(headline(record) or ""),
    }
    return {**others, **found, "delta": named or None}


def deltas(record: Record) -> list[Mapping[str, Any]]:
    """The deltas of a record's configuration, each with its name and, where they are kept, more."""
    given = record.config.get("deltas") or [record.config.get("delta")]
    parts = given if isinstance(given, list) else [given]
    named = [isinstance(part, Mapping) and isinstance(part.get("name"), str) for part in parts]
    return [
        part if whole else {"name": str(part)}
        for part, whole in zip(parts, named, strict=True)
        if part
    ]


def headline(record: Record) -> str | None:
    """Which field of the result is its score."""
    return next((name for name in HEADLINES if is_number(record.result.get(name))), None)


def chosen(
    records: Sequence[Record], conditions: Iterable[str]
) -> list[tuple[Record, dict[str, Any]]]:
    """The records that meet every condition FIELD=VALUE, each with its fields.

    Raises:
        InputError: a condition has no equals sign, or names a field that no record has.
    """
    rows = [(record, fields(record)) for record in records]
    known = {name for _, row in rows for name in row} | {n for r in records for n in r.config}
    known |= set(CHIEF)  # whether or not these runs have them
    pairs = []
    for condition in conditions:
        name, equals, value = condition.partition("=")
        if not equals:
            raise InputError(f"{condition!r} is not FIELD=VALUE, such as task=movie")
        if name not in known:
            raise unknown("column or field of the configuration", name, known)
        pairs.append((name, value))
    return [
        (record, row)
        for record, row in rows
        if all(_meets(row.get(name, record.config.get(name)), value) for name, value in pairs)
    ]


def ordered(
    rows: Sequence[tuple[Record, dict[str, Any]]], field: str, *, ascending: bool
) -> list[tuple[Record, dict[str, Any]]]:
    """The rows by a field, numbers before words, and those without it at the end.

    Raises:
        InputError: no row has such a field.
    """
    known = {name for _, row in rows for name in row}
    if rows and field not in known:
        raise unknown("column", field, known)
    having = [row for row in rows if not _missing(row[1].get(field))]
    lacking = [row for row in rows if _missing(row[1].get(field))]
    numbers = [row for row in having if is_number(row[1][field])]
    words = [row for row in having if not is_number(row[1][field])]
    numbers.sort(key=lambda row: row[1][field], reverse=not ascending)
    words.sort(key=lambda row: str(row[1][field]), reverse=not ascending)
    return [*numbers, *words, *lacking]


def differing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Fields with two different values among the rows, in the order of their appearance."""
    first: dict[str, Any] = {}
    different: dict[str, None] = {}
    for row in rows:
        for name, value in row.items():
            if name not in first:
                first[name] = value
            elif first[name] != value:
                different.setdefault(name)
    return [name for name in first if name in different]


def _meets(found: Any, wanted: str) -> bool:
    if str(found) == wanted:
        return True
    if isinstance(found, bool):  # true and false, as JSON and TOML write them
        return str(found).lower() == wanted.lower()
    try:
        return is_number(found) and float(wanted) == found
    except ValueError:
        return False


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a field is a number; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
