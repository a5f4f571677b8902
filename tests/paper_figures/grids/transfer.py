"""Synthetic records of the figure transfer: tasks of one kind help each other by three points."""

import numpy as np
import pandas as pd

from deltacontrol.experiments.studies.transfer.grid import TASKS
from tests.paper_figures.made_up import Grid, Synthetic


def grid(seeds: int = 2) -> Grid:
    grid: Grid = []
    random = np.random.default_rng(3)
    axes = {kind: random.normal(size=64) for kind in dict.fromkeys(q.kind for q in TASKS.values())}
    for seed in range(seeds):
        for source in ("", *TASKS):
            config = {
                "source": source,
                "targets": list(TASKS),
                "delta": {"name": "lora"},
                "model": "minilm-l3",
                "seed": seed,
                "steps": 80,
                "tune_steps": 20,
            }
            targets = {
                target: {
                    "probe": 0.75 + gain(source, target) + random.normal(0, 0.003),
                    "tuned": 0.6 + 2 * gain(source, target) + random.normal(0, 0.01),
                    "tuned_loss": 0.6,
                    "majority_share": 0.5,
                }
                for target in TASKS
            }
            result = {"targets": targets, "own": 0.8 if source else None}
            if source:
                vector = axes[TASKS[source].kind] + random.normal(size=64)
                result |= {"norm": float(np.linalg.norm(vector)), "sketch": vector.tolist()}
            curve = pd.DataFrame([{"target": name, **row} for name, row in targets.items()])
            grid.append((Synthetic(config), result, curve))
    return grid


def gain(source: str, target: str) -> float:
    if not source:
        return 0.0
    return 0.06 if source == target else 0.03 if TASKS[source].kind == TASKS[target].kind else -0.01


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption: the tasks that are made up."""
    return f"{table['target'].nunique()} tasks, means over 2 seeds"
