"""Intervals of numbers that are averaged over tasks, some of which share a corpus.

Tasks of one corpus are not independent of each other. A draw takes corpora with replacement, as
many as there are, each with all of its tasks; the interval is that of
`deltacontrol.theory.evidence` for as many units as there are corpora. All numbers are taken over
the same draws, so that those of two methods are paired.

Source: Field & Welsh, *Bootstrapping clustered data*, J. R. Statist. Soc. B 69(3), 2007, "cluster
bootstrap".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from deltacontrol.theory.evidence import CONFIDENCE, LEAST_ROWS, RESAMPLES, Evidence

__all__ = ["Clusters", "Estimate"]


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its range, NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def text(self, digits: int = 1, sign: str = "") -> str:
        """``value [low, high]``, or the value alone.

        Example:
            >>> Estimate(0.5, 0.25, 1.0).text(2)
            '0.50 [0.25, 1.00]'
        """
        shown = [f"{x:{sign}.{digits}f}" for x in (self.value, self.low, self.high)]
        return shown[0] if math.isnan(self.low) else f"{shown[0]} [{shown[1]}, {shown[2]}]"


class Clusters:
    """Tasks in clusters, and draws of the clusters.

    Args:
        labels: the cluster of each task (tasks,).
        alike: give every cluster the same weight, whatever its number of tasks. Where sizes are
            very unequal, intervals of plain means over tasks are too narrow.
        draws: how often they are drawn.
        seed: of the draws.
    """

    def __init__(
        self,
        labels: Sequence[str],
        *,
        alike: bool = False,
        draws: int = RESAMPLES,
        seed: int = 0,
    ) -> None:
        self.alike = alike
        names, self._place = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
        self.count = len(names)
        taken = np.random.default_rng(seed).integers(0, self.count, (draws, self.count))
        # How often each draw has each cluster; the first row is the sample itself.
        times = np.zeros((draws + 1, self.count))
        np.add.at(times, (np.arange(1, draws + 1)[:, None], taken), 1.0)
        times[0] = 1.0
        self._times = times

    def means(self, values: pd.DataFrame | np.ndarray) -> np.ndarray:
        """Means over tasks of each column (1 + draws, columns), that of the sample first.

        Args:
            values: a row a task, in the order of the labels (tasks, columns).
        """
        values = np.asarray(values, dtype=float)
        sums = np.zeros((self.count, values.shape[1]))
        np.add.at(sums, self._place, values)
        sizes = np.bincount(self._place).astype(float)
        if self.alike:
            sums, sizes = sums / sizes[:, None], np.ones(self.count)
        return (self._times @ sums) / (self._times @ sizes)[:, None]

    def estimate(self, numbers: np.ndarray, confidence: float = CONFIDENCE) -> Estimate:
        """A number of the sample with the interval of its draws (1 + draws,)."""
        if self.count < LEAST_ROWS or not math.isfinite(numbers[0]):
            return Estimate(float(numbers[0]))
        found = Evidence.of_draws(float(numbers[0]), numbers[1:], "corpus", self.count)
        return Estimate(found.value, *found.bounds(confidence))

    def of_means(
        self,
        values: pd.DataFrame,
        statistic: Callable[[np.ndarray], np.ndarray] | None = None,
        confidence: float = CONFIDENCE,
    ) -> Estimate:
        """A statistic of the columns' means; of one column the mean itself.

        Args:
            values: a row a task, in the order of the labels.
            statistic: of the means (1 + draws, columns), a number a row.
            confidence: of the interval.
        """
        means = self.means(values)
        numbers = means[:, 0] if statistic is None else statistic(means)
        return self.estimate(numbers, confidence)
