"""Trainings that are looked at every few updates: six methods on nine tasks of nine corpora.

Every method has the rate that the study of many tasks searched for the task's category, and keeps
it: a rate that falls to zero would end every training at the last step, however fast it is. There
is one training a setting: trainings that differ in their seed alone may share a pass, and then the
time of a step is no longer that of one. Results are of validation rows, as the looks are.

Source: Ding et al., Nature Machine Intelligence 5, 2023, section "Convergence".
"""

from __future__ import annotations

from typing import Any

from deltacontrol.experiments.studies.many_tasks.grid import RATES, key, questions, training
from deltacontrol.experiments.training.finetune import FineTuning

DELTAS = ("full", "lora", "houlsby", "prefix", "prompt", "bitfit")
# One task a corpus, so that the tasks are independent of each other.
TASKS = (
    *("movie", "tweets", "amazon", "nyt", "sms"),
    *("trec50:is-HUM:ind", "bbc", "20ng:same-class", "r8:same-class"),
)
STEPS, EVERY = 120, 6
ROWS = 200  # of validation, at every look


def experiments(preset: str) -> list[FineTuning]:
    """Tasks × methods; at quick one task and a few steps.

    Raises:
        InputError: the rates of the study of many tasks are not searched.
    """
    quick = preset == "quick"
    if quick:
        rates, tasks = RATES.recorded(), ("bbc",)
        given: dict[str, Any] = {"steps": 12, "eval_every": 3, "eval_limit": 40}
    else:
        categories = {questions()[task].category for task in TASKS}
        rates, tasks = RATES.known(key(c, d) for c in categories for d in DELTAS), TASKS
        given = {"steps": STEPS, "eval_every": EVERY, "eval_limit": ROWS}
    given |= {"train_limit": None, "schedule": "constant", "evaluate_on": "validation"}
    return [
        training(task, delta, rates.get(key(questions()[task].category, delta)), **given)
        for task in tasks
        for delta in DELTAS
    ]  # fmt: skip
