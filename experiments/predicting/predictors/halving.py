"""The baseline that shares a cost out among trainings and gives up half of them each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltacontrol.experiments.predicting.base import Predictor, Score
from deltacontrol.experiments.predicting.candidate import Candidate
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class Halving(Predictor):
    """The place of a method by successive halving.

    Each of ``ceil(log2 n)`` rounds trains the methods that are left, for equal shares of the cost,
    and the better half of them by validation loss goes on. Every round trains anew, with a schedule
    of its own. A method that is given up stands behind those that went on.

    Attributes:
        cost: of all trainings, in forward passes of one row for each method; by default that of a
            training of 30 steps of 16 rows.
    """

    cost: float = 30 * 16 * 3.0

    name = "halving"
    meaning = "place by successive halving"
    reference = "Jamieson & Talwalkar, AISTATS 2016, algorithm 1"

    def __post_init__(self) -> None:
        """Check the cost."""
        if not self.cost > 0:
            raise InputError(f"cost is {self.cost}; expected a positive number of forward passes")

    def scores(self, candidates: Sequence[Candidate]) -> list[Score]:
        """From trainings of those that are left, longer from round to round."""
        count = len(candidates)
        rounds = max(1, (count - 1).bit_length())
        left, order = list(range(count)), []
        spent = [0.0] * count
        for _ in range(rounds):
            share = self.cost * count / rounds / len(left)
            step = 3.0 * candidates[0].situation.training.batch_size if count else 1.0
            trials = {i: candidates[i].tried(max(1, int(share / step))) for i in left}
            for i, trial in trials.items():
                spent[i] += trial.cost
            left.sort(key=lambda i: trials[i].loss)
            kept = (len(left) + 1) // 2
            order = [*left[kept:], *order]
            left = left[:kept]
        places = {i: place for place, i in enumerate([*left, *order], start=1)}
        return [Score(float(places[i]), spent[i]) for i in range(count)]
