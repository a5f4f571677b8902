"""A model in float64 beside its copy in float32, its rows, and passing changes of parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltacontrol.experiments.tasks.encoding import Batch, without_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltacontrol.experiments.setting import Setting


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """The frozen model, and its rows.

    Attributes:
        model: with its fitted head, in float64.
        real: a copy in float32, for training and for evaluations that need no identity.
        train, heldout, test: rows with labels.
    """

    model: PreTrainedModel
    real: PreTrainedModel
    train: Batch
    heldout: Batch
    test: Batch

    @classmethod
    def of(cls, setting: Setting) -> FrozenModel:
        """The model of a setting in float64, and its three splits."""
        batches = (setting.batch(split) for split in ("train", "validation", "test"))
        return cls(setting.base, copy.deepcopy(setting.base).float(), *batches)


@contextmanager
def changed(model: PreTrainedModel, changes: Mapping[str, Tensor]) -> Iterator[None]:
    """Add changes to parameters, by name; the old values come back."""
    parameters = dict(model.named_parameters())
    old = {name: parameters[name].data for name in changes}
    try:
        for name, change in changes.items():
            parameters[name].data = old[name] + change.to(old[name].dtype)
        yield
    finally:
        for name, value in old.items():
            parameters[name].data = value


def logits(model: PreTrainedModel, batch: Batch, *, chunk: int = 64) -> Tensor:
    """The logits (N, K) of a batch, so many rows a pass."""
    with torch.no_grad():
        return torch.cat(
            [
                model(**{n: v[i : i + chunk] for n, v in without_labels(batch).items()}).logits
                for i in range(0, len(batch["labels"]), chunk)
            ]
        )
