"""d90: the subspace dimension that gives 90 % of what full fine-tuning gives.

Li et al., ICLR 2018, use two rules. *Absolute*: every curve is held against one line, here 0.9 ×
full fine-tuning of the pre-trained model. *Baseline*: each curve is held against 0.9 × its own full
fine-tuning. Aghajanyan et al., ACL 2021, use the second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from paper_figures.base import groups

KEYS = ["model", "task", "pretrained"]
SHARE = 0.9


@dataclass(frozen=True)
class Target:
    """One curve held against one rule.

    Attributes:
        model: Model of the curve.
        task: Task of the curve.
        pretrained: Whether the curve starts from the pre-trained model.
        rule: "absolute" or "baseline".
        accuracy: The accuracy to reach.
        dimension: d90 of the mean over seeds; None where it is not reached.
        range: Least and greatest d90 of single seeds; infinite where a seed does not reach it.
        smallest: Smallest dimension that was run.
        largest: Largest dimension that was run.
    """

    model: str
    task: str
    pretrained: bool
    rule: str
    accuracy: float
    dimension: float | None
    range: tuple[float, float]
    smallest: int
    largest: int

    @property
    def reading(self) -> str:
        """`= 212 [180, 260]`, `≤ 10 [10, 10]` or `not reached up to d = 20,000`."""
        if self.dimension is None:
            return f"not reached up to d = {self.largest:,}"
        sign = "≤" if self.dimension <= self.smallest else "="
        low, high = (f"{d:,.0f}" if math.isfinite(d) else "not reached" for d in self.range)
        return f"{sign} {self.dimension:,.0f} [{low}, {high}]"


def d90(dimensions: np.ndarray, accuracy: np.ndarray, target: float) -> float | None:
    """Smallest d with `accuracy >= target`, interpolated in log d; None where it is not reached.

    Args:
        dimensions: Increasing dimensions, shape (n,).
        accuracy: Mean accuracy at each, shape (n,).
        target: The accuracy to reach.

    Returns:
        The first crossing; the smallest dimension itself where that one already reaches `target`.

    Example:
        >>> round(d90(np.array([10, 1000]), np.array([0.5, 0.9]), 0.7), 6)
        100.0
    """
    reached = np.flatnonzero(accuracy >= target)
    if not len(reached):
        return None
    first = int(reached[0])
    if first == 0:
        return float(dimensions[0])
    low, high = accuracy[first - 1], accuracy[first]
    left, right = np.log(dimensions[first - 1]), np.log(dimensions[first])
    return float(np.exp(left + (target - low) / (high - low) * (right - left)))


def targets(table: pd.DataFrame) -> list[Target]:
    """Every curve of `table` against both rules, where the full fine-tuning they need was run."""
    full: dict[tuple[str, str, bool], float] = {
        keys: runs["accuracy"].mean() for keys, runs in groups(_of(table, "full"), KEYS)
    }
    found = []
    for (model, task, pretrained), runs in groups(_of(table, "subspace"), KEYS):
        mean = runs.groupby("dimension")["accuracy"].mean().reset_index()
        for rule, start in (("absolute", True), ("baseline", pretrained)):
            if (model, task, start) not in full:
                continue
            target = SHARE * full[model, task, start]
            crossings = [
                math.inf if (d := _crossing(of_seed, target)) is None else d
                for _, of_seed in groups(runs.sort_values("dimension"), ["seed"])
            ]
            found.append(
                Target(
                    model=model,
                    task=task,
                    pretrained=pretrained,
                    rule=rule,
                    accuracy=target,
                    dimension=_crossing(mean, target),
                    range=(min(crossings), max(crossings)),
                    smallest=int(runs["dimension"].min()),
                    largest=int(runs["dimension"].max()),
                )
            )
    return found


def _of(table: pd.DataFrame, method: str) -> pd.DataFrame:
    return table[table["method"] == method]


def _crossing(curve: pd.DataFrame, target: float) -> float | None:
    return d90(curve["dimension"].to_numpy(float), curve["accuracy"].to_numpy(float), target)
