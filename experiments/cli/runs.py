"""``deltacontrol runs``: what has been computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltacontrol.experiments.runs.failures import failures
from deltacontrol.experiments.runs.listing import comparison, curves, deletion, files, overview
from deltacontrol.experiments.runs.listing.fields import chosen, fields, ordered
from deltacontrol.experiments.runs.store import Record, RunStore, both_homes
from deltacontrol.experiments.runs.upgrade import upgrade
from deltacontrol.theory.errors import InputError

LEAST_WIDTH = 80
# What goes with each way to look at runs; the list takes all of these, a single run none.
_LIST = {"--where", "--sort", "--ascending", "--limit", "--committed", "--export"}
_GOES_WITH = {
    "--show": set(),
    "--compare": set(),
    "--plot": {"--out", "--where", "--committed", "--sort", "--ascending", "--limit"},
    "--delete": {"--yes"},
    "--failed": {"--limit"},
}


@dataclass(frozen=True)
class Runs:
    """List recorded runs by what tells them apart; compare, draw, export or delete them.

    The list has a column for each field of the configuration that differs between the runs, and
    steps, trained parameters, score and date; what all have in common stands below. An id may be
    given by its beginning.

    For example

        deltacontrol runs --where task=movie delta=lora --sort accuracy --limit 5
        deltacontrol runs --compare 3f2a 91c0
        deltacontrol runs --plot 3f2a 91c0 --out curve.png
        deltacontrol runs --where lora.rank=8 --plot
        deltacontrol runs --committed --export all.parquet
        deltacontrol runs --delete 3f2a

    Attributes:
        runs: Your folder of records.
        committed: List the records that come with the package too.
        where: Conditions FIELD=VALUE on columns of the list, or on any field of the configuration
            or the result; all must be met.
        sort: Field to sort by, the largest first.
        ascending: Sort with the smallest first.
        limit: Rows to print; 0 prints all.
        show: Id of a run, in either home: print the whole record.
        compare: Ids of two runs: their fields and results side by side.
        plot: Ids of runs whose curves to draw in one picture, the loss and the validation metric;
            without an id, those of the list.
        out: With --plot, the picture.
        export: Write the chosen rows, all of them, to a file .csv, .parquet or .tex.
        delete: Ids of runs of yours to delete, after a question; what comes with the package is
            never deleted.
        yes: With --delete, do not ask.
        upgrade: Bring records of earlier versions in the folder to today's form first.
        failed: List the runs in your folder that failed, and why, instead.
    """

    runs: Path = Path("runs")
    committed: bool = False
    where: tuple[str, ...] = ()
    sort: str = "date"
    ascending: bool = False
    limit: int = 20
    show: str | None = None
    compare: tuple[str, ...] = ()
    plot: tuple[str, ...] | None = None
    out: Path | None = None
    export: Path | None = None
    delete: tuple[str, ...] = ()
    yes: bool = False
    upgrade: bool = False
    failed: bool = False

    def run(self) -> int | None:
        """Print the list, or do what is asked with some runs; exit code 1 where it was not done.

        Raises:
            InputError: A condition, a field or an id is wrong, options do not go together, or a
                record that was asked for is damaged.
        """
        if self.limit < 0:
            raise InputError(f"limit is {self.limit}; expected a number of rows, or 0 for all")
        self._refuse_idle_options()
        if self.export is not None:
            files.require_suffix(self.export)
        both = both_homes(self.runs)
        if self.upgrade:
            self._upgrade()
        if self.show is not None:
            print(json.dumps(_document(both.get(self.show)), indent=1))
        elif self.compare:
            found = {r.id: r for r in map(both.get, self.compare)}
            if len(self.compare) != 2 or len(found) != 2:
                raise InputError(
                    f"--compare is given {' '.join(self.compare)}; expected the ids of two "
                    "different runs"
                )
            first, second = found.values()
            _print(comparison.lines(first, second, _width()))
        elif self.delete:
            return self._delete()
        elif self.failed:
            self._failures()
        elif self.plot:
            records = list({r.id: r for r in map(both.get, self.plot)}.values())
            self._draw([(record, fields(record)) for record in records])
        else:
            self._list(both)
        return None

    def _refuse_idle_options(self) -> None:
        """Raise `InputError` for an option that would be passed over."""
        given: Mapping[str, Any] = {
            "--show": self.show is not None,
            "--compare": self.compare,
            "--plot": self.plot is not None,
            "--delete": self.delete,
            "--failed": self.failed,
            "--where": self.where,
            "--sort": self.sort != "date",
            "--ascending": self.ascending,
            "--limit": self.limit != 20,
            "--committed": self.committed,
            "--export": self.export is not None,
            "--out": self.out is not None,
            "--yes": self.yes,
        }
        ways = [word for word in _GOES_WITH if given[word]]
        if len(ways) > 1:
            raise InputError(f"{' and '.join(ways)} do different things; give one of them")
        fitting = _GOES_WITH[ways[0]] if ways else _LIST
        if self.plot:  # of runs by their ids
            fitting = {"--out"}
        idle = [w for w in given if given[w] and w not in fitting and w not in ways]
        if not idle:
            return
        if not ways:
            owner = "--plot" if "--out" in idle else "--delete"
            raise InputError(f"{idle[0]} goes with {owner}; leave it out, or add {owner}")
        if set(idle) <= _LIST:
            raise InputError(
                f"{', '.join(idle)} goes with the list of runs, and {ways[0]} is about others; "
                "leave one of them out"
            )
        raise InputError(f"{', '.join(idle)} does not go with {ways[0]}; leave it out")

    def _list(self, both: RunStore) -> None:
        store = both if self.committed else RunStore(self.runs)
        records = store.listed()
        if not records:
            if self.export is not None:
                raise InputError(
                    f"no runs in {self.runs}, so nothing is written to {self.export}; name another "
                    "folder with --runs, or add --committed"
                )
            print(f"no runs in {self.runs}; `deltacontrol finetune` makes one")
            return
        rows = chosen(records, self.where)
        if not rows:  # a wrong name of a field is one all the same
            ordered([(r, fields(r)) for r in records[:1]], self.sort, ascending=self.ascending)
        rows = ordered(rows, self.sort, ascending=self.ascending)
        shown = rows[: self.limit] if self.limit else rows
        if self.plot is not None:
            self._draw(shown)
            if len(shown) < len(rows):
                print(f"{len(shown)} of {len(rows)} that were asked for; --limit says how many")
            return
        _print(overview.lines(shown, [record.id for record in records], _width()))
        if len(shown) < len(records):
            print(f"{len(shown)} of {len(rows)} that were asked for, of {len(records)} runs")
        if self.export is not None:
            files.write(self.export, rows, self.runs)
            print(f"wrote {self.export}")

    def _draw(self, rows: list[overview.Row]) -> None:
        if not rows:
            raise InputError("no run is chosen, so there is nothing to draw; change --where")
        path = self.out or Path("curve.png")
        curves.save(rows, path)
        print(f"drew {path}: {len(rows)} runs")

    def _delete(self) -> int:
        folders = deletion.own_folders(self.runs, self.delete)
        listed = {record.id: record for record in RunStore(self.runs).listed()}
        rows = [(listed[f.name], fields(listed[f.name])) for f in folders if f.name in listed]
        _print(overview.lines(rows, list(listed), _width()))
        for folder in folders:
            if folder.name not in listed:
                print(f"{folder.name}  no whole record")
        count = f"{len(folders)} run{'s' * (len(folders) > 1)}"
        if not self.yes:
            try:
                answer = input(f"delete {count} from {self.runs}, for good? [y/N] ")
            except (EOFError, RuntimeError):  # at its end, or closed from the start
                raise InputError(
                    "nobody is there to answer, so nothing was deleted; add --yes"
                ) from None
            if answer.strip().lower() not in ("y", "yes"):
                print("nothing was deleted")
                return 1
        deletion.delete(self.runs, folders)
        print(f"deleted {count}")
        return 0

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


def _width() -> int:
    return max(LEAST_WIDTH, shutil.get_terminal_size().columns)


def _print(lines: list[str]) -> None:
    for line in lines:
        print(line)


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
