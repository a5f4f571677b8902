"""Every delta method on two tasks, each at a few learning rates.

A run is evaluated on validation rows, which choose the rate, and on test rows, which are shown.
"""

from __future__ import annotations

from experiments.finetune import FineTuning
from experiments.rates import DEFAULT_RATES, OTHER_RATE

TASKS = ("movie", "trec6")
FACTORS = (1.0, 3.0, 10.0)  # of the default rates, which suit longer runs than these


def experiments(preset: str) -> list[FineTuning]:
    """Methods × tasks × rates × seeds; at quick one task, one rate and one seed."""
    from deltas.registry import available

    quick = preset == "quick"
    return [
        FineTuning(
            model="minilm-l3",
            task=task,
            deltas=(delta,),
            learning_rate=float(f"{factor * DEFAULT_RATES.get(delta, OTHER_RATE):.3g}"),
            seed=seed,
            steps=10 if quick else 80,
            max_length=24 if quick else 32,
            eval_every=10 if quick else 80,
            eval_limit=100 if quick else 1000,
        )
        for seed in range(1 if quick else 2)
        for task in (TASKS[:1] if quick else TASKS)
        for delta in available()
        for factor in ((1.0,) if quick else FACTORS)
    ]
