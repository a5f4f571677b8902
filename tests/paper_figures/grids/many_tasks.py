"""Synthetic records of the figure many_tasks: two tasks of each corpus and category."""

import numpy as np
import pandas as pd

from deltacontrol.experiments.studies.many_tasks.grid import DELTAS, Question, questions
from tests.paper_figures.made_up import Grid, Synthetic

#       points below full fine-tuning on average, in the order of DELTAS
BELOW = dict(zip(DELTAS, (0, 1, 2, 4, 9, 3, 6, 1.5), strict=True))


def chosen() -> list[Question]:
    counts: dict[tuple[str, str], int] = {}
    found = []
    for question in questions().values():
        kind = question.corpus, question.category
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= 2:
            found.append(question)
    return found


def grid() -> Grid:
    grid: Grid = []
    random = np.random.default_rng(11)
    for question in chosen():
        level, rows = random.uniform(70, 92), int(random.integers(160, 300))
        metric = "pearson" if question.category == "regression" else "accuracy"
        for delta, below in BELOW.items():
            points = min(level - below * random.uniform(0, 2) + random.normal(0, 1), 100.0)
            config = {
                "model": "minilm-l3",
                "task": question.name,
                "deltas": [{"name": delta}],
                "seed": 0,
                "learning_rate": 1e-3,
                "steps": 80,
                "batch_size": 8,
                "max_length": 24,
            }
            result = {
                metric: round(points / 100 * rows) / rows,
                "majority_share": None if metric == "pearson" else 0.5,
                "num_evaluated": rows,
                "trainable_share": 1.0 if delta == "full" else 0.005,
            }
            step = np.arange(1, 81)
            curve = pd.DataFrame({"step": step, "loss": 0.3 + 0.4 * np.exp(-step / 20)})
            grid.append((Synthetic(config), result, curve))
    return grid


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption: the mean points of full fine-tuning."""
    mean = table.loc[table["method"] == "full", "points"].mean()
    return f"Mean gap to full fine-tuning ({mean:.1f} ["
