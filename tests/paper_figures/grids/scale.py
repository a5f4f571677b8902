"""Synthetic records of the figure scale: the gap closes by two points per ten times the size."""

import numpy as np
import pandas as pd

from deltacontrol.experiments.studies.scale.grid import DELTAS, TASKS, models
from tests.paper_figures.made_up import Grid, Synthetic

BELOW = dict(zip(DELTAS, (0, 3, 4, 6, 9, 5, 7), strict=True))
SIZES = (3e5, 7e5, 1.5e6, 4e6, 1e7)


def grid(seeds: int = 2) -> Grid:
    grid: Grid = []
    random = np.random.default_rng(9)
    for model, size in zip(models("paper"), SIZES, strict=True):
        large = np.log10(size / SIZES[0])
        for place, task in enumerate(TASKS):
            for delta, below in BELOW.items():
                for seed in range(seeds):
                    points = 65 + place + 6 * large - below * (1 - large / 3)
                    points += random.normal(0, 0.5)
                    grid.append(one(model, size, task, delta, seed, points, 40 - 8 * large))
    return grid


def one(model: str, size: float, task: str, delta: str, seed: int, points: float, time: float):
    config = {
        "model": model,
        "task": task,
        "deltas": [{"name": delta.partition(":")[0]}],
        "seed": seed,
        "learning_rate": 1e-3,
        "steps": 80,
        "batch_size": 8,
        "eval_limit": 300,
    }
    result = {
        "accuracy": points / 100,
        "majority_share": 0.5,
        "num_total": int(size) + 100,
        "num_head": 100,
        "trainable_share": 0.02,
    }
    step = np.arange(1, 81)
    way = np.where(step % 8 == 0, points / 100 - 0.2 * np.exp(-step / time), np.nan)
    return Synthetic(config), result, pd.DataFrame({"step": step, "validation_accuracy": way})


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption: the range of sizes."""
    sizes = table["parameters"]
    return f"with {sizes.min() / 1e6:.2g} to {sizes.max() / 1e6:.2g} million parameters"
