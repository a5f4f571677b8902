"""Layers, sites and ranks that the convex program of linearised tuning picks."""

from __future__ import annotations

from deltacontrol.experiments.studies.selection.measurement import Selection


def experiments(preset: str) -> list[Selection]:
    """One run a seed; the seed draws the training rows.

    The task is one on which so few rows carry signal: on `movie` no λ lowers the held-out loss.
    """
    if preset == "quick":
        return [
            Selection(
                num_examples=48,
                num_heldout=48,
                num_test=100,
                num_weights=5,
                smallest=0.2,
                draws=1,
                steps=20,
            )
        ]
    return [Selection(task="tweets", seed=seed) for seed in range(3)]
