"""Solvers of the same LoRA fine-tuning: loss and stationarity against work and time."""

from __future__ import annotations

from deltacontrol.experiments.studies.solvers.trace import SOLVERS, SolverTrace


def experiments(preset: str) -> list[SolverTrace]:
    """Solvers × seeds."""
    quick = preset == "quick"
    return [
        SolverTrace(
            solver=solver,
            num_examples=2 if quick else 4,
            max_length=8 if quick else 12,
            gradients=40 if quick else 600,
            seed=seed,
        )
        for seed in range(1 if quick else 2)
        for solver in SOLVERS
    ]
