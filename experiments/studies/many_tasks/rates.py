"""The learning rate of every method for every category of tasks, searched on validation rows.

Two tasks of a category are drawn by a seed, of two corpora where there are, among those with enough
validation rows to tell rates apart. The rate of the best mean metric over both is chosen; the mean
loss breaks ties. Test rows are never looked at.

    python -m deltacontrol.experiments.studies.many_tasks.rates --workers 1

runs what is recorded neither in the folder ``runs`` nor with the package, and prints the rates.
With ``--publish``, from a clean checkout, it puts the records into ``experiments/records/rates``
and the rates beside them, from which the grid takes its own. A rate at an end of those tried is
named there, because the best one may lie outside.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import tyro

from deltacontrol.experiments.runs.provenance import require_clean
from deltacontrol.experiments.runs.publishing import publish as publish_records
from deltacontrol.experiments.runs.store import Record, both_homes
from deltacontrol.experiments.studies.many_tasks.grid import (
    DELTAS,
    MODEL,
    RATES_FILE,
    STEPS,
    Question,
    key,
    questions,
    training,
)
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.experiments.training.rates import default_rate

TASKS_EACH = 2
FACTORS = (1 / 3, 1.0, 3.0)  # of the method's own rate for this model
OWN = "movie"  # the task of which that rate is
LEAST_ROWS = 100  # of validation
ROWS = 300
SEED = 20230302
LOSSES = {"accuracy": "loss", "pearson": "mse"}  # which breaks ties of the metric


def searched() -> dict[str, tuple[Question, ...]]:
    """The tasks that each category's rates are searched on."""
    generator = np.random.default_rng(SEED)
    found = {}
    for category in dict.fromkeys(q.category for q in questions().values()):
        own = [q for q in questions().values() if q.category == category]
        own = [q for q in own if q.validation >= LEAST_ROWS] or own
        order = [own[i] for i in generator.permutation(len(own))]
        others = [q for q in order if q.corpus != order[0].corpus]
        rest = [q for q in order[1:] if q not in others]
        found[category] = tuple([order[0], *others, *rest][:TASKS_EACH])
    return found


def rates_of(delta: str) -> tuple[float, ...]:
    """What is tried: around the rate of the recorded search for this model, rising."""
    own = default_rate(MODEL, OWN, ({"name": delta},)).value
    return tuple(float(f"{factor * own:.3g}") for factor in FACTORS)


def experiments() -> list[FineTuning]:
    """The whole search: categories × tasks × methods × rates."""
    return [
        training(question.name, delta, rate, eval_limit=ROWS, evaluate_on="validation")
        for chosen in searched().values()
        for question in chosen
        for delta in DELTAS
        for rate in rates_of(delta)
    ]


def choose(records: Sequence[Record]) -> dict:
    """The best rate of every search; a rate that diverged on a task cannot win."""
    trials: dict[str, dict[float, list[Record]]] = {}
    for record in records:
        delta, category = record.config["deltas"][0], questions()[record.config["task"]].category
        of_rate = trials.setdefault(key(category, delta["name"]), {})
        of_rate.setdefault(record.config["learning_rate"], []).append(record)
    rates, ends, kept = {}, [], {}
    for name, by_rate in sorted(trials.items()):
        rows = [_trial(rate, by_rate[rate]) for rate in sorted(by_rate)]
        kept[name] = rows
        told = [row for row in rows if row["score"] is not None]
        if not told:
            continue
        best = max(told, key=lambda row: (row["score"], -row["loss"]))
        rates[name] = best["rate"]
        if best in (rows[0], rows[-1]) and len(rows) > 1:
            ends.append(name)
    return {
        "model": MODEL,
        "steps": STEPS,
        "tasks": {category: [q.name for q in chosen] for category, chosen in searched().items()},
        "rates": rates,
        "at_end_of_grid": ends,
        "trials": kept,
    }


def _trial(rate: float, records: Sequence[Record]) -> dict:
    """Means over the tasks of one rate; None where a task has no metric."""
    results = [record.result for record in sorted(records, key=lambda r: r.id)]
    metrics = [next(name for name in LOSSES if name in result) for result in results]
    scores = [result[name] for result, name in zip(results, metrics, strict=True)]
    losses = [result[LOSSES[name]] for result, name in zip(results, metrics, strict=True)]
    told = None not in scores and None not in losses
    return {
        "rate": rate,
        "score": mean(scores) if told else None,
        "loss": mean(losses) if told else None,
        "runs": [record.id for record in sorted(records, key=lambda r: r.id)],
    }


def publish(records: Sequence[Record]) -> None:
    """Make the committed rates those of the given records."""
    publish_records(records, "rates/many_tasks", exactly=True)
    RATES_FILE.write_text(json.dumps(choose(records), indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Search:
    """Search the learning rates of the study of many tasks, and print them.

    Attributes:
        runs: The folder of records; what is recorded there or with the package is not run again.
        workers: Runs at a time, one process each; chosen by the machine if absent.
        publish: Put records and rates among the committed ones; from a clean checkout only.
    """

    runs: Path = Path("runs")
    workers: int | None = None
    publish: bool = False

    def run(self) -> None:
        """Search."""
        from deltacontrol.experiments.runs.sweep import run_all  # imports torch

        if self.publish:
            require_clean()
        found = run_all(experiments(), both_homes(self.runs, keep_controls=False), self.workers)
        chosen = choose(found)
        print(json.dumps({part: chosen[part] for part in ("rates", "at_end_of_grid")}, indent=1))
        if self.publish:
            publish(found)


if __name__ == "__main__":
    tyro.cli(Search, description=__doc__).run()
