"""What a predictor is: scores of methods in a situation, before the training that they foretell."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from deltacontrol.experiments.predicting.candidate import Candidate


@dataclass(frozen=True)
class Score:
    """What a predictor says of one method.

    Attributes:
        value: the lower the better the method is predicted to do; NaN where the predictor says
            nothing of it.
        cost: in forward passes of one row, a backward pass counted as two. The fit of the head,
            which all methods share, is not counted, and what several predictors take from one
            linearisation is counted for each of them.
        draws: the value on rows that were drawn again, the same draws for every method; empty
            where the predictor does not say.
        details: further numbers.
        note: why there is no value, or what it rests on.
    """

    value: float
    cost: float
    draws: tuple[float, ...] = ()
    details: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @classmethod
    def none(cls, note: str) -> Score:
        """A method of which the predictor says nothing, and why."""
        return cls(math.nan, 0.0, note=note)


class Predictor(ABC):
    """A frozen dataclass that scores methods; its fields are its options.

    Class attributes:
        name: by which it is found.
        meaning: what the score is, in a few words.
        reference: where it is from.
        is_loss: whether the score is a validation loss itself, not only in its order.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    reference: ClassVar[str]
    is_loss: ClassVar[bool] = False

    @abstractmethod
    def scores(self, candidates: Sequence[Candidate]) -> list[Score]:
        """One score for each method, in their order.

        Raises:
            InputError: what the predictor needs is not there.
        """
