"""Synthetic records of the figure selection."""

from typing import Any

import numpy as np
import pandas as pd

from tests.paper_figures.made_up import Grid, Synthetic


def grid(seeds: int = 2) -> Grid:
    grid: Grid = []
    names = [f"{layer}.{site}" for layer in range(3) for site in ("query", "value", "down")]
    share = np.geomspace(1.0, 0.1, 8)
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        entry = random.uniform(0.0, 1.0, len(names))
        paths = []
        for program in ("group lasso", "nuclear norm"):
            lasso = program == "group lasso"
            active = (entry[None] > share[:, None]).sum(1) if lasso else np.arange(8) // 2
            columns: dict[str, Any] = {
                "program": program,
                "weight": 0.003 * share,
                "share": share,
                "objective": 0.6 - 0.1 * (1 - share),
                "bound": 0.6 - 0.1 * (1 - share) - 1e-9,
                "gap": 1e-9 * random.uniform(0.0, 1.0, 8),
                "train_loss": 0.3 + 0.3 * share,
                "heldout_loss": 0.6 + 0.2 * np.square(np.log(share / 0.4)),
                "heldout_loss_real": 0.61 + 0.1 * np.square(np.log(share / 0.4)),
                "heldout_accuracy": np.full(8, 0.7),
                "heldout_accuracy_real": np.full(8, 0.69),
                "num_active": active if lasso else np.minimum(active, 1),
                "rank": active,
                "rank_bound": active + 1,
                "rounds": np.ones(8, dtype=int),
                "status": "optimal",
                "seconds": np.full(8, 0.2),
            }
            if lasso:
                for name, enters in zip(names, entry, strict=True):
                    columns[f"norm.{name}"] = np.maximum(enters - share, 0.0)
                    columns[f"bound.{name}"] = (enters > share).astype(int)
            paths.append(pd.DataFrame(columns))
        trained = [
            {
                "set": kind,
                "names": names[first : first + 2],
                "num_trainable": 6144,
                "train_loss": 0.4,
                "train_accuracy": 0.8,
                "test_loss": loss + random.normal(0, 0.01),
                "test_accuracy": 1.3 - loss + random.normal(0, 0.01),
            }
            for kind, first, loss in (
                ("selected", 0, 0.56),
                ("unused", 2, 0.6),
                ("unused", 4, 0.6),
                ("all", 0, 0.55),
            )
        ]
        result = {
            "names": names,
            "num_groups": len(names),
            "chosen": 3,
            "chosen_rank": 4,
            "rank_site": names[0],
            "selected": names[:2],
            "num_unused": 4,
            "head_weight": 0.01,
            "head_gap": 1e-12,
            "head_test_loss": 0.62,
            "head_test_accuracy": 0.66,
            "linearisation_error": 4.2e-14,
            "tolerance": 1e-6,
            "trained": trained,
        }
        config = {"model": "minilm-l6", "task": "movie", "num_examples": 160, "seed": seed}
        grid.append((Synthetic(config), result, pd.concat(paths, ignore_index=True)))
    return grid


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption."""
    return "the derivatives of the model by 4e-14"
