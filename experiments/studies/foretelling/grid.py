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
    QUICK,
    STEPS,
    Question,
    questions,
)

EACH = 7


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
    """One run a task."""
    if preset == "quick":
        few: dict[str, Any] = {"rows": 24, "steps": 6, "methods": ("lora", "bitfit")}
        predictors = ("linearised", "parameters", "probe:steps=2")
        return [
            Foretelling(task=task, model=MODEL, predictors=predictors, max_length=LENGTH, **few)
            for task in QUICK[:2]
        ]
    return [
        Foretelling(
            task=question.name,
            methods=DELTAS,
            model=MODEL,
            steps=STEPS,
            batch_size=BATCH,
            max_length=LENGTH * (2 if question.category == "pair" else 1),
        )
        for question in foretold()
    ]
