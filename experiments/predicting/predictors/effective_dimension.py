"""How many directions of the rows a training of that length learns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deltacontrol.experiments.predicting.base import Predictor, Score
from deltacontrol.experiments.predicting.candidate import Candidate
from deltacontrol.experiments.predicting.rates import rate_estimate
from deltacontrol.theory.linear.linear_descent import effective_dimension


@dataclass(frozen=True)
class EffectiveDimension(Predictor):
    """``-tr M (M + lambda I)^-1``, with Gauss-Newton ``M`` in AdamW's metric.

    ``1/lambda`` is the time of the training, the sum of its rates at the estimated peak. More
    directions are taken to be better; how many of them are of the task it does not know. Details
    hold the dimension and lambda.
    """

    name = "effective-dimension"
    meaning = "minus the number of directions that the training learns"
    reference = "Caponnetto & De Vito, Foundations of Computational Mathematics 7, 2007, section 3"

    def scores(self, candidates: Sequence[Candidate]) -> list[Score]:
        """From the linearisation."""
        return [self._score(candidate) for candidate in candidates]

    def _score(self, candidate: Candidate) -> Score:
        start, rate = candidate.start, rate_estimate(candidate.start).value
        if math.isnan(rate):
            return Score.none("no gradient reaches its controls")
        ridge = 1 / (rate * sum(candidate.situation.schedule))
        dimension = effective_dimension(start.adam_curvature, ridge)
        return Score(-dimension, start.cost, details={"dimension": dimension, "ridge": ridge})
