"""All subsets of adapter, BitFit and prompt tuning, and their sequences, on six tasks.

A subset is trained at once, on 640 rows (each seen once) and on 16 rows a class; the empty one
trains the head alone. A sequence trains one delta after another, each for all steps, the earlier
ones frozen, and is evaluated on validation rows at the end of every stage. A subset has one
learning rate, searched on validation rows of two of the tasks
(`deltacontrol.experiments.studies.combination.rates`), for both amounts of rows; a sequence takes
the rate of all three.

Source: Ding et al., Nature Machine Intelligence 5, 2023, "Combinations of delta-tuning methods".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

from deltacontrol.experiments.studies.learning_rates.of_study import StudyRates
from deltacontrol.experiments.training.finetune import FineTuning

MODEL = "minilm-l3"
PARTS = ("houlsby", "bitfit", "prompt")
NONE = "head"  # what is trained where no part is
# Task → what it asks. One task a corpus, so that the tasks are independent of each other.
TASKS = {
    "movie": "sentiment",
    "tweets": "sentiment",
    "trec50:is-HUM:ind": "question type",
    "bbc": "topic",
    "20ng:same-class": "pair",
    "r8:same-class": "pair",
}
IN_TURN = ("movie", "bbc", "r8:same-class")
SEEDS = 3
SHOTS = 16
STEPS, BATCH = 80, 8
LENGTH = 24  # tokens of a text; a pair has two
ROWS = 300  # that a result is measured on, at most


def subsets() -> list[tuple[str, ...]]:
    """All eight, the smallest first."""
    return [s for n in range(len(PARTS) + 1) for s in combinations(PARTS, n)]


def name(deltas: Sequence[str]) -> str:
    """Of a subset, such as ``houlsby+prompt``; its order does not matter."""
    return "+".join(part for part in PARTS if part in deltas) or NONE


def _key(config: Mapping[str, Any]) -> str:
    return name([delta["name"] for delta in config["deltas"]])


RATES = StudyRates("combination", _key)


def training(task: str, deltas: Sequence[str], rate: float | None, **more: Any) -> FineTuning:
    """One run of the study; without a rate, at the default."""
    given: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": BATCH,
        "max_length": LENGTH * (2 if TASKS[task] == "pair" else 1),
        "eval_limit": ROWS,
        "precision": "fp32",
    }
    if "shots" not in more:
        given["train_limit"] = STEPS * BATCH
    return FineTuning(
        model=MODEL, task=task, deltas=tuple(deltas) or (NONE,), learning_rate=rate,
        **(given | more),
    )  # fmt: skip


def experiments(preset: str) -> list[FineTuning]:
    """Subsets with all rows, with few, and sequences; at quick one task, one seed, a few steps.

    Raises:
        InputError: the rates of the grid "paper" are not searched.
    """
    if preset == "quick":
        rates: Mapping[str, float] = RATES.recorded()
        tasks, in_turn, orders, seeds = ("bbc",), ("bbc",), [PARTS], 1
        short: dict[str, Any] = {"steps": 8, "eval_limit": 60}
    else:
        rates = RATES.known(map(name, subsets()))
        tasks, in_turn, seeds, short = tuple(TASKS), IN_TURN, SEEDS, {}
        orders = list(permutations(PARTS))
    few: dict[str, Any] = {"shots": SHOTS}
    return [
        *(
            training(task, subset, rates.get(name(subset)), seed=seed, **rows, **short)
            for rows in ({}, few)
            for task in tasks
            for subset in subsets()
            for seed in range(seeds)
        ),
        *(
            training(
                task, order, rates.get(name(order)), seed=seed, sequential=True,
                **short, eval_every=short.get("steps", STEPS),
            )
            for task in in_turn
            for order in orders
            for seed in range(seeds)
        ),
    ]  # fmt: skip
