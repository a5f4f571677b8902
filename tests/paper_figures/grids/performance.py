"""Synthetic records of the figure performance."""

import numpy as np
import pandas as pd

from tests.paper_figures.made_up import METHODS, Grid, Synthetic


def grid(seeds: int = 3) -> Grid:
    grid: Grid = []
    random = np.random.default_rng(0)
    for task, shift, majority in (("movie", 0.0, 0.52), ("trec6", 0.08, 0.24)):
        for name, (accuracy, share) in METHODS.items():
            for seed in range(seeds):
                config = {
                    "model": "minilm-l6",
                    "task": task,
                    "deltas": [{"name": name}],
                    "seed": seed,
                    "learning_rate": 2e-4 if name == "full" else 1e-3,
                    "evaluate_on": "test",
                }
                result = {
                    "accuracy": accuracy + shift + random.normal(0, 0.006),
                    "majority_share": majority,
                    "num_trainable": int(22_700_000 * share),
                    "trainable_share": 0.0 if name == "head" else share,
                    "trainable_share_with_head": share,
                    "seconds_per_step": 0.2 + 0.1 * (name == "full"),
                    "peak_memory_bytes": 900_000_000,
                }
                step = np.arange(1, 201)
                floor = 1.0 - accuracy
                loss = floor + (0.7 - floor) * np.exp(-step / 60) + random.normal(0, 0.05, 200)
                curve = pd.DataFrame({"step": step, "loss": np.maximum(loss, 0.01)})
                grid.append((Synthetic(config), result, curve))
    return grid


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption: the accuracy of full fine-tuning on movie."""
    return f"{100 * table['accuracy'].iloc[:3].mean():.1f} %"
