"""Synthetic records of the figure convergence: accuracies that rise at known speeds."""

import numpy as np
import pandas as pd

from deltacontrol.experiments.studies.convergence.grid import DELTAS, EVERY, STEPS, TASKS
from tests.paper_figures.made_up import Grid, Synthetic

#      steps in which the distance falls by e
TIMES = dict(zip(DELTAS, (8.0, 12.0, 13.0, 20.0, 40.0, 15.0), strict=True))


def grid(seeds: int = 1) -> Grid:
    grid: Grid = []
    random = np.random.default_rng(7)
    for task in TASKS:
        for delta in DELTAS:
            for seed in range(seeds):
                config = {
                    "model": "minilm-l3",
                    "task": task,
                    "deltas": [{"name": delta}],
                    "seed": seed,
                    "learning_rate": 1e-3,
                    "steps": STEPS,
                    "eval_every": EVERY,
                    "batch_size": 8,
                    "eval_limit": 300,
                }
                result = {"majority_share": 0.5, "seconds_per_step": 0.1 + 0.1 * (delta == "full")}
                time = TIMES[delta] * np.exp(random.normal(0, 0.1))
                step = np.arange(1, STEPS + 1)
                accuracy = np.where(step % EVERY == 0, 0.8 - 0.3 * np.exp(-step / time), np.nan)
                curve = pd.DataFrame({"step": step, "validation_accuracy": accuracy})
                grid.append((Synthetic(config), result, curve))
    return grid


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption: the steps of full fine-tuning."""
    logs = np.log(table.loc[table["method"] == "full", "steps_95"])
    return f"first, after {np.exp(logs.mean()):.0f} ["
