"""Classifiers of four methods: clean, under an attack, with typing errors, each also corrected.

A run is a `deltacontrol.experiments.measures.robustness.Robustness`; claim 26 judges those of LoRA.
"""

from __future__ import annotations

from typing import Any

from deltacontrol.experiments.measures.robustness import Robustness

DELTAS = ("lora", "houlsby", "bitfit", "prefix")
SEEDS = 5


def experiments(preset: str) -> list[Robustness]:
    """Methods × seeds."""
    if preset == "quick":
        few: dict[str, Any] = {"num_calibration": 32, "num_validation": 24, "num_test": 32}
        return [Robustness(delta={"name": "lora"}, steps=6, ranks=(64,), gains=(1.0,), **few)]
    return [Robustness(delta={"name": name}, seed=seed) for name in DELTAS for seed in range(SEEDS)]
