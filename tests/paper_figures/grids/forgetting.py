"""Synthetic records of the figure forgetting: paths on which KL grows as the square of the gain."""

import numpy as np
import pandas as pd

from deltacontrol.experiments.studies.forgetting.grid import RATES
from tests.paper_figures.made_up import Grid, Synthetic

COST = dict(zip(RATES, (3.0, 1.0, 1.2, 1.5, 0.8, 0.6), strict=True))


def grid(seeds: int = 2) -> Grid:
    grid: Grid = []
    random = np.random.default_rng(2)
    for seed in range(seeds):
        for name, rate in RATES.items():
            for factor in (1.0, 1 / 3):
                config = {
                    "delta": {"name": name},
                    "model": "smollm2-135m",
                    "task": "movie-lines",
                    "held": "bbc",
                    "learning_rate": factor * rate,
                    "seed": seed,
                    "steps": 32,
                }
                step = np.arange(1, 33)
                gain = 0.5 * (1 - np.exp(-step * factor / 8)) + random.normal(0, 0.002, 32)
                seen = step % 4 == 0
                path = {
                    "validation_loss": 4.8 - gain,
                    "validation_held_loss": 5.2 - 0.1 * gain + 0.2 * COST[name] * gain**2,
                    "validation_kl": 0.1 * COST[name] * gain**2,
                }
                columns = {n: np.where(seen, values, np.nan) for n, values in path.items()}
                curve = pd.DataFrame({"step": step, **columns})
                end = {n.removeprefix("validation_"): float(v[-1]) for n, v in path.items()}
                start = {"loss": 4.8, "held_loss": 5.2, "kl": 0.0}
                result = {"start": start, "end": end, "trainable_share": 0.003}
                grid.append((Synthetic(config), result, curve))
    for name, cost in COST.items():
        if name != "full":
            gain = np.linspace(0.01, 0.6, 20)
            curve = pd.DataFrame({"mu": 1 / gain, "gain": gain, "kl": 0.05 * cost * gain**2})
            config = {"delta": {"name": name}, "seed": 0, "model": "smollm2-135m"}
            grid.append((Front(config), {"task_loss": 4.8, "num_controls": 9}, curve))
    return grid


class Front(Synthetic):
    """A foretold front."""

    kind = "forgetting-front"


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption: the common task loss."""
    return f"For a task loss of {table['common_loss'].iloc[0]:.3f} nats"
