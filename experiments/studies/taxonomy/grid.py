"""Every delta method on two tasks, each at the rate that the recorded search chose for it.

A new method enters the grid "paper" when its rates are recorded; "quick" takes it as it is.
"""

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
    runs = [
        _run(
            model=SMALL_MODEL,
            task=task,
            deltas=(method.example(),),
            seed=seed,
            steps=10 if quick else SMALL_STEPS,
            max_length=SMALL_LENGTH,
            eval_limit=100 if quick else None,
        )
        for seed in range(1 if quick else 2)
        for task in (TASKS[:1] if quick else TASKS)
        for method in available().values()
    ]
    return [run for run, searched in runs if quick or searched]


def _run(**config) -> tuple[FineTuning, bool]:
    """A run, and whether its rate is a searched one."""
    rate = recorded_rates().get(key(FineTuning(**config).to_config()))
    return FineTuning(**config, learning_rate=rate), rate is not None
