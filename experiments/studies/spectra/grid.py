"""The update of full fine-tuning and LoRA at ranks 1 to 64, on two tasks."""

from __future__ import annotations

from typing import Any

from deltacontrol.experiments.studies.spectra.updates import UpdateSpectra

TASKS = ("movie", "trec6")
SEEDS = (0, 1)


def experiments(preset: str) -> list[UpdateSpectra]:
    """Tasks × seeds."""
    if preset == "quick":
        small: dict[str, Any] = {
            "ranks": (1, 8),
            "steps": 20,
            "train_rows": 128,
            "full_rates": (3e-4,),
            "lora_rates": (4e-3,),
            "head_rates": (1e-2,),
        }
        return [UpdateSpectra(task=TASKS[0], seed=seed, **small) for seed in SEEDS]
    return [UpdateSpectra(task=task, seed=seed) for task in TASKS for seed in SEEDS]
