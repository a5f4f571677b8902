"""The least energy of the controls that moves every row towards its class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltacontrol.experiments.predicting.base import Predictor, Score
from deltacontrol.experiments.predicting.candidate import Candidate

ROUNDING = 1e-6  # of the largest eigenvalue, which the kernel has from single precision


@dataclass(frozen=True)
class ControlEnergy(Predictor):
    """``log(1/2 y'K^+ y)``: the energy ``1/2 |u|^2`` of the least control with ``J u = y``.

    ``y`` moves the logit of each training row's class by one, as far as contrasts tell. Only
    eigenvalues above rounding are inverted. Details hold the energy and the share of ``|y|^2`` that
    no control reaches.
    """

    name = "control-energy"
    meaning = "log of the energy that moves every row towards its class"
    reference = "Kalman, Ho & Narendra, Contributions to Differential Equations 1, 1963; claim 19"

    def scores(self, candidates: Sequence[Candidate]) -> list[Score]:
        """From the linearisation."""
        return [self._score(candidate) for candidate in candidates]

    def _score(self, candidate: Candidate) -> Score:
        start = candidate.start
        y = start.contrasts[start.labels[: start.num_rows]].flatten()
        values, vectors = torch.linalg.eigh(start.kernel)
        kept = values > ROUNDING * values[-1].clamp_min(0)
        parts = (vectors[:, kept].mT @ y).square()
        energy = 0.5 * float((parts / values[kept]).sum())
        if not energy > 0:
            return Score.none("no control reaches the outputs")
        missed = 1 - float(parts.sum() / y.square().sum())
        return Score(
            math.log(energy), start.cost, details={"energy": energy, "unreachable": missed}
        )
