"""Eight methods on the hundred tasks, each at the rate that was searched for a task's category.

The tasks are the first of `deltacontrol.experiments.tasks.families.chosen` that are no language
models. ``tasks.json`` beside this file has their names, categories, corpora and validation rows, so
that the grid is known without the data; it is the output of

    python -m deltacontrol.experiments.studies.many_tasks.grid

The rates are searched by `deltacontrol.experiments.studies.many_tasks.rates`, on validation rows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from deltacontrol.experiments import tasks
from deltacontrol.experiments.studies.learning_rates.of_study import StudyRates
from deltacontrol.experiments.training.finetune import FineTuning

TASKS_FILE = Path(__file__).with_name("tasks.json")
DRAWN = 126  # of which six are language models, so that 120 are left

MODEL = "minilm-l3"
DELTAS = (
    *("full", "lora", "houlsby", "prefix", "prompt", "bitfit"),
    *("last-layers", "state-based"),
)
STEPS = 80
BATCH = 8
LENGTH = 24  # tokens of a text; a pair has two
ROWS = 300  # that a result is measured on, at most
QUICK = ("tweets", "trec6", "nyt-intensity")


@dataclass(frozen=True)
class Question:
    """A task of the study: its name, what it asks, whose texts they are, validation rows."""

    name: str
    category: str
    corpus: str
    validation: int


@cache
def questions() -> dict[str, Question]:
    """The tasks of the study by name, in the order in which they were drawn."""
    listed = json.loads(TASKS_FILE.read_text(encoding="utf-8"))["tasks"]
    return {entry["name"]: Question(**entry) for entry in listed}


def drawn() -> list[Question]:
    """The same from the data, which are fetched where they are missing."""
    return [
        Question(task.name, task.category, task.corpus, len(task.load().validation))
        for task in tasks.study_tasks(DRAWN)
        if task.kind != "causal-lm"
    ]


def training(task: str, delta: str, rate: float | None, **more: Any) -> FineTuning:
    """One run on a task of the study; without a rate, at the method's default."""
    given: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": BATCH,
        "max_length": LENGTH * (2 if questions()[task].category == "pair" else 1),
        "train_limit": STEPS * BATCH,  # as many as are seen once
        "eval_limit": ROWS,
        "precision": "fp32",
    }
    return FineTuning(model=MODEL, task=task, deltas=(delta,), learning_rate=rate, **(given | more))


def key(category: str, delta: str) -> str:
    """Name of a searched rate."""
    return f"{category}/{delta}"


RATES = StudyRates(
    "many_tasks",
    lambda config: key(questions()[config["task"]].category, config["deltas"][0]["name"]),
)


def experiments(preset: str) -> list[FineTuning]:
    """Tasks × methods; at quick three tasks and a few steps.

    Raises:
        InputError: the rates of the grid "paper" are not searched.
    """
    known, rates = questions(), RATES.recorded()
    if preset == "quick":
        return [
            training(task, delta, rates.get(key(known[task].category, delta)),
                     steps=6, train_limit=6 * BATCH, eval_limit=60)
            for task in QUICK
            for delta in DELTAS
        ]  # fmt: skip
    wanted = [(q.name, delta, key(q.category, delta)) for q in known.values() for delta in DELTAS]
    rates = RATES.known(name for _, _, name in wanted)
    return [training(task, delta, rates[name]) for task, delta, name in wanted]


if __name__ == "__main__":
    print(json.dumps({"tasks": [asdict(question) for question in drawn()]}, indent=1))
