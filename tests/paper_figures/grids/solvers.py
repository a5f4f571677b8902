"""Synthetic records of the figure solvers."""

import numpy as np
import pandas as pd

from tests.paper_figures.made_up import Grid, Synthetic


def grid(seeds: int = 3) -> Grid:
    grid: Grid = []
    #        contraction per iteration, gradients and seconds per iteration, iterations
    methods = {
        "gauss-newton": (0.75, 12.0, 2.0, 40),
        "newton-cg": (0.45, 25.0, 6.0, 22),
        "lbfgs": (0.96, 1.1, 0.2, 450),
        "msa": (0.99, 1.0, 0.15, 500),
        "adamw": (0.98, 1.0, 0.16, 500),
    }
    for solver, (factor, work, time, count) in methods.items():
        for seed in range(seeds):
            random = np.random.default_rng(seed)
            iteration = np.arange(count + 1)
            wave = np.exp(random.normal(0, 0.1, count + 1))
            residual = 0.5 * factor**iteration * wave + 1e-11
            curve = pd.DataFrame(
                {
                    "iteration": iteration,
                    "objective": 0.02 + 0.001 * seed + residual**2 + 1e-12 * count,
                    "residual": residual,
                    "gradients": 1.0 + work * iteration,
                    "seconds": 0.2 + time * iteration,
                }
            )
            rates = [1.0, 0.3, 0.1] if solver in ("msa", "adamw") else []
            config = {
                "solver": solver,
                "model": "minilm-l6",
                "num_examples": 4,
                "max_length": 12,
                "weight_decay": 0.01,
                "gradients": 600,
                "seed": seed,
            }
            last = curve.iloc[-1]
            result = {
                "status": "converged" if last["residual"] < 1e-6 else "budget",
                "rate": rates[1 + seed % 2] if rates else None,
                "search": [
                    {"rate": rate, "status": "budget" if index == 1 + seed % 2 else "unstable"}
                    for index, rate in enumerate(rates[: 2 + seed % 2])
                ],
                "num_controls": 74_498,
                **{key: float(last[key]) for key in ("objective", "residual", "seconds")},
                "gradients": float(last["gradients"]),
                "iterations": count,
            }
            grid.append((Synthetic(config), result, curve))
    return grid


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption."""
    return "AdamW 0.1 and 0.3 (0.3 and 1 given up)"
