"""``deltacontrol runs``: what has been computed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from deltacontrol.experiments.runs.store import Record, RunStore


@dataclass(frozen=True)
class Runs:
    """List the recorded runs of a folder.

    Attributes:
        runs: Folder of the records.
        show: Id of a run (or its beginning): print the whole record.
        csv: Write the list to this file.
    """

    runs: Path = Path("runs")
    show: str | None = None
    csv: Path | None = None

    def run(self) -> None:
        """Print the list, or one record."""
        import pandas as pd

        store = RunStore(self.runs)
        if self.show is not None:
            print(json.dumps(_document(store.get(self.show)), indent=1))
            return
        records = store.records()
        if not records:
            print(f"no runs in {self.runs}; `deltacontrol finetune` makes one")
            return
        table = pd.DataFrame([_row(record) for record in records])
        print(table.to_string(index=False, na_rep=""))
        if self.csv is not None:
            table.to_csv(self.csv, index=False)


def _row(record: Record) -> dict:
    config, result = record.config, record.result
    deltas = config.get("deltas") or [config.get("delta", {})]
    return {
        "id": record.id,
        "kind": record.kind,
        "model": config.get("model"),
        "task": config.get("task"),
        "delta": "+".join(delta.get("name", "") for delta in deltas),
        "seed": config.get("seed"),
        "rate": config.get("learning_rate"),
        "status": record.status,
        "accuracy": result.get("accuracy"),
        "loss": result.get("loss"),
    }


def _document(record: Record) -> dict:
    return {
        "id": record.id,
        "kind": record.kind,
        "status": record.status,
        "message": record.message,
        "config": record.config,
        "result": record.result,
        "provenance": record.provenance,
    }


COMMAND = Runs
