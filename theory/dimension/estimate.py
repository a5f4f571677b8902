"""How many dimensions reach a performance: a monotone fit over seeds, its crossing, an interval.

Observations ``y_ij`` are performances (larger is better) at dimension ``d_i`` with seed ``j``. With

    m = the non-decreasing fit of y on d, least squares over all seeds (isotonic regression),

interpolated linearly in ``log d``, the dimension of a target ``t`` is ``min {d : m(d) >= t}``. For
``t = 0.9 * (mean of full fine-tuning)`` this is ``d90``.

**Interval.** Both the curve and the baseline are noisy, by an unknown spread that is taken to be
the same at all of them, since a few seeds at one dimension do not show a spread of their own. Each
bootstrap draw adds to every group's mean the mean of as many draws from the pooled residuals,

    e_ij = (y_ij - mean_i) * sqrt(n_i / (n_i - 1)) * t_q(df) / z_q,       df = sum_i (n_i - 1),

and repeats the fit and the crossing. The root undoes that residuals about a fitted mean are too
small; the ratio of Student's and the normal quantile accounts for estimating the spread from ``df``
differences (the interval of a mean, its limiting case, is then Student's).

**Verdict.** A crossing outside of what was searched is no estimate; the table is

    both ends of the interval within the searched range          ``estimated``
    even the interval's lower end is above the largest dimension ``above budget``
    even the interval's upper end is at the smallest dimension   ``below smallest``
    the interval sticks out of the range, or there is none       ``inconclusive``

Sources: Li, Farkhoor, Liu & Yosinski, ICLR 2018, section 2 (``d_int90``); Aghajanyan, Gupta &
Zettlemoyer, ACL 2021, section 3 (``d90``); Barlow et al., *Statistical inference under order
restrictions*, 1972 (isotonic regression); Davison & Hinkley, *Bootstrap methods*, 1997, section 6.2
(residuals). The interval and the verdicts are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.stats import norm, t

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError

__all__ = ["Baseline", "DimensionEstimate", "DimensionVerdict", "crossing", "estimate_dimension"]

SHARE = 0.9


class DimensionVerdict(StrEnum):
    """What the observations say about the dimension."""

    ESTIMATED = "estimated"
    ABOVE_BUDGET = "above budget"
    BELOW_SMALLEST = "below smallest"
    INCONCLUSIVE = "inconclusive"


@typed
@dataclass(frozen=True)
class Baseline:
    """A target that was measured: a share of the mean performance of some runs.

    Attributes:
        values: the performance of each run.
        share: the share of their mean to reach.

    Raises:
        InputError: without a finite value.
    """

    values: tuple[float, ...]
    share: float = SHARE

    def __post_init__(self) -> None:
        """Check that there is a number to take a share of."""
        object.__setattr__(self, "values", tuple(float(v) for v in self.values))
        if not self.values or not all(map(math.isfinite, self.values)):
            raise InputError(
                f"the baseline's performances are {self.values}; expected finite numbers, one a run"
            )

    @property
    def target(self) -> float:
        """The performance to reach."""
        return self.share * float(np.mean(self.values))


@dataclass(frozen=True)
class DimensionEstimate:
    """A dimension, its interval, and what may be said of it.

    Attributes:
        verdict: see the module.
        reason: why, in a sentence.
        target: the performance to reach.
        dimension: where the fit reaches it; 0 if the smallest dimension does, infinite if none.
        low: lower end of the interval; 0 and infinity as above.
        high: upper end.
        confidence: of the interval.
        dimensions: distinct dimensions, increasing; none where nothing was run.
        fit: the non-decreasing fit at each.
        spread: pooled standard deviation over seeds; NaN with one seed at each dimension.
        draws: the bootstrap's crossings; empty where there is no spread to draw from.
    """

    verdict: DimensionVerdict
    reason: str
    target: float
    dimension: float
    low: float
    high: float
    confidence: float
    dimensions: tuple[float, ...]
    fit: tuple[float, ...]
    spread: float
    draws: tuple[float, ...] = ()

    def __str__(self) -> str:
        """``212 [180, 260]``, ``> 1,000`` or ``<= 10``; with a ``?`` where it is not certain."""
        if not self.dimensions:
            return "?"
        smallest, largest = self.dimensions[0], self.dimensions[-1]
        if self.verdict is DimensionVerdict.ABOVE_BUDGET:
            return f"> {largest:,.0f}"
        if self.verdict is DimensionVerdict.BELOW_SMALLEST:
            return f"<= {smallest:,.0f}"

        def shown(d: float) -> str:
            if d <= 0:
                return f"<= {smallest:,.0f}"
            return f"{d:,.0f}" if math.isfinite(d) else f"> {largest:,.0f}"

        sure = "" if self.verdict is DimensionVerdict.ESTIMATED else "?"
        if not self.draws:
            return shown(self.dimension) + sure
        return f"{shown(self.dimension)} [{shown(self.low)}, {shown(self.high)}]{sure}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values without the draws; an infinite dimension is None, as JSON has none."""

        def finite(d: float) -> float | None:
            return d if math.isfinite(d) else None

        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "target": self.target,
            "dimension": finite(self.dimension),
            "low": finite(self.low),
            "high": finite(self.high),
            "confidence": self.confidence,
            "dimensions": list(self.dimensions),
            "fit": list(self.fit),
            "spread": finite(self.spread),
            "text": str(self),
        }


