"""Real training of a model's controls in random subspaces, to the end: L-BFGS over ``z``.

The loss is the mean cross-entropy of fixed rows in one batch, so that it is a function of ``z``
alone, and ``z`` is short: a quasi-Newton method needs neither a learning rate nor a schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltacontrol.experiments.measures.initial_model import InitialModel
from deltacontrol.experiments.tasks.encoding import Batch, without_labels
from deltacontrol.theory.dimension.projections import RANDOM_PROJECTIONS, Projection
from deltacontrol.theory.errors import unknown
from deltacontrol.theory.solvers.lbfgs import differentiated, minimise_lbfgs

Parameters = dict[str, Tensor]


def train_in_subspaces(
    initial: InitialModel,
    dimensions: Sequence[int],
    *,
    projection: str = "fastfood",
    seeds: Sequence[int] = (0,),
    steps: int = 50,
    enough: float = 0.0,
) -> list[dict[str, Any]]:
    """Final losses on the rows of ``initial``: dimension, seed, loss, evaluations.

    Args:
        initial: the model; its controls, all of them together, are ``theta_0``.
        dimensions: of ``z``.
        projection: the kind of ``P``.
        seeds: of ``P``, one training each.
        steps: evaluations of loss and gradient at most.
        enough: a loss at which a training ends.

    Raises:
        InputError: no such kind of projection, or a dimension above the number of parameters.
    """
    if projection not in RANDOM_PROJECTIONS:
        raise unknown("projection", projection, RANDOM_PROJECTIONS)
    kind = RANDOM_PROJECTIONS[projection]
    start = {n: p.detach() for n, p in initial.controlled.trainable().items()}
    (batch,) = initial.batches(initial.rows)
    size = sum(p.numel() for p in start.values())
    dtype = next(iter(start.values())).dtype
    rows = []
    for dimension in dimensions:
        for seed in seeds:
            drawn = kind(size, dimension, seed, dtype)
            loss = _Loss(initial.controlled, start, batch, drawn)
            rows.append({"dimension": dimension, "seed": seed})
            rows[-1] |= _minimise(loss, dimension, steps, enough)
    return rows


class _Loss:
    """Cross-entropy of one batch as a function of ``z``."""

    def __init__(self, controlled: Any, start: Parameters, batch: Batch, projection: Projection):
        self.controlled, self.start, self.projection = controlled, start, projection
        self.dtype = next(iter(start.values())).dtype
        self.inputs, self.labels = without_labels(batch), batch["labels"]

    def __call__(self, z: Tensor) -> Tensor:
        """The mean over the batch."""
        change = self.projection @ z
        parts = change.split([p.numel() for p in self.start.values()])
        moved = {
            f"controls.{name}": p + part.view_as(p)
            for (name, p), part in zip(self.start.items(), parts, strict=True)
        }
        logits = torch.func.functional_call(self.controlled, moved, (), self.inputs).logits
        return torch.nn.functional.cross_entropy(logits, self.labels)


def _minimise(loss: _Loss, dimension: int, steps: int, enough: float) -> dict[str, Any]:
    """The least loss of L-BFGS from ``z = 0``; where its line search fails it begins anew there."""
    # In float64, so that a new beginning is not rounded to the model's precision.
    best, at, count = math.inf, torch.zeros(dimension, dtype=torch.float64), 0
    of = differentiated(loss)

    class Done(Exception):
        pass

    def value_and_gradient(x: Tensor) -> tuple[float, Tensor]:
        nonlocal best, at, count
        value, gradient = of(x.to(loss.dtype))
        count += 1
        if value < best:
            best, at = value, x
        if best <= enough or count >= steps:
            raise Done
        return value, gradient

    try:
        while True:
            found = minimise_lbfgs(
                value_and_gradient,
                at,
                memory=30,
                max_iterations=steps,
                max_evaluations=10 * steps,
            )
            if found.evaluations < 3:
                break
    except Done:
        pass
    return {"loss": best, "evaluations": count}
