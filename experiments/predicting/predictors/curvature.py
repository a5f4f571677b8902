"""The loss behind the best single step: slope and curvature along AdamW's first direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deltacontrol.experiments.predicting.base import Predictor, Score
from deltacontrol.experiments.predicting.candidate import Candidate
from deltacontrol.experiments.predicting.rates import rate_estimate


@dataclass(frozen=True)
class Curvature(Predictor):
    """``L_0 - |g|_1^2 / (2 s'Gs)``: the least value of the quadratic model along the sign step.

    Details hold lambda_max of Gauss-Newton in AdamW's metric, the curvature of the sign step, and
    the two rates that follow.
    """

    name = "curvature"
    meaning = "training loss behind the best sign step"
    reference = "LeCun, Simard & Pearlmutter, NeurIPS 1992; Balles et al., arXiv 2002.08056"

    def scores(self, candidates: Sequence[Candidate]) -> list[Score]:
        """From the linearisation."""
        return [self._score(candidate) for candidate in candidates]

    def _score(self, candidate: Candidate) -> Score:
        start, n = candidate.start, candidate.start.num_rows
        rate, (curved, drawn) = rate_estimate(start), start.sign_curvature
        if math.isnan(rate.value):
            return Score.none("no gradient reaches its controls")
        losses = start.losses(start.outputs)[:n]
        falls = start.drawn_slopes.square() / (2 * drawn)
        draws = (start.draws * losses).mean(1) - falls
        return Score(
            float(losses.mean()) - start.slope**2 / (2 * curved),
            start.cost,
            tuple(draws.tolist()),
            {
                "lambda_max": start.largest[0],
                "sign_curvature": curved,
                "slope": start.slope,
                "sign_rate": rate.sign,
                "curvature_rate": rate.curvature,
            },
        )
