"""Synthetic records of the figure efficiency: memory that grows with the batch."""

import pandas as pd

from deltacontrol.experiments.studies.efficiency.grid import DELTAS, points
from tests.paper_figures.made_up import Grid, Synthetic

SIZES = {"minilm-l3": 17_000_000, "minilm-l6": 22_700_000, "mpnet-base": 109_000_000}
TRAINED = dict(zip(DELTAS, (1.0, 0.006, 0.013, 0.004, 0.0003, 0.002, 0.001), strict=True))


def grid(seeds: int = 1) -> Grid:
    grid: Grid = []
    for seed in range(seeds):
        for model, batch, length in points("paper"):
            for delta, share in TRAINED.items():
                config = {
                    "model": model,
                    "task": "bbc",
                    "deltas": [{"name": delta}],
                    "seed": seed,
                    "batch_size": batch,
                    "max_length": length,
                    "steps": 20,
                }
                moving = 12 * SIZES[model] * share
                kept = 40_000 * batch * length * (1.0 if delta == "full" else 0.7)
                result = {
                    "num_total": SIZES[model],
                    "num_trainable": int(SIZES[model] * share),
                    "baseline_memory_bytes": 500_000_000,
                    "peak_memory_bytes": int(500_000_000 + moving + kept),
                    "seconds_per_step": 1e-4 * batch * length * (1.5 if delta == "full" else 1),
                }
                curve = pd.DataFrame({"step": range(1, 21), "loss": 0.7})
                grid.append((Synthetic(config), result, curve))
    return grid


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption: the method that takes least."""
    means = table.groupby("method")["memory_mb"].mean()
    assert means.idxmin() == "prompt"
    return "prompt takes 0."
