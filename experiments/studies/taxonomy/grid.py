"""Every delta method on two tasks, each at the rate that the recorded search chose for it."""

from __future__ import annotations

from deltacontrol.experiments.studies.learning_rates.grid import (
    SMALL_LENGTH,
    SMALL_MODEL,
    SMALL_STEPS,
    TASKS,
    key,
)
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.experiments.training.rates import recorded_rates


def experiments(preset: str) -> list[FineTuning]:
    """Methods × tasks × seeds; at quick one task, one seed and few steps."""
    from deltacontrol.deltas.registry import available  # imports torch

    quick = preset == "quick"
    return [
        _run(
            model=SMALL_MODEL,
            task=task,
            deltas=(delta,),
            seed=seed,
            steps=10 if quick else SMALL_STEPS,
            max_length=SMALL_LENGTH,
            eval_limit=100 if quick else None,
        )
        for seed in range(1 if quick else 2)
        for task in (TASKS[:1] if quick else TASKS)
        for delta in available()
    ]


def _run(**config) -> FineTuning:
    name = key(FineTuning(**config).to_config())
    return FineTuning(**config, learning_rate=recorded_rates().get(name))
