"""``deltacontrol runs``: what has been computed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from deltacontrol.experiments.runs.failures import failures
from deltacontrol.experiments.runs.store import Record, RunStore, both_homes
from deltacontrol.experiments.runs.upgrade import upgrade
from deltacontrol.theory.errors import InputError, unknown


@dataclass(frozen=True)
class Runs:
    """List recorded runs: your own, or those that come with the package as well.

    For example

        deltacontrol runs --where task=movie delta=lora --sort accuracy --limit 5

    Attributes:
        runs: Your folder of records.
        committed: List the records that come with the package too.
        where: Conditions FIELD=VALUE on columns of the list or on fields of the configuration.
        sort: Column to sort by, the largest first.
        limit: Rows to print; 0 prints all.
        show: Id of a run (or its beginning), in either home: print the whole record.
        csv: Write the chosen rows, all of them, to this file.
        upgrade: Bring records of earlier versions in the folder to today's form first.
        failed: List the runs in your folder that failed, and why, instead.
    """

    runs: Path = Path("runs")
    committed: bool = False
    where: tuple[str, ...] = ()
    sort: str = "date"
    limit: int = 20
    show: str | None = None
    csv: Path | None = None
    upgrade: bool = False
    failed: bool = False

    def run(self) -> None:
        """Print the list, or one record.

        Raises:
            InputError: A condition, a column or an id is wrong, or a record that was asked for is
                damaged.
        """
        import pandas as pd

        if self.limit < 0:
            raise InputError(f"limit is {self.limit}; expected a number of rows, or 0 for all")
        both = both_homes(self.runs)
        if self.show is not None:
            idle = {"--where": self.where, "--csv": self.csv, "--failed": self.failed}
            if given := [word for word, value in idle.items() if value]:
                raise InputError(
                    f"{', '.join(given)} goes with the list of runs, and --show prints one run; "
                    "leave one of them out"
                )
        if self.upgrade:
            self._upgrade()
        if self.show is not None:
            print(json.dumps(_document(both.get(self.show)), indent=1))
            return
        if self.failed:
            self._failures()
            return
        store = both if self.committed else RunStore(self.runs)
        records = store.listed()
        if not records:
            print(f"no runs in {self.runs}; `deltacontrol finetune` makes one")
            return
        conditions = self._conditions(records)
        chosen = [record for record in records if _meets(record, conditions)]
        rows = pd.DataFrame([_row(record) for record in chosen], columns=list(_row(records[0])))
        if self.sort not in rows:
            raise unknown("column", self.sort, rows.columns)
        table = rows.sort_values(self.sort, ascending=False, kind="stable")
        shown = table.head(self.limit) if self.limit else table
        if len(shown):
            print(shown.to_string(index=False, na_rep=""))
        if len(shown) < len(records):
            print(f"{len(shown)} of {len(chosen)} that were asked for, of {len(records)} runs")
        if self.csv is not None:
            table.to_csv(self.csv, index=False)

    def _failures(self) -> None:
        found = failures(self.runs)
        shown = found[: self.limit] if self.limit else found
        for failure in shown:
            print(f"{failure.id}  {failure.date}  {failure.label}\n    {failure.reason}")
        if not found:
            print(f"no run in {self.runs} failed")
        elif len(shown) < len(found):
            print(f"{len(shown)} of {len(found)} failed runs")

    def _upgrade(self) -> None:
        done, failures = 0, []
        for folder in RunStore(self.runs).folders():
            try:
                upgrade(folder)
                done += 1
            except (InputError, OSError) as error:
                failures.append(f"{folder.name}: {error}")
        print(f"{done} records in {self.runs} are in today's form")
        if failures:
            raise InputError("some records are left as they were:\n" + "\n".join(failures))

    def _conditions(self, records: list[Record]) -> list[tuple[str, str]]:
        known = set(_row(records[0])).union(*(record.config for record in records))
        found = []
        for condition in self.where:
            name, equals, value = condition.partition("=")
            if not equals:
                raise InputError(f"{condition!r} is not FIELD=VALUE, such as task=movie")
            if name not in known:
                raise unknown("column or field of the configuration", name, known)
            found.append((name, value))
        return found


def _meets(record: Record, conditions: list[tuple[str, str]]) -> bool:
    if not conditions:
        return True
    shown = {name: value for name, value in _row(record).items() if value is not None}
    fields = record.config | shown
    return all(
        str(fields.get(name)) == value or _same_number(fields.get(name), value)
        for name, value in conditions
    )


def _same_number(found: object, wanted: str) -> bool:
    try:
        return isinstance(found, int | float) and float(wanted) == found
    except ValueError:
        return False


def _row(record: Record) -> dict:
    config, result = record.config, record.result
    deltas = config.get("deltas") or [config.get("delta", {})]
    named = [delta["name"] if isinstance(delta, dict) else str(delta) for delta in deltas if delta]
    return {
        "id": record.id,
        "kind": record.kind,
        "model": config.get("model") or result.get("model"),
        "task": config.get("task"),
        "delta": "+".join(named),
        "seed": config.get("seed"),
        "rate": config.get("learning_rate"),
        "status": record.status,
        "accuracy": result.get("accuracy"),
        "loss": result.get("loss"),
        "date": record.provenance.get("finished", ""),
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
