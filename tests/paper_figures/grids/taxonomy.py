"""Synthetic records of the figure taxonomy."""

import numpy as np
import pandas as pd

from tests.paper_figures.made_up import METHODS, Grid, Synthetic


def grid() -> Grid:
    grid: Grid = []
    random = np.random.default_rng(6)
    for task, shift, majority in (("movie", 0.0, 0.52), ("trec6", 0.08, 0.24)):
        for name, (accuracy, share) in {**METHODS, "mam": (0.818, 0.02)}.items():
            for seed in range(2):
                config = {
                    "model": "minilm-l3",
                    "task": task,
                    "deltas": [{"name": name, "sites": ["attention.query", "mlp.up"]}],
                    "seed": seed,
                    "learning_rate": 1e-3,
                    "steps": 60,
                }
                result = {
                    "accuracy": accuracy + shift + random.normal(0, 0.002),
                    "majority_share": majority,
                    "num_trainable": int(17_000_000 * share) + 770,
                    "num_head": 770,
                    "num_total": 17_000_000,
                    "seconds_per_step": 0.1,
                    "peak_memory_bytes": 700_000_000,
                }
                step = np.arange(1, 61)
                curve = pd.DataFrame({"step": step, "loss": 0.2 + 0.5 * np.exp(-step / 30)})
                grid.append((Synthetic(config), result, curve))
    return grid


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption."""
    return "Best of each category on movie: houlsby ("
