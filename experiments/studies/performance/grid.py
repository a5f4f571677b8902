"""Performance and convergence: every method on two tasks, with its own searched rate."""

from __future__ import annotations

from deltacontrol.experiments.training.finetune import FineTuning

DELTAS = ("full", "head", "bitfit", "lora", "houlsby", "prefix", "prompt")
TASKS = ("movie", "trec6")


def experiments(preset: str) -> list[FineTuning]:
    """Methods × tasks × seeds."""
    quick = preset == "quick"
    return [
        FineTuning(
            task=task,
            deltas=(delta,),
            seed=seed,
            steps=40 if quick else 200,
            eval_limit=400 if quick else None,
        )
        for seed in range(2 if quick else 3)
        for task in TASKS
        for delta in DELTAS
    ]
