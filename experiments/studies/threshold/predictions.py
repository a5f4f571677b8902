"""What fine-tuning will need, predicted from the model's initial point: no training.

The loss over some training rows is replaced by its Gauss-Newton model at ``theta_0``, whose
Hessian ``G`` is also the Fisher matrix. Of it, exactly, the tangent kernel of the rows gives

    d*          dimension at which half of the random subspaces ``theta_0 + P z`` reach a target
                loss on these rows, or a target accuracy on other rows,
    ranks       of the step that full fine-tuning would take, matrix by matrix.

`deltacontrol.theory.dimension.gaussian_width` has the dimension for a loss,
`deltacontrol.theory.dimension.subspace_outputs` the outputs from which an accuracy follows. ``G``
has at most ``rows (classes - 1)`` directions: a dimension near that number is one of these rows,
not of the task.

Sources: Larsen et al., ICLR 2022, section 3; Li et al., ICLR 2018, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from deltacontrol.experiments.measures.initial_model import LEAST_ROWS, InitialModel
from deltacontrol.experiments.setting import Setting
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.model_curvature import softmax_factor
from deltacontrol.theory.rank.low_rank import (
    participation_ratio,
    singular_values,
    stable_rank,
    tail_energy,
)

if TYPE_CHECKING:
    from deltacontrol.deltas import Delta

Metric = Literal["loss", "accuracy"]

GROUPS = LEAST_ROWS  # of the jackknife over rows
OUTPUTS = 256  # rows times contrasts at most, of training and of held-out rows
POINTS = 24  # of the curve over the dimension


@dataclass(frozen=True, eq=False)
class DimensionPrediction:
    """When random subspaces reach a target.

    Attributes:
        metric: "loss" on the rows of the loss, or "accuracy" on others.
        target: its value.
        dimension: ``d*``; 0 where the start reaches it, NaN where these rows reach it nowhere.
        standard_error: of ``d*`` over the draw of the rows, by a jackknife of groups.
        low: dimension at which 5 % of the subspaces reach it; NaN where ``d*`` is.
        high: dimension at which 95 % of the subspaces reach it; NaN where ``d*`` is.
        rank: of ``G``, the largest dimension that these rows can tell.
        num_parameters: ``D``.
        reason: what ``d*`` rests on, or why there is none.
        curve: columns dimension, loss, accuracy (means over subspaces), accuracy_deviation, and
            probability to reach the target.
    """

    metric: Metric
    target: float
    dimension: float
    standard_error: float
    low: float
    high: float
    rank: int
    num_parameters: int
    reason: str
    curve: pd.DataFrame

    @property
    def text(self) -> str:
        """``d*`` ± its standard error, and the dimensions of 5 % and 95 %, or why there is none."""
        if math.isnan(self.dimension):
            return f"no d*: {self.reason}"
        if not self.dimension:
            return f"d* = 0: {self.reason}"
        text = f"d* = {self.dimension:.3g} ± {self.standard_error:.1g}"
        if math.isnan(self.low + self.high):
            return text
        return f"{text} (5 % to 95 % of subspaces: {self.low:.3g} to {self.high:.3g})"


def predict_dimension(
    model: str,
    task: str,
    deltas: Sequence[Delta | str] = (),
    *,
    target: float,
    metric: Metric = "accuracy",
    rows: int = 256,
    heldout: int = 256,
    max_length: int = 64,
    pretrained: bool = True,
    seed: int = 0,
    text_column: str = "text",
    label_column: str = "label",
    task_kind: Literal["classification", "regression"] | None = None,
) -> DimensionPrediction:
    """The dimension that a model will need for a task.

    Args:
        model: as in `deltacontrol.experiments.models.load`.
        task: a classification task, as in `deltacontrol.experiments.tasks.load`.
        deltas: whose parameters the subspace is of; all parameters of the model if empty. The head
            is trained beside it where none of them trains it.
        target: the value to reach.
        metric: "accuracy" on validation rows, or "loss", the cross-entropy of the training rows.
        rows: at most so many training rows, the first; fewer of a task with many classes, `OUTPUTS`
            / (classes - 1) of them, as the exact kernel takes a gradient for each row and contrast.
        heldout: at most so many validation rows, the first; fewer of a task with many classes.
        max_length: tokens of a text at most.
        pretrained: False draws the backbone from the seed.
        seed: of the weights that are drawn.
        text_column: of a task file.
        label_column: of a task file.
        task_kind: what the labels of a task file are; inferred by default.

    Raises:
        InputError: as in `InitialModel`; a target that is no accuracy, or no positive loss.

    Example:
        With a model of two layers in the folder ``tiny_model`` and three classes in the CSV file
        ``tiny_task``; as well ``predict_dimension("minilm-l3", "movie", target=0.55)``.

        >>> prediction = predict_dimension(
        ...     tiny_model, tiny_task, target=0.4, rows=24, heldout=12, max_length=12)
        >>> 0 < prediction.dimension < prediction.rank
        True
        >>> prediction.text.startswith("d* = ")
        True
    """
    setting = Setting(
        model,
        task,
        deltas=deltas,
        max_length=max_length,
        pretrained=pretrained,
        seed=seed,
        text_column=text_column,
        label_column=label_column,
        task_kind=task_kind,
    )
    data = setting.data
    most = max(LEAST_ROWS, OUTPUTS // (max(2, len(data.labels)) - 1))
    few = replace(
        setting,
        task=data,
        train_rows=min(rows, most, len(data.train)),
        validation_rows=min(heldout, most, len(data.validation)),
    )
    return dimension_of(InitialModel(few), target, metric)


def dimension_of(initial: InitialModel, target: float, metric: Metric) -> DimensionPrediction:
    """`predict_dimension` for a kernel that is there already, and several targets."""
    if metric not in ("loss", "accuracy"):
        raise InputError(f"metric is {metric!r}; expected loss or accuracy")
    if not 0 < target < (1 if metric == "accuracy" else math.inf):
        expected = "an accuracy between 0 and 1" if metric == "accuracy" else "a positive loss"
        raise InputError(f"target is {target}; expected {expected}")
    if metric == "accuracy" and not initial.heldout:
        raise InputError("an accuracy is one of held-out rows, and heldout is 0; give some")
    every, others = torch.arange(initial.rows), torch.arange(initial.heldout)
    whole = _Subspaces(initial, every, others, target, metric)
    dimension = whole.quantile(0.5)
    error = math.nan
    if dimension > 0:
        parts = [
            _Subspaces(
                initial, every[every % GROUPS != g], others[others % GROUPS != g], target, metric
            ).quantile(0.5)
            for g in range(GROUPS)
        ]
        # A group without which the target is out of reach leaves the error unknown, NaN.
        deviations = np.array(parts) - np.mean(parts)
        error = math.sqrt((GROUPS - 1) * float(np.mean(deviations**2)))
    return DimensionPrediction(
        metric=metric,
        target=target,
        dimension=dimension,
        standard_error=error,
        low=whole.quantile(0.05),
        high=whole.quantile(0.95),
        rank=whole.rank,
        num_parameters=initial.num_parameters,
        reason=whole.reason,
        curve=whole.curve(),
    )


def predict_ranks(initial: InitialModel, share: float = 0.9) -> pd.DataFrame:
    """Ranks of what full fine-tuning will do to every matrix of the model, one row each.

    Two matrices stand for it: the loss's gradient, and the step ``J'w`` that takes a share of the
    largest fall of the Gauss-Newton model, which is full fine-tuning's change as far as the model
    stays linear. Columns name, shape, and for both (gradient_, step_) stable_rank, participation
    and rank90, the least rank that keeps 90 % of the energy; then kernel_participation, the
    number of directions of the examples that the matrix's own tangent kernel resolves. Matrices
    with fewer than 8 rows or columns, or without a gradient, are left out.

    Args:
        initial: over all parameters.
        share: of the largest fall, in (0, 1).

    Raises:
        InputError: deltas are attached, or the share is none.
    """
    if initial.free or len(initial.controlled.deltas) != 1 or not _is_full(initial):
        raise InputError("ranks are those of full fine-tuning; make the model without deltas")
    if not 0 < share < 1:
        raise InputError(f"share is {share}; expected a number between 0 and 1")
    every = torch.arange(initial.rows)
    problem = initial.linearised(every, torch.arange(0))
    kappa = problem.loss.threshold(share * problem.loss.largest_fall).kappa
    factor, s = softmax_factor(initial.logits(every), initial.labels)
    duals = {"gradient": s, "step": problem.dual(kappa).view_as(s)}
    changes = {
        kind: initial.pulled(torch.einsum("nab,nb->na", factor, dual))
        for kind, dual in duals.items()
    }
    size = initial.rows * initial.contrasts.shape[1]
    rows = []
    for name, parameter in initial.controlled.trainable().items():
        if parameter.ndim != 2 or min(parameter.shape) < 8 or not changes["gradient"][name].any():
            continue
        row: dict[str, Any] = {"name": name, "shape": tuple(parameter.shape)}
        for kind, change in changes.items():
            values = singular_values(change[name])
            tails = tail_energy(values)
            row |= {
                f"{kind}_stable_rank": stable_rank(values),
                f"{kind}_participation": participation_ratio(values),
                f"{kind}_rank90": int((tails > 0.1 * tails[0]).sum()),
            }
        part = torch.linalg.eigvalsh(initial.kernel.parts[name][:size, :size])
        row["kernel_participation"] = participation_ratio(part.clamp_min(0).sqrt())
        rows.append(row)
    return pd.DataFrame(rows)


def _is_full(initial: InitialModel) -> bool:
    from deltacontrol.deltas import FullFineTuning

    return isinstance(initial.controlled.deltas[0], FullFineTuning)


class _Subspaces:
    """Random subspaces of one problem, held against one target."""

    def __init__(
        self, initial: InitialModel, rows: Tensor, heldout: Tensor, target: float, metric: Metric
    ) -> None:
        self.initial, self.heldout = initial, heldout
        self.target, self.metric = target, metric
        self.problem = initial.linearised(rows, heldout)
        kernel, residual = self.problem.kernel, self.problem.residual
        # What a free head takes from the loss by itself is gone before a subspace acts.
        taken = softmax_factor(initial.logits(rows), initial.labels[rows])[1].square().sum()
        self.start = initial.loss(rows) - 0.5 * float(taken - residual.square().sum())
        values = torch.linalg.eigvalsh(kernel)
        scale = float(initial.scale) / len(rows)
        self.rank = int((values > 1e-7 * scale).sum())

    @property
    def reason(self) -> str:
        """In words, what the quantiles say."""
        beside = " with the head" if self.initial.free else ""
        if self.metric == "loss":
            if self.start <= self.target:
                return f"the loss is {self.start:.3g} at the start{beside} already"
            least = self.start - (self.problem.loss.largest_fall if self.rank else 0.0)
            if least >= self.target:
                return (
                    f"the Gauss-Newton model of these rows falls to {least:.3g} and no lower; "
                    "choose a target above"
                )
            return f"loss {self.start:.3g} at the start{beside}, {least:.3g} at the least"
        found = [share for _, share in self._scan]
        if not found or found[0] >= 0.5:
            return f"the start{beside} reaches the target"
        if max(found) < 0.5:
            return (
                f"no dimension up to the rank {self.rank} of these rows reaches it; give more rows "
                "or a lower target"
            )
        return f"a Gauss-Newton model of rank {self.rank}"

    def quantile(self, share: float) -> float:
        """The least dimension at which that share of them reaches the target.

        0 where the start reaches it, NaN where no dimension below the rank does.
        """
        if self.metric == "loss":
            fall = self.start - self.target
            if fall <= 0:
                return 0.0
            if not self.rank or fall >= self.problem.loss.largest_fall:
                return math.nan
            return max(0.0, self.problem.loss.threshold(fall).quantile(share))
        low = 0.0
        for d, found in self._scan:
            if found >= share:
                break
            low = d
        else:
            return math.nan
        while d - low > 0.01 * d:
            middle = 0.5 * (low + d)
            low, d = (low, middle) if self.probability(middle) >= share else (middle, d)
        return d

    def probability(self, d: float) -> float:
        """The share of subspaces of dimension ``d`` that reach the target."""
        if self.metric == "loss":
            fall = self.start - self.target
            if fall <= 0 or not self.rank:
                return float(fall <= 0)
            if fall >= self.problem.loss.largest_fall:
                return 0.0
            return self.problem.loss.threshold(fall).probability(d)
        return float((self._accuracies(d) >= self.target).double().mean())

    def curve(self) -> pd.DataFrame:
        """See `DimensionPrediction`."""
        rows = []
        for d in self._dimensions:
            found = self._accuracies(d) if len(self.heldout) else torch.tensor([math.nan] * 2)
            rows.append(
                {
                    "dimension": d,
                    "loss": self.start - (self.problem.loss.expected_fall(d) if d else 0.0),
                    "accuracy": float(found.mean()),
                    "accuracy_deviation": float(found.std()),
                    "probability": self.probability(d),
                }
            )
        return pd.DataFrame(rows)

    @cached_property
    def _scan(self) -> list[tuple[float, float]]:
        return [(d, self.probability(d)) for d in self._dimensions]

    @property
    def _dimensions(self) -> list[float]:
        """0, and from 1 to the rank at equal factors."""
        if self.rank < 2:
            return [0.0]
        return [0.0, *np.geomspace(1.0, 0.97 * self.rank, POINTS).tolist()]

    def _accuracies(self, d: float) -> Tensor:
        kappa = self.problem.loss.kappa(d) if d else math.inf
        return self.initial.accuracies(self.problem, kappa, self.heldout)
