"""The controls of thirteen tasks, each tried on all of them.

Source: Ding et al., Nature Machine Intelligence 5, 2023, "Task-level transferability evaluation".
"""

from __future__ import annotations

from typing import Any

from deltacontrol.experiments.studies.transfer.measurement import Transfer

# Task → what it asks, tasks of one kind side by side.
TASKS = {
    "movie": "sentiment",
    "rt": "sentiment",
    "amazon": "sentiment",
    "nyt": "sentiment",
    "trec6": "question type",
    "trec50": "question type",
    "trec50:is-HUM:ind": "question type",
    "bbc": "topic",
    "r8": "topic",
    "20ng": "topic",
    "bbc:same-class": "pair",
    "r8:same-class": "pair",
    "20ng:same-class": "pair",
}
QUICK = ("movie", "rt", "bbc")
SEEDS = 3


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
