"""Synthetic records of the figure combination."""

from itertools import permutations

import numpy as np
import pandas as pd

from deltacontrol.experiments.studies.combination.grid import (
    FORMS,
    IN_TURN,
    PARTS,
    TASKS,
    TEMPLATE,
    TEMPLATE_MODEL,
    TEMPLATES,
    subsets,
)
from tests.paper_figures.made_up import Grid, Synthetic

#       points of a part alone; together they reach the best of theirs
ALONE = {"houlsby": 82.0, "bitfit": 81.0, "prompt": 74.0}


def grid(seeds: int = 3) -> Grid:
    grid: Grid = []
    random = np.random.default_rng(5)
    for shots in (None, 16):
        for place, task in enumerate(TASKS):
            for subset in subsets():
                for seed in range(seeds):
                    points = max((ALONE[part] for part in subset), default=65.0)
                    points += place - 8 * (shots is not None) + random.normal(0, 0.7)
                    config = configuration(task, subset or ("head",), seed) | {"shots": shots}
                    grid.append((Synthetic(config), result(points, shots), losses()))
    for task in IN_TURN:
        for order in permutations(PARTS):
            for seed in range(seeds):
                config = configuration(task, order, seed) | {"sequential": True}
                grid.append((Synthetic(config), result(80.0, None), stages(order, random)))
    return [*grid, *forms(seeds, random)]


def forms(seeds: int, random: np.random.Generator) -> Grid:
    """Templates and heads: the former gain ten points with few rows, and nothing with all."""
    grid: Grid = []
    for shots in (None, 16):
        for form in FORMS:
            for place, task in enumerate(TEMPLATES):
                for subset in subsets()[1:]:
                    for seed in range(seeds):
                        points = 60.0 + place + random.normal(0, 0.5)
                        points += 10 * (form == TEMPLATE and shots is not None)
                        sentence = TEMPLATES[task][0] if form == TEMPLATE else None
                        config = configuration(task, subset, seed) | {
                            "model": TEMPLATE_MODEL, "template": sentence, "shots": shots,
                        }  # fmt: skip
                        grid.append((Synthetic(config), result(points, shots), losses()))
    return grid


def configuration(task: str, deltas: tuple[str, ...], seed: int) -> dict:
    return {
        "model": "minilm-l3",
        "task": task,
        "deltas": [{"name": delta} for delta in deltas],
        "seed": seed,
        "learning_rate": 3e-3,
        "steps": 80,
        "batch_size": 8,
    }


def result(points: float, shots: int | None) -> dict:
    return {
        "accuracy": points / 100,
        "majority_share": 0.5,
        "loss": 0.7 if shots else 0.5,
        "final_train_loss": 0.2 if shots else 0.4,
        "trainable_share": 0.005,
    }


def losses() -> pd.DataFrame:
    return pd.DataFrame({"step": np.arange(1, 81), "loss": np.linspace(0.7, 0.4, 80)})


def stages(order: tuple[str, ...], random: np.random.Generator) -> pd.DataFrame:
    accuracy = np.full(240, np.nan)
    accuracy[79::80] = 0.76 + np.array([0.0, 0.02, 0.03]) + random.normal(0, 0.005, 3)
    return pd.DataFrame(
        {
            "step": np.arange(1, 241),
            "loss": np.linspace(0.7, 0.3, 240),
            "validation_accuracy": accuracy,
            "stage": np.repeat(order, 80),
        }
    )


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption: the points of prompt tuning beside the adapter's."""
    rows = table[table["block"] == "all rows"].groupby("method")["points"].mean()
    return f"prompt tuning alone is {rows['prompt'] - rows['houlsby']:+.1f} ["
