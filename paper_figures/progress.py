"""How a training went, from what was looked at on its way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from deltacontrol.experiments.runs.record import Record

__all__ = ["SHARE", "least_way", "looks_of", "nearly_done", "smoothed"]

SHARE = 0.95  # of the way
WIDTH = 3  # looks of a running mean
DEVIATIONS = 2.0  # of the difference of two shares, below which nothing was learnt


def looks_of(record: Record, name: str = "accuracy") -> pd.DataFrame:
    """Step and value of every look at validation rows; empty where there was none."""
    column = f"validation_{name}"
    found = record.curve().reindex(columns=["step", column]).dropna()
    return found.rename(columns={column: name}).reset_index(drop=True)


def smoothed(values: Sequence[float] | pd.Series) -> np.ndarray:
    """A running mean over three looks, of two at the ends."""
    series = pd.Series(np.asarray(values, dtype=float))
    return series.rolling(WIDTH, center=True, min_periods=2).mean().to_numpy()


def least_way(majority: float, rows: int) -> float:
    """The least rise of an accuracy above the majority's that is no noise of so many rows."""
    return DEVIATIONS * math.sqrt(2 * majority * (1 - majority) / max(rows, 1))


def nearly_done(
    steps: Sequence[float] | pd.Series,
    accuracy: Sequence[float] | pd.Series,
    majority: float,
    *,
    rows: int,
    last: float,
) -> float:
    """The step at which a training is nearly done.

    Of its accuracy a(t), smoothed by `smoothed`, it is the first t with

        a(t) - m >= 0.95 (a* - m),

    where m is the accuracy of the majority class and a* the last a(t); between two looks where the
    line through them says, from m at step 0 on. A training whose whole way is below `least_way`
    learnt nothing that so few rows can tell, and takes all of its steps.

    Args:
        steps: of the looks.
        accuracy: at the looks.
        majority: m.
        rows: that a look evaluates.
        last: the last step of the training.
    """
    if len(steps) < 2:
        return float(last)
    t, a = np.asarray(steps, dtype=float), smoothed(accuracy)
    way = float(a[-1]) - majority
    if way < least_way(majority, rows):
        return float(last)
    goal = majority + SHARE * way
    first = int(np.argmax(a >= goal))
    before, at = (0.0, majority) if first == 0 else (t[first - 1], a[first - 1])
    return float(before + (goal - at) / (a[first] - at) * (t[first] - before))
