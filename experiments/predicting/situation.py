"""What is asked of every method: one model, rows of one task, and a training of some steps.

The head is fitted first, to other training rows than those that a method is linearised on: a head
that was just drawn lets no gradient of a class through to the layers below, and one that has seen
the rows leaves nothing to learn on them. Its optimum is that of
`deltacontrol.experiments.heads.fit_head`. A head that is no linear map, or that the checkpoint was
trained with, stays what it is.

    first training rows     linearised, ``n``
    those behind them       the head is fitted to them, up to `HEAD_ROWS`
    first validation rows   predicted on, ``m``
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deltacontrol.experiments.heads import linear_head
from deltacontrol.experiments.predicting.fitted_head import fit_head_by_descent
from deltacontrol.experiments.predicting.weight_gradients import SiteGradient, weight_gradients
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.tasks.encoding import Batch
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.experiments.training.settings import ADAMW, learning_rate
from deltacontrol.theory.convex.features import contrasts
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltacontrol.experiments.tasks import Task

HEAD_ROWS = 512
LEAST_ROWS = 10
OUTPUTS = 1024  # rows times contrasts at most, of training and of validation rows
DRAWS = 32  # of the rows, with replacement
PASS = 64  # rows of a pass


@dataclass(frozen=True, eq=False)
class Situation:
    """A model on rows of a task before any delta, and the training whose end is predicted.

    Attributes:
        training: model, task, steps, schedule and seed; its deltas and its rate are not looked at.
        most_rows: training rows that methods are linearised on, and as many validation rows, at
            most; fewer of a task with many classes, `OUTPUTS` / (classes - 1).

    Raises:
        InputError: the training is not one by AdamW on as many rows as there are, or too few rows
            are asked for.
    """

    training: FineTuning
    most_rows: int = 256

    def __post_init__(self) -> None:
        """Check what needs no model."""
        if self.training.optimiser != ADAMW:
            raise InputError(
                f"the optimiser is {self.training.optimiser}; predictions are of {ADAMW}"
            )
        if self.training.shots is not None or self.training.train_limit is not None:
            raise InputError("predictions choose the rows themselves; leave out shots and limits")
        if self.training.template is not None:
            raise InputError("predictions are of a classification head; leave out the template")
        if self.most_rows < LEAST_ROWS:
            raise InputError(f"rows is {self.most_rows}; expected {LEAST_ROWS} or more")

    # -- rows ------------------------------------------------------------------------------------

    @cached_property
    def setting(self) -> Setting:
        """The model, and all rows that are looked at.

        Raises:
            InputError: the task is no classification, or has too few rows or classes.
        """
        wide = self.training.setting(expects="classification", test_rows=0)
        data = wide.data
        if len(data.labels) < 2:
            raise InputError(f"{data.name} has one class, {data.labels}; a prediction needs two")
        for split, rows, least in (
            ("training", data.train, 2 * LEAST_ROWS),
            ("validation", data.validation, LEAST_ROWS),
        ):
            if len(rows) < least:
                raise InputError(
                    f"{data.name} has {len(rows)} {split} rows; a prediction needs {least}, to "
                    "linearise on some, fit the head to others, and look at others again"
                )
        return replace(
            wide,
            task=data,
            train_rows=min(self._first(data) + HEAD_ROWS, len(data.train)),
            validation_rows=min(self._most(data), len(data.validation)),
        )

    def _most(self, data: Task) -> int:
        return min(self.most_rows, max(LEAST_ROWS, OUTPUTS // (len(data.labels) - 1)))

    def _first(self, data: Task) -> int:
        return min(self._most(data), len(data.train) // 2)

    @property
    def num_rows(self) -> int:
        """``n``."""
        return self._first(self.setting.data)

    @property
    def num_heldout(self) -> int:
        """``m``."""
        return len(self.setting.split("validation"))

    def batches(self, split: str, size: int = PASS) -> Iterator[tuple[np.ndarray, Batch]]:
        """Rows of like lengths together, each batch with the numbers of its rows, (batch,).

        Args:
            split: "train" (linearised on), "head" or "validation".
            size: rows of a batch.
        """
        encoded = self.setting.split("train" if split == "head" else split)
        first, last = {
            "train": (0, self.num_rows),
            "head": (self.num_rows, len(encoded)),
            "validation": (0, len(encoded)),
        }[split]
        order = first + np.argsort(encoded.lengths[first:last], kind="stable")
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            yield numbers - first, encoded.batch(numbers)

    @cached_property
    def labels(self) -> Tensor:
        """Of the rows that are linearised on and those that are predicted on, (n + m,)."""
        parts = [self.setting.split(s).labels for s in ("train", "validation")]
        assert parts[0] is not None and parts[1] is not None
        return torch.from_numpy(np.concatenate([parts[0][: self.num_rows], parts[1]]))

    @cached_property
    def contrasts(self) -> Tensor:
        """Orthonormal contrasts of the logits, (classes, classes - 1), float64."""
        return torch.from_numpy(contrasts(self.setting.classes or 0))

    @cached_property
    def draws(self) -> tuple[Tensor, Tensor]:
        """How often each row is drawn, (DRAWS, n) and (DRAWS, m): the same for every method."""
        random = np.random.default_rng([self.training.seed, self.num_rows, self.num_heldout])
        return tuple(  # type: ignore[return-value]
            torch.from_numpy(random.multinomial(n, np.full(n, 1 / n), DRAWS).astype(np.float64))
            for n in (self.num_rows, self.num_heldout)
        )

    # -- training --------------------------------------------------------------------------------

    @property
    def schedule(self) -> list[float]:
        """The learning rate of each step over the peak rate."""
        t = self.training
        return [
            learning_rate(step, peak=1.0, steps=t.steps, warmup=t.warmup, schedule=t.schedule)
            for step in range(t.steps)
        ]

    # -- model -----------------------------------------------------------------------------------

    @property
    def base(self) -> PreTrainedModel:
        """The model, its head fitted."""
        return self._fitted[0]

    @property
    def head_weight(self) -> float | None:
        """λ of the head's fit; None where the head stayed what it was."""
        return self._fitted[1]

    @contextmanager
    def drawn_head(self) -> Iterator[PreTrainedModel]:
        """Inside, the model with the head that a training begins with."""
        base, fitted = self.base, self.head_weight is not None
        head = linear_head(base) if fitted else None
        kept = [] if head is None else [p.detach().clone() for p in head.parameters()]
        try:
            _write(head, self._fitted[2])
            yield base
        finally:
            _write(head, kept)

    @cached_property
    def weight_gradients(self) -> list[SiteGradient]:
        """Of the linear maps of the model, over the rows that are linearised on."""
        return weight_gradients(self.base, (batch for _, batch in self.batches("train")))

    @cached_property
    def _fitted(self) -> tuple[PreTrainedModel, float | None, list[Tensor]]:
        """The model, the λ of its head, and the head that was drawn."""
        base = self.setting.base
        try:
            head = linear_head(base)
        except InputError:
            return base, None, []
        if not getattr(base, "head_is_drawn", True):
            return base, None, []
        drawn = [p.detach().clone() for p in head.parameters()]
        train, heldout = ([b for _, b in self.batches(s)] for s in ("head", "train"))
        return base, fit_head_by_descent(base, train, heldout), drawn


def _write(head: torch.nn.Module | None, values: Sequence[Tensor]) -> None:
    if head is None:
        return
    with torch.no_grad():
        for parameter, value in zip(head.parameters(), values, strict=True):
            parameter.copy_(value)
