"""The learning-rate search: every method gets its own rate, chosen on validation rows.

``python -m deltacontrol.experiments.studies.learning_rates.grid`` runs what is recorded neither in
the folder ``runs`` nor with the package, and prints the chosen rates. With ``--publish``, from a
clean checkout, it puts the records into ``experiments/records/rates`` and the rates into
``learning_rates.json`` there, from which every fine-tuning takes its default rate. Test rows are
never looked at. A rate at an end of its grid is marked, because the best one
may lie outside.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence

from deltacontrol.experiments.runs.provenance import require_clean
from deltacontrol.experiments.runs.publishing import publish as publish_records
from deltacontrol.experiments.runs.store import Record, RunStore, both_homes
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.experiments.training.rates import RATES_FILE, recorded_rates, searched_name
from deltacontrol.theory.errors import InputError

MODEL = "minilm-l6"
TASKS = ("movie", "trec6")
GRID = {
    "full": (3e-5, 1e-4, 3e-4, 1e-3),
    "head": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "bitfit": (1e-3, 3e-3, 1e-2, 3e-2),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2),
    "houlsby": (3e-4, 1e-3, 3e-3, 1e-2),
    "prefix": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "prompt": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
}
STEPS = 100
# Every delta method on a smaller model, at the rates that the method's own file names.
SMALL_MODEL = "minilm-l3"
SMALL_STEPS = 60
SMALL_LENGTH = 32
SMALL_EVAL_LIMIT = 500
# AdamW moves d coordinates of unit columns by about rate * sqrt(d) a step: search that product.
SUBSPACE_DIMENSIONS = (100, 10_000)
SUBSPACE_MOVES = (0.3, 1.0, 3.0, 10.0)
RANDOM_INIT_RATES = (1e-4, 3e-4, 1e-3)


def experiments(preset: str) -> list[FineTuning]:
    """The whole search; the presets do not differ."""
    del preset
    return [*methods(), *subspaces(), *small()]


def methods() -> list[FineTuning]:
    """Every method on every task at every rate of its grid."""
    return [
        _trial(task, delta, rate)
        for task in TASKS
        for delta, rates in GRID.items()
        for rate in rates
    ]


def subspaces() -> list[FineTuning]:
    """Subspaces of two dimensions, and what random initialisation needs, on the first task."""
    task = TASKS[0]
    trials = []
    for dimension in SUBSPACE_DIMENSIONS:
        for move in SUBSPACE_MOVES:
            rate = move / math.sqrt(dimension)
            trials.append(_trial(task, f"subspace:dimension={dimension}", rate))
    largest = SUBSPACE_DIMENSIONS[-1]
    for move in SUBSPACE_MOVES[1:]:
        rate = move / math.sqrt(largest)
        trials.append(_trial(task, f"subspace:dimension={largest}", rate, pretrained=False))
    trials += [_trial(task, "full", rate, pretrained=False) for rate in RANDOM_INIT_RATES]
    return trials


def small() -> list[FineTuning]:
    """Every registered delta on every task, on the smaller model and for fewer steps."""
    from deltacontrol.deltas.registry import available  # imports torch

    return [
        FineTuning(
            model=SMALL_MODEL,
            task=task,
            deltas=(method.example(),),
            learning_rate=rate,
            steps=SMALL_STEPS,
            max_length=SMALL_LENGTH,
            eval_limit=SMALL_EVAL_LIMIT,
            evaluate_on="validation",
        )
        for task in TASKS
        for method in available().values()
        for rate in method.rates_to_search()
    ]


def _trial(task: str, delta: str, rate: float, pretrained: bool = True) -> FineTuning:
    return FineTuning(
        model=MODEL,
        task=task,
        deltas=(delta,),
        learning_rate=float(f"{rate:.3g}"),
        steps=STEPS,
        pretrained=pretrained,
        evaluate_on="validation",
    )


def key(config: dict) -> str:
    """Name of a searched rate: model/task/delta, with the dimension of a subspace."""
    model = config["model"] + ("" if config["pretrained"] else "@random")
    return f"{model}/{config['task']}/{searched_name(config['deltas'][0])}"


def choose(records: Iterable[Record]) -> dict:
    """The best rate of every search by validation accuracy, ties broken by validation loss."""
    trials: dict[str, list[dict]] = {}
    for record in records:
        trials.setdefault(key(record.config), []).append(
            {
                "rate": record.config["learning_rate"],
                "accuracy": record.result["accuracy"],
                "loss": record.result["loss"],
                "run": record.id,
            }
        )
    rates, ends = {}, []
    for name, rows in sorted(trials.items()):
        rows.sort(key=lambda row: row["rate"])
        # A diverged trial has no accuracy and cannot win.
        best = max(
            (row for row in rows if row["accuracy"] is not None),
            key=lambda row: (row["accuracy"], -row["loss"]),
            default=None,
        )
        if best is None:
            continue
        rates[name] = best["rate"]
        if best in (rows[0], rows[-1]) and len(rows) > 1:
            ends.append(name)
    steps = {MODEL: STEPS, SMALL_MODEL: SMALL_STEPS}
    return {"steps": steps, "rates": rates, "at_end_of_grid": ends, "trials": trials}


def subspace_rate(dimension: int, pretrained: bool = True) -> float:
    """The rate for a subspace of any dimension: move/sqrt(d), the move interpolated in log d."""
    rates = recorded_rates()
    prefix = f"{MODEL}{'' if pretrained else '@random'}/{TASKS[0]}/subspace/"
    known = sorted(
        (int(k.removeprefix(prefix)), r) for k, r in rates.items() if k.startswith(prefix)
    )
    if not known:
        raise InputError(
            f"no learning rate is recorded for {prefix}*; run "
            "python -m deltacontrol.experiments.studies.learning_rates.grid"
        )
    points = [(math.log(d), math.log(rate * math.sqrt(d))) for d, rate in known]
    x = math.log(dimension)
    below = max((p for p in points if p[0] <= x), default=points[0])
    above = min((p for p in points if p[0] >= x), default=points[-1])
    weight = 0.0 if above[0] == below[0] else (x - below[0]) / (above[0] - below[0])
    move = math.exp(below[1] + weight * (above[1] - below[1]))
    return float(f"{move / math.sqrt(dimension):.3g}")


def search(store: RunStore, workers: int | None = None) -> list[Record]:
    """Run what is missing in ``store``; returns all records of the search."""
    from deltacontrol.experiments.runs.sweep import run_all

    return run_all(experiments("paper"), store, workers)


def publish(records: Sequence[Record]) -> None:
    """Make the committed rates those of the given records."""
    publish_records(records, "rates/runs", exactly=True)
    text = json.dumps(choose(sorted(records, key=lambda r: r.id)), indent=1) + "\n"
    RATES_FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    publishing = sys.argv[1:] == ["--publish"]
    if publishing:
        require_clean()
    found = search(both_homes("runs", keep_controls=False))
    print(json.dumps(choose(found)["rates"], indent=1))
    if publishing:
        publish(found)
