"""Synthetic records of the figure spectra."""

import numpy as np
import pandas as pd

from tests.paper_figures.made_up import Grid, Synthetic


def grid(seeds: int = 2) -> Grid:
    grid: Grid = []
    sites, ranks, steps = ("attention.query", "mlp.up"), (1, 4, 16), (10, 20)
    index = np.arange(1, 33)
    for task, decay in (("movie", 1.0), ("trec6", 0.7)):
        for seed in range(seeds):
            random = np.random.default_rng(seed)
            modules, frames = [], []
            for layer in range(2):
                for site in sites:
                    values = index**-decay * np.exp(0.02 * random.normal(size=len(index)))
                    place = {"layer": layer, "site": site}
                    frames.append(
                        pd.DataFrame({**place, "index": index, "value": np.sort(values)[::-1]})
                    )
                    modules += [
                        {
                            **place,
                            "step": step,
                            "shape": [32, 64],
                            "stable_rank": 1.5 + 0.1 * step / 10,
                        }
                        for step in steps
                    ]
            rows = [
                {
                    "rank": rank,
                    "loss": 0.2 + 0.3 * rank**-0.5 + 0.01 * seed,
                    "truncated_loss": 0.2 + 0.3 * rank**-0.8,
                    "tail_share": rank**-0.5,
                }
                for rank in ranks
            ]
            overlaps = [
                {
                    "step": step,
                    "rank": rank,
                    "left": 0.2 + 0.01 * rank + 0.001 * step,
                    "right": 0.1 + 0.01 * rank,
                    "left_by_chance": rank / 32,
                    "right_by_chance": rank / 64,
                }
                for step in steps
                for rank in ranks
            ]
            ends = {"before": 0.7, "head": 0.5, "full": 0.2, "full_without_update": 0.5}
            result = {"losses": ends, "ranks": rows, "modules": modules, "overlaps": overlaps}
            config = {"model": "minilm-l3", "task": task, "seed": seed, "steps": steps[-1]}
            grid.append((Synthetic(config), result, pd.concat(frames, ignore_index=True)))
    return grid


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption."""
    return "On movie the stable rank is 1.7 on average, 15.5 % of a Gaussian matrix's"
