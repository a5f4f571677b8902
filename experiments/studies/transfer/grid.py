"""The controls of twelve tasks, each tried on all of them.

Tasks of one kind are of different corpora, so that a gain within a kind is no gain from texts that
were seen in training; two tasks of one corpus take no part in what is tested.

Source: Ding et al., Nature Machine Intelligence 5, 2023, "Task-level transferability evaluation".
"""

from __future__ import annotations

from typing import Any, NamedTuple

from deltacontrol.experiments.studies.transfer.measurement import Transfer


class Question(NamedTuple):
    """What a task asks, and whose texts it has."""

    kind: str
    corpus: str


# Tasks of one kind side by side.
TASKS = {
    "movie": Question("sentiment", "movie"),
    "amazon": Question("sentiment", "amazon"),
    "nyt": Question("sentiment", "nyt"),
    "tweets": Question("sentiment", "tweets"),
    "bbc": Question("topic", "bbc"),
    "r8": Question("topic", "reuters"),
    "20ng": Question("topic", "20ng"),
    "bbc:same-class": Question("pair", "bbc"),
    "r8:same-class": Question("pair", "reuters"),
    "20ng:same-class": Question("pair", "20ng"),
    "trec6": Question("question type", "trec"),
    "sms": Question("spam", "sms"),
}
QUICK = ("movie", "amazon", "bbc")
SEEDS = 2


def experiments(preset: str) -> list[Transfer]:
    """Every task's control, and no control, on every task."""
    if preset == "quick":
        short: dict[str, Any] = {"steps": 8, "tune_steps": 4, "rows": 64, "test_rows": 64}
        return [Transfer(source=source, targets=QUICK, **short) for source in ("", *QUICK)]
    return [
        Transfer(source=source, targets=tuple(TASKS), seed=seed)
        for seed in range(SEEDS)
        for source in ("", *TASKS)
    ]
