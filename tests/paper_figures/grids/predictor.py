"""Synthetic records of the figure predictor: one predictor knows, the others draw lots."""

from __future__ import annotations

import zlib

import numpy as np
import pandas as pd

from deltacontrol.experiments.studies.foretelling.grid import foretold
from deltacontrol.experiments.studies.foretelling.measurement import PREDICTORS
from deltacontrol.experiments.studies.many_tasks.grid import DELTAS
from tests.paper_figures.made_up import Grid, Synthetic

COSTS = {"parameters": 0.0, "fixed-order": 0.0, "probe:steps=30": 848.0}


def loss(task: str, method: str) -> float:
    """What a method reaches on a task: mostly its own level, and something of the task."""
    random = np.random.default_rng(zlib.crc32(f"{task}/{method}".encode()))
    return 0.3 + 0.05 * DELTAS.index(method) + random.normal(0, 0.06)


def grid() -> Grid:
    grid: Grid = []
    for number, question in enumerate(foretold()):
        random = np.random.default_rng(number)
        scores = {p: {m: float(random.normal()) for m in DELTAS} for p in PREDICTORS}
        scores["linearised"] = {
            m: loss(question.name, m) + float(random.normal(0, 0.02)) for m in DELTAS
        }
        scores["gradient-spectrum"] = {m: None for m in DELTAS} | {"lora": 0.1, "houlsby": 0.2}
        config = {"task": question.name, "model": "minilm-l3", "rows": 128, "seed": 0}
        result = {
            "scores": scores,
            "costs": {p: dict.fromkeys(DELTAS, COSTS.get(p, 384.0)) for p in PREDICTORS},
            "cost_of_training": 1920.0,
            "rates": {m: [1e-3, 5e-4, 2e-3] for m in DELTAS},
            "features": random.normal(size=4).tolist(),
        }
        grid.append((Synthetic(config), result, pd.DataFrame({"predictor": ["linearised"]})))
    return grid


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption: how many tasks and corpora."""
    return f"{table['task'].nunique()} tasks of {table['corpus'].nunique()} corpora"
