"""How far AdamW's first direction can be followed, by a few forward passes of the real model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from deltacontrol.deltas import DeltaModel
from deltacontrol.experiments.predicting.base import Predictor, Score
from deltacontrol.experiments.predicting.candidate import Candidate
from deltacontrol.experiments.predicting.situation import Situation
from deltacontrol.experiments.tasks.encoding import without_labels
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class CriticalSharpness(Predictor):
    """The least training loss that was met in the search for the critical rate.

    Along the sign step ``s`` of the gradient of the training rows the critical rate is the largest
    at which the loss is not above that at the start; it is found by doubling or halving the
    method's default rate, and then between the last two by their geometric mean. Of a quadratic it
    is twice the best rate. Nothing is linearised: curvature is what the model shows.

    Details hold that rate and the critical sharpness, two over it.

    Attributes:
        passes: over the training rows at most, the first one, with the gradient, left out.
    """

    passes: int = 9

    name = "critical-sharpness"
    meaning = "least training loss along the sign step"
    reference = "Kalra et al., arXiv 2601.16979 (critical sharpness)"

    def __post_init__(self) -> None:
        """Check the number of passes."""
        if self.passes < 2:
            raise InputError(f"passes is {self.passes}; expected 2 or more")

    def scores(self, candidates: Sequence[Candidate]) -> list[Score]:
        """From forward passes of each method."""
        return [self._score(candidate) for candidate in candidates]

    def _score(self, candidate: Candidate) -> Score:
        situation, first = candidate.situation, candidate.training().learning_rate
        assert first is not None  # AdamW's always has one
        with candidate.attached() as controlled:
            before, follow = _line(controlled, situation)
            rate, losses = critical_rate(follow, before, first, self.passes)
        details = {"critical_rate": rate, "critical_sharpness": 2 / rate if rate > 0 else math.nan}
        cost = situation.num_rows * (3.0 + len(losses))
        least = min([before, *(loss for loss in losses if math.isfinite(loss))])
        return Score(least, cost, details=details)


def critical_rate(
    loss: Callable[[float], float], before: float, first: float, passes: int
) -> tuple[float, list[float]]:
    """The largest rate found at which a loss is not above ``before``, and all losses met.

    The rate is 0 where no rate that was tried is such.

    Args:
        loss: at a rate.
        before: the loss at the rate 0.
        first: the rate that is tried first.
        passes: how many losses are computed at most.

    Example:
        Of a parabola with its least value at 1, which is back at its start at 2:

        >>> rate, losses = critical_rate(lambda x: x * (x - 2), 0.0, 0.3, 9)
        >>> 1.9 < rate <= 2.0, len(losses)
        (True, 9)
    """
    found: list[float] = []
    good, bad, rate = 0.0, math.inf, first
    while len(found) < passes:
        value = loss(rate)
        found.append(value)
        if math.isfinite(value) and value <= before:
            good = max(good, rate)
        else:
            bad = min(bad, rate)
        if math.isinf(bad):
            rate = 2 * good
        elif good == 0:
            rate = bad / 2
        else:
            rate = math.sqrt(good * bad)
    return good, found


def _line(controlled: DeltaModel, situation: Situation) -> tuple[float, Callable[[float], float]]:
    """The loss of the training rows at the start, and along the sign step from there."""
    tensors, factors = controlled.trainable(), controlled.rate_factors
    start = {name: p.detach().clone() for name, p in tensors.items()}
    sums = {name: torch.zeros_like(p) for name, p in start.items()}
    n = situation.num_rows

    def losses(gradient: bool) -> float:
        total = 0.0
        for _, batch in situation.batches("train"):
            with torch.set_grad_enabled(gradient):
                logits = controlled(**without_labels(batch)).logits
                loss = cross_entropy(logits, batch["labels"], reduction="sum") / n
            if gradient:
                found = torch.autograd.grad(
                    loss, list(tensors.values()), allow_unused=True, materialize_grads=True
                )
                for name, one in zip(tensors, found, strict=True):
                    sums[name] += one
            total += float(loss.detach())
        return total

    before = losses(True)

    def follow(rate: float) -> float:
        with torch.no_grad():
            for name, p in tensors.items():
                p.copy_(start[name] - rate * factors.get(name, 1.0) * sums[name].sign())
        return losses(False)

    return before, follow
