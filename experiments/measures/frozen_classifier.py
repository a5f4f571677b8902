"""A pre-trained classifier whose head has been fitted and whose backbone is frozen.

The head sees pooled features h and is linear in its parameters, so its fit is the convex program

    min_W  1/N Σ_i CE(W [h_i; 1]; y_i) + λ/2 ‖W‖²

solved exactly; λ is the one with the least loss on held-out rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deltacontrol.experiments import models, tasks
from deltacontrol.theory.convex import ConvexTuning, OuterProducts
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

Batch = dict[str, Tensor]
HEAD_WEIGHTS = tuple(float(w) for w in np.geomspace(1.0, 1e-4, 9))


@dataclass(frozen=True, eq=False)
class FrozenClassifier:
    """A model with a fitted head, and the rows of a task as batches.

    Attributes:
        model: in float64, or float32 after `single`, and in evaluation mode.
        train, heldout, test: batches with "labels"; train rows depend on the seed.
        head_weight: λ of the head.
        head_gap: the duality gap of its fit.
    """

    model: PreTrainedModel
    train: Batch
    heldout: Batch
    test: Batch
    head_weight: float
    head_gap: float

    @classmethod
    def load(
        cls,
        model: str,
        task: str,
        *,
        num_examples: int,
        num_heldout: int,
        num_test: int,
        max_length: int,
        seed: int,
    ) -> FrozenClassifier:
        """Load a model and a task, take random training rows, and fit the head.

        Raises:
            InputError: the task is no classification, it has too few rows, or the model has no
                linear head.
        """
        data = tasks.load(task)
        if data.kind != "classification":
            raise InputError(f"{task} is a {data.kind} task; expected a classification")
        wanted = {"train": num_examples, "validation": num_heldout, "test": num_test}
        for split, count in wanted.items():
            if not 1 <= count <= len(getattr(data, split)):
                raise InputError(
                    f"{count} {split} rows of {task} were asked for; it has "
                    f"{len(getattr(data, split))}"
                )
        built, tokenizer = models.load(
            model, kind="classification", num_labels=len(data.labels), seed=0, dtype="float64"
        )

        def batch(rows: pd.DataFrame) -> Batch:
            encoded = tokenizer(
                list(rows["text"]),
                truncation=True,
                max_length=max_length,
                padding=True,
                return_tensors="pt",
            )
            return {**encoded, "labels": torch.tensor(rows["label"].to_numpy())}

        chosen = np.random.default_rng(seed).permutation(len(data.train))[:num_examples]
        train = batch(data.train.iloc[chosen])
        heldout = batch(data.validation.head(num_heldout))
        weight, gap = _fit_head(built, train, heldout)
        test = batch(data.test.head(num_test))
        return cls(built.eval(), train, heldout, test, weight, gap)

    def single(self) -> FrozenClassifier:
        """A copy in float32, for training and for evaluations that need no identity."""
        return replace(self, model=copy.deepcopy(self.model).float())

    @contextmanager
    def changed(self, changes: Mapping[str, Tensor]) -> Iterator[None]:
        """Add changes to parameters, by name; the old values come back."""
        parameters = dict(self.model.named_parameters())
        old = {name: parameters[name].data for name in changes}
        try:
            for name, change in changes.items():
                parameters[name].data = old[name] + change.to(old[name].dtype)
            yield
        finally:
            for name, value in old.items():
                parameters[name].data = value

    @torch.no_grad()
    def logits(self, batch: Batch, *, chunk: int = 64) -> Tensor:
        """The logits (N, K) of a batch."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        count = len(batch["labels"])
        parts = [
            self.model(**{n: v[start : start + chunk] for n, v in inputs.items()}).logits
            for start in range(0, count, chunk)
        ]
        return torch.cat(parts)


def loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and share of right classes."""
    right = (logits.argmax(1) == labels).double().mean()
    return float(cross_entropy(logits, labels)), float(right)


def _fit_head(model: PreTrainedModel, train: Batch, heldout: Batch) -> tuple[float, float]:
    head = _head(model)
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    features = []
    try:
        for batch in (train, heldout):
            seen.clear()
            with torch.no_grad():
                inputs = {name: value for name, value in batch.items() if name != "labels"}
                for start in range(0, len(batch["labels"]), 64):
                    model(**{n: v[start : start + 64] for n, v in inputs.items()})
            pooled = torch.cat(seen)
            features.append(torch.cat([pooled, torch.ones_like(pooled[:, :1])], 1))
    finally:
        handle.remove()
    h, h_heldout = features
    num_classes = head.out_features
    ones = np.broadcast_to(
        np.eye(num_classes).reshape(1, num_classes, 1, num_classes),
        (len(h), num_classes, 1, num_classes),
    )
    tuning = ConvexTuning([OuterProducts(ones, h[:, None].numpy())], train["labels"])
    path = tuning.path(HEAD_WEIGHTS)
    losses = [
        loss_and_accuracy(h_heldout @ solution.controls[0].T, heldout["labels"])[0]
        for solution in path
    ]
    best = path[int(np.argmin(losses))]
    with torch.no_grad():
        W = best.controls[0]
        head.weight.copy_(W[:, :-1])
        head.bias.copy_(W[:, -1])
    return best.weight, best.gap


def _head(model: PreTrainedModel) -> nn.Linear:
    head = getattr(model, "classifier", None)
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise InputError(
            f"{type(model).__name__} has no linear classifier with a bias to fit; take a BERT"
        )
    return head
