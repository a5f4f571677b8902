"""Our numbers beside those of the primary source, and whether they agree.

A figure whose study the source has too defines ``agreement(table)``, a list of `Agreement`. Each
is about one of three things:

    ``ordering``   which of several is ahead: each of the next one in the published order
    ``sign``       which side of zero a difference is on
    ``size``       how large it is: our interval against the published number and a margin

An interval decides: the two agree where all of it says what the source says, disagree where all of
it says the contrary, and it cannot be told otherwise. The margin of a size is fixed in the figure's
code beside the published number.

Source: Ding et al., *Parameter-efficient fine-tuning of large-scale pre-trained language models*,
Nature Machine Intelligence 5, 220-235, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import pandas as pd

from deltacontrol.paper_figures.clusters import Clusters, Estimate

__all__ = ["Agreement", "no_gain", "same_order", "same_side", "same_size"]

WORDS = {True: "agrees", False: "disagrees", None: "cannot be told"}


@dataclass(frozen=True)
class Agreement:
    """One published result beside ours.

    Attributes:
        row: the experiment of the source, such as ``"combination, all rows"``.
        says: what the source found, as a sentence without a full stop.
        kind: what is compared.
        published: its number.
        ours: our number with its interval.
        agrees: None where our interval does not tell.
        why: what may explain a disagreement.
    """

    row: str
    says: str
    kind: Literal["ordering", "sign", "size"]
    published: str
    ours: str
    agrees: bool | None
    why: str = ""

    @property
    def verdict(self) -> str:
        """In words."""
        return WORDS[self.agrees]

    def cells(self) -> tuple[str, str, str, str, str, str]:
        """A row of the table of all of them."""
        return self.row, self.says, self.kind, self.published, self.ours, self.verdict


def same_side(
    row: str, says: str, published: float, ours: Estimate, *, digits: int = 1, why: str = ""
) -> Agreement:
    """Whether a difference is on the side of zero on which the published one is."""
    side = math.copysign(1.0, published)
    low, high = sorted((side * ours.low, side * ours.high))
    agrees = True if low > 0 else False if high < 0 else None
    told, text = f"{published:+.{digits}f}", ours.text(digits, "+")
    return Agreement(row, says, "sign", told, text, agrees, why)


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
    told, text = f"{published:+.{digits}f} ± {margin:g}", ours.text(digits, "+")
    return Agreement(row, says, "size", told, text, agrees, why)


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
    agrees = True if ours.high < margin else False if ours.low > margin else None
    told, text = f"{published:+.{digits}f}", ours.text(digits, "+")
    return Agreement(row, says, "size", f"{told} (below {margin:g})", text, agrees, why)


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

    They do where each is ahead of the next one, by an interval of their difference; they do not
    where some is behind the next one. Kendall's τ, the mean over pairs of +1 for the published
    order and -1 for the contrary, tells how near they are.

    Args:
        row: as in `Agreement`.
        order: columns of ``points``.
        points: a row a task, a column a method.
        clusters: of the tasks.
        names: of the methods, as they are shown.
        why: as in `Agreement`.
    """
    pairs = list(combinations(range(len(order)), 2))

    def tau(means: np.ndarray) -> np.ndarray:
        return np.mean([np.sign(means[:, i] - means[:, j]) for i, j in pairs], axis=0)

    own = points[list(order)]
    found = clusters.of_means(own, tau)
    steps = [
        clusters.of_means(own, lambda means, i=i: means[:, i] - means[:, i + 1])
        for i in range(len(order) - 1)
    ]
    agrees = None
    if all(step.low > 0 for step in steps):
        agrees = True
    elif any(step.high < 0 for step in steps):
        agrees = False
    says = " > ".join(names or order)
    return Agreement(row, says, "ordering", "τ 1", f"τ {found.text(2)}", agrees, why)
