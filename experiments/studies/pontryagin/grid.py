"""Pontryagin's conditions along the training of LoRA and adapters until convergence."""

from __future__ import annotations

from deltacontrol.experiments.studies.pontryagin.trace import PontryaginTrace

DELTAS = ("lora", "houlsby")


def experiments(preset: str) -> list[PontryaginTrace]:
    """Deltas × optimisers × seeds."""
    quick = preset == "quick"
    return [
        PontryaginTrace(
            delta={"name": delta},
            optimiser=optimiser,
            seed=seed,
            num_examples=4 if quick else 8,
            max_length=12 if quick else 20,
            steps=25 if quick else {"lbfgs": 900, "adamw": 300}[optimiser],
            weight_decay=1e-2,
        )
        for seed in range(1)
        for delta in DELTAS
        for optimiser in ("lbfgs", "adamw")
    ]
