"""The baseline that looks at nothing but the number of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deltacontrol.experiments.predicting.base import Predictor, Score
from deltacontrol.experiments.predicting.candidate import Candidate


@dataclass(frozen=True)
class ParameterCount(Predictor):
    """``-log(number of parameters)``, the head's left out: more are taken to be better."""

    name = "parameters"
    meaning = "minus the logarithm of the number of parameters"
    reference = "a baseline of this project"

    def scores(self, candidates: Sequence[Candidate]) -> list[Score]:
        """From the sizes alone; head tuning by itself has none."""
        return [Score(-math.log(max(c.num_parameters, 1)), 0.0) for c in candidates]
