"""Heads of frozen models: what enters them, and their fits.

A head sees pooled features h (d,) of an example and is linear in its parameters, so its fit is the
convex program

    min_W  1/N Σ_i CE(W [h_i; 1]; y_i) + λ/2 ‖W‖²,        W (classes, d + 1),

which `fit_head` solves with a duality gap; λ is the one with the least loss on held-out rows.
`fit_two_class_head` is the logistic regression of two classes with a free intercept and unit ridge,
as scikit-learn solves it: what is measured on such heads is on record, so it stays as it is.

A causal language model needs no head of its own: two words that may follow a prompt, a verbaliser,
read it out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deltacontrol.deltas.editing.sites import SiteMap
from deltacontrol.experiments.tasks.encoding import Batch, without_labels
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from deltacontrol.deltas import DeltaModel

WEIGHTS = tuple(float(w) for w in np.geomspace(1.0, 1e-4, 9))  # λ of `fit_head`
PROMPT, WORDS = " It was", (" terrible", " great")


@dataclass(frozen=True)
class HeadFit:
    """How a head was fitted.

    Attributes:
        weight: λ, the chosen one.
        gap: the duality gap of the fit: its objective is at most so much above the least one.
    """

    weight: float
    gap: float


def fit_head(model: PreTrainedModel, train: Batch, heldout: Batch) -> HeadFit:
    """Fit the head of a model to training rows and write it into the model.

    Args:
        model: a classifier with a linear head that has a bias, in float64.
        train: rows with labels, which the loss is of.
        heldout: rows with labels, which choose λ among `WEIGHTS`.

    Raises:
        InputError: the head is not one linear map with a bias.
    """
    from deltacontrol.theory.convex import ConvexTuning, OuterProducts

    head = linear_head(model)
    features = []
    for batch in (train, heldout):
        pooled = head_inputs(model, _slices(batch, 64))
        features.append(torch.cat([pooled, torch.ones_like(pooled[:, :1])], 1))
    h, h_heldout = features
    num_classes = head.out_features
    ones = np.broadcast_to(
        np.eye(num_classes).reshape(1, num_classes, 1, num_classes),
        (len(h), num_classes, 1, num_classes),
    )
    tuning = ConvexTuning([OuterProducts(ones, h[:, None].numpy())], train["labels"])
    path = tuning.path(WEIGHTS)
    losses = [
        loss_and_accuracy(h_heldout @ solution.controls[0].T, heldout["labels"])[0]
        for solution in path
    ]
    best = path[int(np.argmin(losses))]
    with torch.no_grad():
        W = best.controls[0]
        head.weight.copy_(W[:, :-1])
        head.bias.copy_(W[:, -1])
    return HeadFit(best.weight, best.gap)


def fit_two_class_head(model: PreTrainedModel, batches: Iterable[Batch]) -> None:
    """Fit the head to two classes and write ±w/2 and ±b/2 into its two rows.

        min_{w, b}  Σ_i log(1 + exp(-s_i (wᵀh_i + b))) + ½ ‖w‖²,      s_i = ±1.

    Args:
        model: a classifier of two classes, in any precision.
        batches: rows with labels 0 and 1.

    Raises:
        InputError: the rows are of one class, or the head is not one linear map with a bias.
    """
    from sklearn.linear_model import LogisticRegression

    batches = list(batches)
    labels = [batch["labels"] for batch in batches]
    signs = 2 * torch.cat([torch.zeros(0), *labels]).double() - 1
    if len(signs.unique()) < 2:
        raise InputError(f"the {len(signs)} rows for the head have one class; take more head_rows.")
    head = linear_head(model)
    features = head_inputs(model, batches).double().numpy()
    fitted = LogisticRegression(max_iter=2000).fit(features, signs.numpy())
    weight = torch.from_numpy(fitted.coef_[0]).to(head.weight)
    bias = float(fitted.intercept_[0])
    with torch.no_grad():
        head.weight.copy_(torch.stack([-weight, weight]) / 2)
        head.bias.copy_(head.bias.new_tensor([-bias, bias]) / 2)


def head_inputs(model: PreTrainedModel, batches: Iterable[Batch]) -> Tensor:
    """What enters the head, h (rows, d), of all batches one after the other.

    Raises:
        InputError: the head is not one linear map with a bias.
    """
    seen: list[Tensor] = []
    handle = linear_head(model).register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].detach())
    )
    try:
        with torch.no_grad():
            for batch in batches:
                model(**without_labels(batch))
    finally:
        handle.remove()
    return torch.cat(seen)


def linear_head(model: PreTrainedModel) -> nn.Linear:
    """The head, where it is one linear map with a bias.

    Raises:
        InputError: it is not.
    """
    paths = SiteMap(model).head_paths()
    head = model.get_submodule(paths[0]) if len(paths) == 1 else None
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise InputError(
            f"the head of {type(model).__name__} is not one linear map with a bias, but {paths}; "
            "take a BERT, or leave the head as it is"
        )
    return head


def head_controls(model: DeltaModel) -> list[str]:
    """Names of the controls that replace parameters of the head."""
    heads = tuple(f"{path}." for path in model.host.sites.head_paths())
    return [name for name in model.trainable() if name.partition(".")[2].startswith(heads)]


def loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and share of right classes."""
    right = (logits.argmax(1) == labels).double().mean()
    return float(cross_entropy(logits, labels)), float(right)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of `PROMPT`."""
    return list(tokenizer.encode(PROMPT, add_special_tokens=False))


def word_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The tokens of the two `WORDS`.

    Raises:
        InputError: one of them is not a single token.
    """
    found = [tokenizer.encode(word, add_special_tokens=False) for word in WORDS]
    if any(len(ids) != 1 for ids in found):
        raise InputError(f"the words {WORDS} are not single tokens of this tokenizer: {found}")
    return found[0][0], found[1][0]


def _slices(batch: Batch, size: int) -> Iterable[Batch]:
    for start in range(0, len(batch["labels"]), size):
        yield {name: value[start : start + size] for name, value in batch.items()}
