"""Synthetic records of the figure robustness."""

import numpy as np
import pandas as pd

from deltacontrol.experiments.studies.robustness.grid import DELTAS
from tests.paper_figures.made_up import Grid, Synthetic

ACCURACY = {
    **{"clean": 0.8, "clean_corrected": 0.79, "clean_random": 0.78},
    **{"attacked": 0.4, "attacked_corrected": 0.6, "attacked_random": 0.5},
    **{"adaptive_corrected": 0.45, "typos": 0.7, "typos_corrected": 0.71},
}


def grid(seeds: int = 3) -> Grid:
    grid: Grid = []
    random = np.random.default_rng(4)
    for place, name in enumerate(DELTAS):
        for seed in range(seeds):
            config = {
                "delta": {"name": name},
                "model": "minilm-l6",
                "task": "movie",
                "seed": seed,
                "num_test": 256,
                "epsilon": 0.02,
                "typo_rate": 0.3,
            }
            accuracy = {
                condition: value - 0.01 * place + random.normal(0, 0.01)
                for condition, value in ACCURACY.items()
            }
            result = {"accuracy": accuracy, "choice": {"rank": 128, "proportional": 0.5}}
            grid.append((Synthetic(config), result, pd.DataFrame(accuracy, index=[0])))
    return grid


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption: what the correction gives LoRA back where it is known."""
    own = table[table["method"] == "lora"].pivot(
        index="seed", columns="condition", values="accuracy"
    )
    lost = own["clean"] - own["attacked"]
    share = (own["adaptive_corrected"] - own["attacked"]).sum() / lost.sum()
    return f"in per cent, LoRA {100 * share:.0f} ["
