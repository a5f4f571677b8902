"""Thresholds of random subspaces: quadratic losses, linearised models, and real fine-tuning."""

from __future__ import annotations

from deltacontrol.experiments.runs.experiment import Experiment
from deltacontrol.experiments.studies.threshold.measurement import (
    ModelThreshold,
    QuadraticThreshold,
)

BLOCKS = ("selected-modules:sites=block+head",)
# Of the largest fall: of a steep spectrum a few directions give all but the last per cent.
SHARES = {0.5: (0.5, 0.8, 0.95), 1.0: (0.5, 0.8, 0.95), 2.0: (0.95, 0.99, 0.999)}
# Fine-tuned, and where: the head is linear in its parameters, the others ever less so.
TUNED = {
    ("head",): (6, 12, 18, 24, 32, 40),
    ("bitfit", "head"): (12, 48, 96, 192, 384),
    ("lora", "head"): (6, 12, 18, 24, 32, 48),
    BLOCKS: (12, 24, 48, 96, 192),
}


def experiments(preset: str) -> list[Experiment]:
    """Quadratic losses, then linearised models, then models that are trained as well."""
    quick = preset == "quick"
    seeds = (0,) if quick else (0, 1)
    exact = [
        QuadraticThreshold(
            exponent=exponent, shares=SHARES[exponent], seed=seed, draws=50 if quick else 200
        )
        for exponent in ((1.0,) if quick else SHARES)
        for seed in seeds
    ]
    linearised = [
        ModelThreshold(task=task, deltas=deltas, rows=32 if quick else 128, seed=seed)
        for task in (("movie",) if quick else ("movie", "trec6"))
        for deltas in (BLOCKS, ("lora", "head"))
        for seed in seeds
    ]
    trained = [
        ModelThreshold(
            deltas=deltas,
            rows=24 if quick else 48,
            max_length=16,
            dimensions=dimensions[:2] if quick else dimensions,
            subspaces=2 if quick else 4,
            steps=10 if quick else 50,
        )
        for deltas, dimensions in TUNED.items()
        if not quick or deltas == ("head",)
    ]
    return [*exact, *linearised, *trained]
