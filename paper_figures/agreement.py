"""Our numbers beside those of the primary source, and whether they agree.

A figure whose study the source has too defines ``agreement(table)``, a list of `Agreement`. A range
decides, be it an interval or what all settings gave: the two agree where all of it says what the
source says, disagree where all of it says the contrary, and it cannot be told otherwise.

Source: Ding et al., *Parameter-efficient fine-tuning of large-scale pre-trained language models*,
Nature Machine Intelligence 5, 220-235, 2023.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Agreement", "Estimate", "on_side"]

WORDS = {True: "agrees", False: "disagrees", None: "cannot be told"}


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
