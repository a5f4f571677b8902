"""Our numbers beside those of the primary source, and whether they agree.

A figure whose study the source has too defines ``agreement(table)``, a list of `Agreement`. A range
decides, be it an interval or what all settings gave: the two agree where all of it says what the
source says, disagree where all of it says the contrary, and it cannot be told otherwise. Each is
made by one of

    `same_order`   each of several is ahead of the next one in the published order
    `same_side`    a difference is on the published side of zero
    `same_size`    a number is within a margin of the published one
    `no_gain`      a gain that the source did not find is below a margin
    `on_side`      whatever else has a bound

A margin is fixed in the figure's code, beside the published number.

Source: Ding et al., *Parameter-efficient fine-tuning of large-scale pre-trained language models*,
Nature Machine Intelligence 5, 220-235, 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from deltacontrol.paper_figures.clusters import Clusters, Estimate
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.evidence import CONFIDENCE

__all__ = ["Agreement", "no_gain", "on_side", "same_order", "same_side", "same_size"]

WORDS = {True: "agrees", False: "disagrees", None: "cannot be told"}


@dataclass(frozen=True)
class Agreement:
    """One published result beside ours.

    Attributes:
        row: the experiment of the source, and what our range is of.
        says: what the source found, as a sentence without a full stop.
        published: its number, or the side of a bound on which it is.
        ours: our number with its range.
        agrees: None where our range does not tell.
        why: what may explain a disagreement.
    """

    row: str
    says: str
    published: str
    ours: str
    agrees: bool | None
    why: str = ""

    @property
    def verdict(self) -> str:
        """In words."""
        return WORDS[self.agrees]

    def cells(self) -> tuple[str, str, str, str, str]:
        """A row of the table of all of them."""
        return self.row, self.says, self.published, self.ours, self.verdict


def on_side(ours: Estimate, bound: float, *, above: bool) -> bool | None:
    """Whether all of a range is above a bound, or below it; False on the other side.

    Example:
        >>> [on_side(Estimate(0.5, 0.4, high), 1.0, above=False) for high in (0.9, 1.1)]
        [True, None]
    """
    low, high = (
        (ours.low - bound, ours.high - bound) if above else (bound - ours.high, bound - ours.low)
    )
    return True if low > 0 else False if high < 0 else None


def same_side(
    row: str, says: str, published: float, ours: Estimate, *, digits: int = 1, why: str = ""
) -> Agreement:
    """Whether a difference is on the side of zero on which the published one is."""
    agrees = on_side(ours, 0.0, above=published > 0)
    told, text = f"{published:+.{digits}f}", ours.text(digits, "+")
    return Agreement(row, says, told, text, agrees, why)


def same_size(
    row: str,
    says: str,
    published: float,
    ours: Estimate,
    margin: float,
    *,
    digits: int = 1,
    why: str = "",
) -> Agreement:
    """Whether a number is within a margin of the published one."""
    low, high = ours.low - published, ours.high - published
    outside = low > margin or high < -margin
    agrees = True if -margin <= low and high <= margin else False if outside else None
    told, text = f"{published:+.{digits}f} (our margin {margin:g})", ours.text(digits, "+")
    return Agreement(row, says, told, text, agrees, why)


def no_gain(
    row: str,
    says: str,
    published: float,
    ours: Estimate,
    margin: float,
    *,
    digits: int = 1,
    why: str = "",
) -> Agreement:
    """Whether a gain that the source did not find stays below a margin here too."""
    agrees = on_side(ours, margin, above=False)
    told, text = f"{published:+.{digits}f}", ours.text(digits, "+")
    return Agreement(row, says, f"{told} (our margin {margin:g})", text, agrees, why)


def same_order(
    row: str,
    order: Sequence[str],
    points: pd.DataFrame,
    clusters: Clusters,
    *,
    names: Sequence[str] | None = None,
    why: str = "",
) -> Agreement:
    """Whether averages stand in a published order, the best first.

    They do where each is ahead of the next one, by the 95 % interval of their difference. They do
    not where some is behind the next one; as any of k steps may be, the intervals that say so are
    those of 1 - 0.05/k. Kendall's τ, the mean over pairs of +1 for the published order and -1 for
    the contrary, tells how near they are.

    Args:
        row: as in `Agreement`.
        order: columns of ``points``, two or more.
        points: a row a task, a column a method.
        clusters: of the tasks.
        names: of the methods, as they are shown.
        why: as in `Agreement`.

    Raises:
        InputError: the order is of fewer than two methods, or of one that has no points.
    """
    lacking = [name for name in order if name not in points]
    if lacking or len(order) < 2:
        raise InputError(
            f"an order of {', '.join(order) or 'no method'} cannot be held against "
            f"{', '.join(map(str, points))}; it needs two methods or more, all of them there"
        )
    pairs, count = list(combinations(range(len(order)), 2)), len(order) - 1
    own = points[list(order)]

    def tau(means: np.ndarray) -> np.ndarray:
        return np.mean([np.sign(means[:, i] - means[:, j]) for i, j in pairs], axis=0)

    def steps(confidence: float) -> list[Estimate]:
        return [
            clusters.of_means(own, lambda means, i=i: means[:, i] - means[:, i + 1], confidence)
            for i in range(count)
        ]

    agrees = None
    if all(step.low > 0 for step in steps(CONFIDENCE)):
        agrees = True
    elif any(step.high < 0 for step in steps(1 - (1 - CONFIDENCE) / count)):
        agrees = False
    says, found = " > ".join(names or order), clusters.of_means(own, tau)
    return Agreement(row, says, "τ 1", f"τ {found.text(2)}", agrees, why)
