"""Synthetic records of the figure threshold."""

from typing import Any

import numpy as np
import pandas as pd

from tests.paper_figures.made_up import Grid, Synthetic


def grid(seeds: int = 2) -> Grid:
    grid: Grid = []
    deltas = {("head",): 0.8, ("bitfit", "head"): 9.0, ("selected-modules:sites=block",): 3.0}
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        for names, stretch in ((None, 1.0), (("lora", "head"), 1.0), *deltas.items()):
            tuned = (8, 32, 128) if names in deltas else ()
            config: dict[str, Any] = {"exponent": 1.0, "size": 400, "seed": seed}
            if names is not None:
                config = {"model": "minilm-l3", "task": "movie", "deltas": list(names)}
                config |= {"dimensions": list(tuned), "seed": seed}
            cases, frames = [], []
            for target, d in ((0.8, 15.0), (0.5, 40.0)):
                kinds = ["quadratic"] if names is None else ["linearised", "fine-tuned"]
                for kind in kinds[: 2 if tuned else 1]:
                    factor = stretch if kind == "fine-tuned" else 1.0
                    measured = d * factor * np.exp(random.normal(0, 0.03))
                    case = {"kind": kind, "target": target, "predicted": d, "width": 4.0}
                    case |= {"standard_error": 0.5, "published": 2 * d, "measured_width": 4.0}
                    case |= {"measured": measured if measured < 128 else None, "draws": 4}
                    case |= {"low": 0.9 * measured, "high": 1.1 * measured}
                    case |= {"cone": 0.8 * d, "cone_error": 1.0} if kind == "fine-tuned" else {}
                    cases.append(case)
                dimension = np.arange(4, 60, 2)
                share = 1 / (1 + np.exp(-(dimension - d) / 3))
                row = {"kind": kinds[0], "target": target, "dimension": dimension}
                frames.append(pd.DataFrame(row | {"predicted": share, "measured": share}))
            for dimension in tuned:
                for subspace in range(3):
                    row = {"kind": "training", "dimension": dimension, "seed": subspace}
                    loss = 0.7 * np.exp(-dimension / 40 / stretch) + random.uniform(0, 0.02)
                    row |= {"loss": loss, "expected": 0.7 * np.exp(-dimension / 40)}
                    frames.append(pd.DataFrame([row]))
            result = {"cases": cases, "start": 0.7, "least": 0.2, "rank": 48}
            grid.append((Synthetic(config), result, pd.concat(frames, ignore_index=True)))
    return grid


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption."""
    return "subspaces of BitFit: 4 of 4 targets not reached up to d = 128"
