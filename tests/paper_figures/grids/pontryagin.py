"""Synthetic records of the figure pontryagin."""

from typing import Any

import numpy as np
import pandas as pd

from tests.paper_figures.made_up import STAGES, Grid, Synthetic


def grid(seeds: int = 2) -> Grid:
    grid: Grid = []
    for optimiser, rate, count in (("lbfgs", 0.12, 90), ("adamw", 0.03, 200)):
        for seed in range(seeds):
            random = np.random.default_rng(seed)
            iteration = np.arange(count + 1)
            columns: dict[str, Any] = {
                "iteration": iteration,
                "objective": 0.05 + 0.65 * np.exp(-1.5 * rate * iteration) * (1 + 0.1 * seed),
            }
            parts = []
            for position, stage in enumerate(STAGES):
                noise = np.exp(random.normal(0, 0.3, count + 1))
                part = 0.02 * 1.5**position * np.exp(-rate * iteration) * noise
                parts.append(part if stage != "input" else 0 * part)
                columns[f"residual_{stage}"] = parts[-1]
                columns[f"costate_{stage}"] = 0.3 * 0.8**position * np.exp(-0.01 * iteration)
            columns["residual"] = np.sqrt(np.sum(np.square(parts), axis=0))
            config = {
                "delta": {"name": "lora", "rank": 8},
                "optimiser": optimiser,
                "seed": seed,
                "num_examples": 32,
            }
            result = {
                "identity_relative_difference": 3.2e-15,
                "stages": STAGES,
                "residual": float(columns["residual"][-1]),
                "status": "converged",
            }
            grid.append((Synthetic(config), result, pd.DataFrame(columns)))
    return grid


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption."""
    return "at most 3.2e-15"