def crossing(dimensions: np.ndarray, fit: np.ndarray, target: float) -> float:
    """The smallest ``d`` at which a non-decreasing fit, linear in ``log d``, reaches the target.

    Args:
        dimensions: increasing, ``(n,)``.
        fit: non-decreasing, ``(n,)``.
        target: the value to reach.

    Returns:
        ``d``; 0 where the smallest dimension reaches the target, infinity where none does.

    Example:
        >>> round(crossing(np.array([10.0, 1000.0]), np.array([0.5, 0.9]), 0.7), 6)
        100.0
    """
    reached = np.flatnonzero(fit >= target)
    if not len(reached):
        return math.inf
    i = int(reached[0])
    if i == 0:
        return 0.0
    weight = (target - fit[i - 1]) / (fit[i] - fit[i - 1])
    left, right = np.log(dimensions[i - 1]), np.log(dimensions[i])
    return float(np.exp(left + weight * (right - left)))


@typed
def estimate_dimension(
    dimensions: Sequence[float] | np.ndarray,
    performance: Sequence[float] | np.ndarray,
    target: float | Baseline,
    *,
    chance: float | None = None,
    confidence: float = 0.9,
    num_draws: int = 2000,
    seed: int = 0,
) -> DimensionEstimate:
    """Estimate the smallest dimension that reaches a target, from runs at several dimensions.

    Args:
        dimensions: of each run, ``(runs,)``; several runs at one dimension are seeds.
        performance: of each run, ``(runs,)``; larger is better. A diverged run counts as not
            reaching anything: give the performance of guessing for it.
        target: a number, or runs of which a share is to be reached.
        chance: the performance of guessing; a target that it meets says nothing.
        confidence: of the interval.
        num_draws: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        InputError: no runs, or numbers that are not finite, or sizes that differ; a confidence
            that is no share, no draws, or a negative seed.
    """
    if not 0 < confidence < 1 or num_draws < 1 or seed < 0:
        raise InputError(
            f"confidence is {confidence}, num_draws {num_draws} and seed {seed}; expected a "
            "confidence between 0 and 1, at least one draw, and a seed >= 0"
        )
    groups = _groups(dimensions, performance)
    d = np.array(sorted(groups))
    means = np.array([np.mean(groups[x]) for x in d])
    counts = np.array([len(groups[x]) for x in d])
    runs = target.values if isinstance(target, Baseline) else ()
    goal = target.target if isinstance(target, Baseline) else float(target)
    if not math.isfinite(goal):
        raise InputError(f"the target is {goal}; expected a finite number")
    fit = _isotonic(means, counts)
    point = crossing(d, fit, goal)
    residuals, spread = _residuals([*groups.values(), *([list(runs)] if runs else [])], confidence)
    found: dict[str, Any] = {
        "target": goal,
        "dimension": point,
        "confidence": confidence,
        "dimensions": tuple(float(x) for x in d),
        "fit": tuple(float(x) for x in fit),
        "spread": spread,
    }
    if not len(residuals):
        reason = "one seed at each dimension gives no interval; add seeds"
        return DimensionEstimate(
            DimensionVerdict.INCONCLUSIVE, reason, low=0.0, high=math.inf, **found
        )
    draws = _bootstrap(d, means, counts, target, residuals, num_draws, seed)
    tail = (1 - confidence) / 2
    # Quantiles that are draws themselves, since an infinite one cannot be averaged.
    low, high = np.quantile(draws, [tail, 1 - tail], method="inverted_cdf")
    verdict, reason = _verdict(float(low), float(high), point, d, goal, chance)
    return DimensionEstimate(
        verdict, reason, low=float(low), high=float(high), draws=tuple(map(float, draws)), **found
    )


