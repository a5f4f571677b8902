"""Predictions for classification tasks of the study of many tasks, a few of each corpus.

Of every corpus the first `EACH` tasks in the order of the study are taken, so that no corpus counts
for most of it. What is foretold are the trainings of that study, in all of its methods.
"""

from __future__ import annotations

from typing import Any

from deltacontrol.experiments.studies.foretelling.measurement import Foretelling
from deltacontrol.experiments.studies.many_tasks.grid import (
    BATCH,
    DELTAS,
    LENGTH,
    MODEL,
    RATES,
    STEPS,
    Question,
    key,
    questions,
)

EACH = 7
QUICK = ("tweets", "trec6", "bbc", "movie", "amazon")  # five corpora


def foretold() -> list[Question]:
    """The tasks, in the order of the study."""
    counts: dict[str, int] = {}
    found = []
    for question in questions().values():
        if question.category == "regression":
            continue
        counts[question.corpus] = counts.get(question.corpus, 0) + 1
        if counts[question.corpus] <= EACH:
            found.append(question)
    return found


def experiments(preset: str) -> list[Foretelling]:
    """One run a task; short trainings have the rates of the study.

    Raises:
        InputError: the rates of the study of many tasks are not searched.
    """
    if preset == "quick":
        few: dict[str, Any] = {"rows": 16, "methods": ("lora", "bitfit"), "max_length": LENGTH}
        few |= {"steps": STEPS, "batch_size": BATCH}
        predictors = ("linearised", "parameters", "probe:steps=2")
        return [Foretelling(task=task, model=MODEL, predictors=predictors, **few) for task in QUICK]
    rates = RATES.known(key(question.category, d) for question in foretold() for d in DELTAS)
    return [
        Foretelling(
            task=question.name,
            methods=DELTAS,
            rates=tuple(rates[key(question.category, delta)] for delta in DELTAS),
            model=MODEL,
            steps=STEPS,
            batch_size=BATCH,
            max_length=LENGTH * (2 if question.category == "pair" else 1),
        )
        for question in foretold()
    ]
