"""The condition number of the tangent kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deltacontrol.experiments.measures.tuning.layer_choices import condition_number
from deltacontrol.experiments.predicting.base import Predictor, Score
from deltacontrol.experiments.predicting.candidate import Candidate


@dataclass(frozen=True)
class KernelCondition(Predictor):
    """``log(lambda_max(K) / lambda_min(K))`` over the training rows.

    It is small where all rows are learnt at like rates. An eigenvalue below rounding counts as
    rounding's (claim 32 has the same number, of layers).
    """

    name = "kernel-condition"
    meaning = "log condition number of the tangent kernel"
    reference = "arXiv 2602.08239, as cited in the project's list; claim 32"

    def scores(self, candidates: Sequence[Candidate]) -> list[Score]:
        """From the linearisation."""
        return [Score(math.log(condition_number(c.start.kernel)), c.start.cost) for c in candidates]
