"""Run records as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltacontrol.experiments.runs.experiment import canonical_json
from deltacontrol.experiments.runs.index import no_collection
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore, both_homes
from deltacontrol.theory.arguments import typed

if TYPE_CHECKING:
    import pandas as pd

PLAIN = (bool, int, float, str)


@typed
def runs(root: Path | str = "runs", *, committed: bool = True) -> pd.DataFrame:
    """All records as a table, the newest first.

    Args:
        root: The user's folder of records.
        committed: Whether to list the records that come with the package too.

    Returns:
        One row a record: ``id``, ``kind``, ``home`` ("own" or "committed"), ``status``, ``date``,
        the fields of the configuration that differ between records, and the plain fields of the
        result; a field of the result that the configuration has too is called ``result.FIELD``.
    """
    store = both_homes(root) if committed else RunStore(Path(root))
    return table(store.listed(), store.root)


def table(records: Sequence[Record], root: Path) -> pd.DataFrame:
    """The table of `runs` for the given records, of which those in `root` are the user's own."""
    import pandas as pd

    with no_collection():
        rows = _rows(records, root)
    table = pd.DataFrame(rows)
    if rows:
        table = table.sort_values("date", ascending=False, kind="stable", ignore_index=True)
    return table


def _rows(records: Sequence[Record], root: Path) -> list[dict[str, Any]]:
    configs = [flat(record.config) for record in records]
    first: dict[str, Any] = {}
    different: set[str] = set()
    for config in configs:
        for name, value in config.items():
            if first.setdefault(name, value) != value:
                different.add(name)
    differing = [name for name in first if name in different or len(records) == 1]
    rows = []
    for record, config in zip(records, configs, strict=True):
        row = {
            "id": record.id,
            "kind": record.kind,
            "home": "own" if record.folder.parent == root else "committed",
            "status": record.status,
            "date": record.provenance.get("finished", ""),
        }
        head = set(row)
        row |= {n: config[n] for n in differing if n in config and n not in head}
        for name, value in record.result.items():
            if value is None or isinstance(value, PLAIN):
                row[f"result.{name}" if name in head or name in first else name] = value
        rows.append(row)
    return rows


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration by columns; deltas by their names, and each of their fields by itself."""
    cells: dict[str, Any] = {}
    for name, value in config.items():
        if value is None or isinstance(value, PLAIN):
            cells[name] = value
            continue
        parts: list[Any] = value if isinstance(value, list) and value else [value]
        if all(isinstance(part, dict) and "name" in part for part in parts):
            cells[name] = "+".join(part["name"] for part in parts)
            for part in parts:
                fields = {k: v for k, v in part.items() if k != "name"}
                cells |= {f"{part['name']}.{k}": _cell(v) for k, v in fields.items()}
        else:
            cells[name] = _cell(value)
    return cells


def _cell(value: Any) -> Any:
    return canonical_json(value) if isinstance(value, list | dict) else value
