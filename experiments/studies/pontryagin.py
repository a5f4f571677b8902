"""Pontryagin's conditions along the training of LoRA and adapters until convergence."""

from __future__ import annotations

from experiments.pontryagin import PontryaginTrace

DELTAS = ("lora", "houlsby")


def experiments(preset: str) -> list[PontryaginTrace]:
    """Deltas × optimisers × seeds."""
    quick = preset == "quick"
    return [
        PontryaginTrace(
            delta={"name": delta},
            optimiser=optimiser,
            seed=seed,
            num_examples=6 if quick else 8,
            max_length=16 if quick else 20,
            steps=30 if quick else 200,
        )
        for seed in range(1)
        for delta in DELTAS
        for optimiser in ("lbfgs", "adamw")
    ]
