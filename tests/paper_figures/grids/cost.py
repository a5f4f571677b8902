"""Synthetic records of the figure cost: power laws with a constant before, as a benchmark's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from tests.paper_figures.made_up import Grid, Synthetic

#           work, along, exponent, expected, quantities
GROWTHS = {
    "layers": ("training step with LoRA", "layers", 1.0, (1, 1), ("seconds", "kept_bytes")),
    "tokens": ("training step with LoRA", "tokens a row", 1.5, (1, 2), ("seconds", "kept_bytes")),
    "ilqr-width": ("iLQR iteration", "states", 2.5, (3, 3), ("seconds",)),
    "records": ("list of runs, read", "records", 1.05, (1, 1), ("seconds",)),
}


def record(**about: Any) -> dict[str, Any]:
    """What the benchmark writes; `about` replaces entries of it."""
    found = []
    for name, (work, along, exponent, expected, quantities) in GROWTHS.items():
        for quantity in quantities:
            sizes = 2 ** np.arange(1, 8)
            coefficient = 2e-4 if quantity == "seconds" else 3e5
            law = coefficient * sizes**exponent
            median = law + coefficient * 2.0 * (sizes < 16)
            sampled = quantity == "seconds"
            points = [
                {
                    "size": int(s),
                    "median": c,
                    "q25": c * (1 - sampled / 20),
                    "q75": c * 1.1**sampled,
                }
                for s, c in zip(sizes, median.tolist(), strict=True)
            ]
            found.append(
                {
                    "name": name, "quantity": quantity, "work": work, "along": along,
                    "at": "all else equal", "expected": list(expected), "why": "each is used once",
                    "points": points, "fitted_from": 16, "exponent": exponent,
                    "interval": [exponent - 0.02, exponent + 0.03] if sampled else None,
                    "coefficient": coefficient, "misfit": 1.25 if name == "records" else 1.0,
                }
            )  # fmt: skip
    return {
        "threads": 1, "clock": "cpu", "turns": 9, "seed": 0, "quick": False, "growths": found,
        "load": [0.25, 0.5], "hardware": {"processor": "made-up processor", "cores": 2},
        "packages": {},
    } | about  # fmt: skip


def grid() -> Grid:
    return [(Synthetic({"benchmark": "growth"}), record(), pd.DataFrame({"step": [0]}))]


def caption(table: pd.DataFrame) -> str:
    """A piece of the figure's caption."""
    return (
        "Of 4 exponents of time, 3 are within 0.1 of the expected; the others: iLQR iteration over "
        "states 2.50 (2.48 to 2.53), between the two largest sizes 2.50, expected 3."
    )
