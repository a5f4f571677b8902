"""Accuracy against the dimension of a random subspace, pre-trained against random start."""

from __future__ import annotations

from experiments.finetune import FineTuning
from experiments.rates import recorded_rates
from experiments.studies.learning_rates import MODEL, subspace_rate

TASK = "movie"


def experiments(preset: str) -> list[FineTuning]:
    """Dimensions × starts × seeds, and full fine-tuning of both starts."""
    quick = preset == "quick"
    dimensions = {
        (True, True): (100, 1000, 10_000),
        (True, False): (100, 10_000),
        (False, True): (10, 100, 1000, 10_000),
        (False, False): (100, 10_000),
    }
    found = []
    for pretrained in (True, False):
        for seed in range(1 if quick else 3 if pretrained else 2):
            start = MODEL if pretrained else f"{MODEL}@random"
            common = {
                "model": MODEL,
                "task": TASK,
                "seed": seed,
                "pretrained": pretrained,
                "steps": 30 if quick else 60,
                "eval_limit": 400 if quick else None,
            }
            rate = recorded_rates().get(f"{start}/{TASK}/full")
            found.append(FineTuning(deltas=("full",), learning_rate=rate, **common))
            for dimension in dimensions[quick, pretrained]:
                found.append(
                    FineTuning(
                        deltas=(f"subspace:dimension={dimension}",),
                        learning_rate=subspace_rate(dimension, pretrained),
                        **common,
                    )
                )
    return found