def _groups(
    dimensions: Sequence[float] | np.ndarray, performance: Sequence[float] | np.ndarray
) -> dict[float, list[float]]:
    if len(dimensions) != len(performance):
        raise InputError(
            f"{len(dimensions)} dimensions and {len(performance)} performances; give one of each "
            "for every run"
        )
    groups: dict[float, list[float]] = {}
    for x, y in zip(dimensions, performance, strict=True):
        if not (math.isfinite(x) and x > 0 and math.isfinite(y)):
            raise InputError(
                f"a run has dimension {x} and performance {y}; expected finite numbers"
            )
        groups.setdefault(float(x), []).append(float(y))
    if not groups:
        raise InputError("there are no runs; give the dimension and the performance of some")
    return groups


def _isotonic(means: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The non-decreasing fit; that of the means, weighted by their counts, is that of the runs."""
    return isotonic_regression(means, weights=counts, increasing=True).x


def _residuals(groups: list[list[float]], confidence: float) -> tuple[np.ndarray, float]:
    """Pooled residuals, widened as the module says, and their standard deviation before that."""
    several = [np.array(group) for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in several)
    if not freedom:
        return np.empty(0), math.nan
    squares = sum(float(np.sum((group - group.mean()) ** 2)) for group in several)
    level = (1 + confidence) / 2
    widened = float(t.ppf(level, freedom) / norm.ppf(level))
    parts = [(g - g.mean()) * math.sqrt(len(g) / (len(g) - 1)) for g in several]
    return widened * np.concatenate(parts), math.sqrt(squares / freedom)


def _bootstrap(
    d: np.ndarray,
    means: np.ndarray,
    counts: np.ndarray,
    target: float | Baseline,
    residuals: np.ndarray,
    num_draws: int,
    seed: int,
) -> np.ndarray:
    generator = np.random.default_rng(seed)

    def noise(count: int) -> np.ndarray:
        return generator.choice(residuals, size=(num_draws, count)).mean(1)

    curves = means + np.stack([noise(int(count)) for count in counts], axis=1)
    if isinstance(target, Baseline):
        goals = target.target + target.share * noise(len(target.values))
    else:
        goals = np.full(num_draws, float(target))
    return np.array(
        [
            crossing(d, _isotonic(curve, counts), goal)
            for curve, goal in zip(curves, goals, strict=True)
        ]
    )


def _verdict(
    low: float, high: float, point: float, d: np.ndarray, goal: float, chance: float | None
) -> tuple[DimensionVerdict, str]:
    smallest, largest = f"{d[0]:,.0f}", f"{d[-1]:,.0f}"
    if chance is not None and goal <= chance:
        reason = f"the target {goal:.4g} is no more than guessing reaches, {chance:.4g}"
        return DimensionVerdict.INCONCLUSIVE, reason
    if math.isinf(low):
        reason = f"the target {goal:.4g} is not reached up to the largest dimension, {largest}"
        return DimensionVerdict.ABOVE_BUDGET, reason
    if high <= 0:
        reason = f"the smallest dimension, {smallest}, reaches the target {goal:.4g} already"
        return DimensionVerdict.BELOW_SMALLEST, reason
    if math.isinf(high):
        reason = f"the interval reaches beyond the largest dimension, {largest}; allow larger ones"
        return DimensionVerdict.INCONCLUSIVE, reason
    if low <= 0:
        reason = f"the interval reaches below the smallest dimension, {smallest}; add smaller ones"
        return DimensionVerdict.INCONCLUSIVE, reason
    return DimensionVerdict.ESTIMATED, f"the fit reaches the target {goal:.4g} at {point:,.0f}"
