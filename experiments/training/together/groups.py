"""How many copies share a pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

TRIALS = 1  # of each size of a group; sizes that are hardly apart may be confused


class Groups:
    """Which size of a group is the quickest, told from the first updates themselves.

    Every candidate is tried in turn, `TRIALS` times behind a first one that counts for nothing; all
    of these are updates of the training, so that nothing is computed in vain.

    Args:
        candidates: sizes.
    """

    def __init__(self, candidates: Sequence[int]) -> None:
        self.seconds: dict[int, list[float]] = {size: [] for size in candidates}

    @property
    def decided(self) -> bool:
        """Whether every candidate was tried often enough."""
        return len(self.seconds) == 1 or min(map(len, self.seconds.values())) > TRIALS

    def next(self) -> int:
        """The size of the next update."""
        if self.decided:
            return self.best
        return min(self.seconds, key=lambda size: len(self.seconds[size]))

    @property
    def best(self) -> int:
        """The quickest so far; the smallest where nothing was measured."""
        return min(self.seconds, key=lambda size: min(self.seconds[size][1:], default=math.inf))

    def note(self, size: int, seconds: float) -> None:
        """An update of groups of that size took so many seconds a token."""
        if not self.decided and size in self.seconds:
            self.seconds[size].append(seconds)
