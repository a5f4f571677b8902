"""The learning rates of a study: one for each kind of its runs, searched on validation rows.

A study names the kind of a run by a key, such as ``topic/lora``. The rate of a key is the one of
the best mean metric over the trials of that key; the mean loss breaks ties. Trials of a rate are
runs that differ in task and seed. Test rows are never looked at. Where the best rate is at an end
of those that were tried, a next one beyond it is tried, a few times; if it is still at an end it is
marked, because the best one may lie outside.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import tyro

from deltacontrol.experiments.runs.provenance import require_clean
from deltacontrol.experiments.runs.publishing import publish
from deltacontrol.experiments.runs.store import COMMITTED, Record, both_homes
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory.errors import InputError

LOSSES = {"accuracy": "loss", "pearson": "mse"}  # which breaks ties of the metric
BEYOND, STRIDE = 3, 3.0  # how often an end is moved, and by which factor


@dataclass(frozen=True)
class StudyRates:
    """The rates of a study, and how they are searched.

    Attributes:
        study: its folder in `deltacontrol.experiments.studies`.
        key: the key of a run, from its configuration.
    """

    study: str
    key: Callable[[Mapping[str, Any]], str]

    @property
    def file(self) -> Path:
        """Where the rates are committed; the trials' records lie in a folder of the same name."""
        return COMMITTED / "rates" / f"{self.study}.json"

    def recorded(self) -> dict[str, float]:
        """The searched rates by key; empty without a search."""
        if not self.file.exists():
            return {}
        found: dict[str, float] = json.loads(self.file.read_text(encoding="utf-8"))["rates"]
        return found

    def known(self, keys: Iterable[str]) -> dict[str, float]:
        """The rates of all these keys.

        Raises:
            InputError: some of them are not searched.
        """
        rates, wanted = self.recorded(), set(keys)
        missing = sorted(wanted - rates.keys())
        if missing:
            raise InputError(
                f"{len(missing)} learning rates of the study {self.study} are not searched, such "
                f"as {missing[0]}; run python -m "
                f"deltacontrol.experiments.studies.{self.study}.rates"
            )
        return rates

    def choose(self, records: Sequence[Record]) -> dict[str, Any]:
        """The best rate of every key; a rate that diverged in a trial cannot win.

        Raises:
            InputError: the rates of a key were not tried on the same tasks with the same seeds.
        """
        trials: dict[str, dict[float, list[Record]]] = {}
        for record in sorted(records, key=lambda r: r.id):
            of_rate = trials.setdefault(self.key(record.config), {})
            of_rate.setdefault(record.config["learning_rate"], []).append(record)
        rates, ends, kept = {}, [], {}
        for name, by_rate in sorted(trials.items()):
            on = [
                sorted((r.config["task"], r.config["seed"]) for r in rs) for rs in by_rate.values()
            ]
            if any(one != on[0] for one in on):
                raise InputError(
                    f"the rates of {name} were not tried on the same tasks and seeds; run "
                    f"python -m deltacontrol.experiments.studies.{self.study}.rates to its end"
                )
            rows = [_trial(rate, by_rate[rate]) for rate in sorted(by_rate)]
            kept[name] = rows
            told = [row for row in rows if row["score"] is not None]
            if not told:
                continue
            best = max(told, key=lambda row: (row["score"], -row["loss"]))
            rates[name] = best["rate"]
            if best in (rows[0], rows[-1]) and len(rows) > 1:
                ends.append(name)
        return {"rates": rates, "at_end_of_grid": ends, "trials": kept}

    def beyond(self, trials: Sequence[FineTuning], records: Sequence[Record]) -> list[FineTuning]:
        """The trials at a next rate of every key whose best rate is at an end."""
        chosen, found = self.choose(records), {}
        for name in chosen["at_end_of_grid"]:
            low, high = (chosen["trials"][name][place]["rate"] for place in (0, -1))
            rate = low / STRIDE if chosen["rates"][name] == low else high * STRIDE
            for trial in trials:
                if self.key(trial.to_config()) == name:
                    further = replace(trial, learning_rate=float(f"{rate:.3g}"))
                    found[repr(further)] = further
        return list(found.values())

    def publish(self, records: Sequence[Record]) -> None:
        """Make the committed rates those of the given records."""
        publish(records, f"rates/{self.study}", exactly=True)
        text = json.dumps(self.choose(records), indent=1)
        self.file.write_text(text + "\n", encoding="utf-8")

    def command(self, trials: Callable[[], Sequence[FineTuning]], description: str | None) -> None:
        """The command line of a study's module ``rates``."""
        asked = tyro.cli(_Search, description=description)
        if asked.publish:
            require_clean()
        from deltacontrol.experiments.runs.sweep import run_all  # imports torch

        store, first = both_homes(asked.runs, keep_controls=False), trials()
        found = run_all(first, store, asked.workers)
        for _ in range(BEYOND):
            further = self.beyond(first, found)
            if not further:
                break
            found += run_all(further, store, asked.workers)
        chosen = self.choose(found)
        print(json.dumps({part: chosen[part] for part in ("rates", "at_end_of_grid")}, indent=1))
        if asked.publish:
            self.publish(found)


@dataclass(frozen=True)
class _Search:
    """What the command asks.

    Attributes:
        runs: The folder of records; what is recorded there or with the package is not run again.
        workers: Runs at a time, one process each; chosen by the machine if absent.
        publish: Put records and rates among the committed ones; from a clean checkout only.
    """

    runs: Path = Path("runs")
    workers: int | None = None
    publish: bool = False


def _trial(rate: float, records: Sequence[Record]) -> dict[str, Any]:
    """Means over the trials of one rate; None where one of them has no metric."""
    results = [record.result for record in records]
    metrics = [next(name for name in LOSSES if name in result) for result in results]
    scores = [result[name] for result, name in zip(results, metrics, strict=True)]
    losses = [result[LOSSES[name]] for result, name in zip(results, metrics, strict=True)]
    told = None not in scores and None not in losses
    return {
        "rate": rate,
        "score": mean(scores) if told else None,
        "loss": mean(losses) if told else None,
        "runs": [record.id for record in records],
    }
