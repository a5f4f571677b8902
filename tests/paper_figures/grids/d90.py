"""Synthetic records of the figure d90."""

from typing import Any

import numpy as np
import pandas as pd

from deltacontrol.theory.dimension.estimate import Baseline, estimate_dimension
from tests.paper_figures.made_up import Grid, Synthetic


def grid() -> Grid:
    grid: Grid = []
    texts = [
        (model, task, method, pretrained, centre)
        for task in ("movie", "trec6")
        for model, method, pretrained, centre in (
            ("minilm-l3", "said", True, 2000.0),
            ("minilm-l3", "did", True, 4000.0),
            ("minilm-l6", "said", True, 500.0),
            ("minilm-l6", "said", False, 3e7),
        )
    ]
    for model, task, method, pretrained, centre in texts:
        config = {
            "model": model,
            "task": task,
            "method": method,
            "pretrained": pretrained,
            "target": None,
        }
        grid.append(_search(config, 0.8, 0.52, centre, (1000, 3162, 10_000, 100_000)))
    for net, centre in (("fc", 60.0), ("lenet", 25.0)):
        for target in (None, 0.9):
            config = {"net": net, "target": target}
            grid.append(_search(config, 0.95, 0.1, centre, (100, 200, 400, 800, 1600)))
    return grid


def _search(
    config: dict[str, Any], top: float, chance: float, centre: float, dimensions: tuple[int, ...]
) -> tuple[Synthetic, dict[str, Any], pd.DataFrame]:
    random, rows = np.random.default_rng(len(str(config))), []
    for dimension in (None, *dimensions):
        gain = 1.0 if dimension is None else dimension / (dimension + centre)
        for seed in range(2):
            accuracy = chance + (top - chance) * gain + random.normal(0, 0.004)
            row = {"dimension": dimension, "seed": seed, "performance": accuracy, "rate": 0.1}
            rows.append(row | {"used": True, "run": f"{dimension}-{seed}"})
        rows.append(row | {"used": False, "performance": chance, "run": f"{dimension}-lost"})
    curve = pd.DataFrame(rows).astype({"dimension": "Int64"})
    used = curve[curve["used"]]
    baseline = Baseline(tuple(used.loc[used["dimension"].isna(), "performance"]))
    tried = used[used["dimension"].notna()]
    goal = baseline if config["target"] is None else config["target"]
    found = estimate_dimension(
        tried["dimension"].to_numpy(float), tried["performance"].to_numpy(), goal, chance=chance
    )
    return Synthetic(config), found.to_dict() | {"chance": chance}, curve


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption."""
    return "Of 8 searches on text: 6 estimated and 2 above budget."
