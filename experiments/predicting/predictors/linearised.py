"""The validation loss of the linearised model, trained for as many steps as the real one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.experiments.predicting.base import Predictor, Score
from deltacontrol.experiments.predicting.candidate import Candidate
from deltacontrol.experiments.predicting.linear_start import LinearStart
from deltacontrol.experiments.predicting.rates import rate_estimate
from deltacontrol.theory.linear.linear_descent import linear_descent

OCTAVES = (-8.0, 4.0)  # of the rates that are tried, around the estimate
A_STEP = 0.5


@dataclass(frozen=True)
class Linearised(Predictor):
    """The loss on validation rows after a descent of the outputs by the kernel of AdamW.

        f <- f - eta_t (A grad l(f_n) + lambda (f - f_0)),

    with the schedule and the steps of the training, at the rate of the least such loss. The metric
    stays that of the start, the model stays linear, and all steps see the same ``n`` rows: what is
    left out is what the features learn. As the rows are far fewer than a training has, losses are
    too high; their order is what is predicted.

    Details hold that rate, the training loss there, and the loss before; the draws are of training
    and validation rows.
    """

    name = "linearised"
    meaning = "validation loss of the linearised training"
    reference = "Lee et al., NeurIPS 2019; Malladi et al., ICML 2023"
    is_loss = True

    def scores(self, candidates: Sequence[Candidate]) -> list[Score]:
        """From the linearisation."""
        return [self._score(candidate) for candidate in candidates]

    def _score(self, candidate: Candidate) -> Score:
        start, situation = candidate.start, candidate.situation
        estimate = rate_estimate(start).value
        if math.isnan(estimate):
            return Score.none("no gradient reaches its controls")
        octaves = torch.arange(OCTAVES[0], OCTAVES[1] + A_STEP / 2, A_STEP, dtype=torch.float64)
        rates = estimate * 2.0**octaves
        schedule = torch.tensor(situation.schedule, dtype=torch.float64)
        decay, n = situation.training.weight_decay, start.num_rows
        losses = self._losses(start, schedule, rates, decay)
        heldout = losses[:, n:].mean(1)
        best = int(torch.where(heldout.isfinite(), heldout, math.inf).argmin())
        drawn, (draws, heldout_draws) = rates[best].expand(len(start.draws)), situation.draws
        again = self._losses(start, schedule, drawn, decay, draws)[:, n:]
        before = start.losses(start.outputs)
        return Score(
            float(heldout[best]),
            start.cost,
            tuple((heldout_draws * again).mean(1).tolist()),
            {
                "rate": float(rates[best]),
                "training_loss": float(losses[best, :n].mean()),
                "loss_before": float(before[n:].mean()),
            },
        )

    @staticmethod
    def _losses(
        start: LinearStart,
        schedule: Tensor,
        rates: Tensor,
        decay: float,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Of each row, (copies, n + m), after a descent at each rate."""
        found = linear_descent(
            start.outputs.flatten(),
            start.adam,
            lambda f: start.slopes(f, weights),
            schedule[:, None] * rates,
            decay=decay,
        )
        return start.losses(found.view(len(rates), *start.outputs.shape))
