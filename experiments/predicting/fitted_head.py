"""The head's fit of `deltacontrol.experiments.heads.fit_head` without its certificate.

    min_W  1/N sum_i CE(W [h_i; 1]; y_i) + lambda/2 ||W||^2

by L-BFGS on the features ``h`` in float64: the optimum is the same, the model may be in any
precision, and it takes a fraction of the time; nothing is proved.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from deltacontrol.experiments.heads import WEIGHTS, head_inputs, linear_head
from deltacontrol.experiments.tasks.encoding import Batch
from deltacontrol.theory.solvers.lbfgs import differentiated, minimise_lbfgs

TOLERANCE = 1e-7  # of the gradient


def fit_head_by_descent(
    model: PreTrainedModel, train: Iterable[Batch], heldout: Iterable[Batch]
) -> float:
    """Fit the head to training rows and write it into the model.

    Args:
        model: a classifier with a linear head that has a bias.
        train: rows with labels, which the loss is of.
        heldout: rows with labels, which choose lambda among `WEIGHTS`.

    Returns:
        The chosen lambda.

    Raises:
        InputError: the head is not one linear map with a bias.
    """
    head = linear_head(model)
    h, labels = _features(model, list(train))
    h_heldout, labels_heldout = _features(model, list(heldout))
    W = torch.zeros(head.out_features, h.shape[1], dtype=h.dtype)
    fits: list[tuple[float, float, Tensor]] = []
    for weight in WEIGHTS:  # falling, each from the optimum of the one before

        def objective(W: Tensor, weight: float = weight) -> Tensor:
            return cross_entropy(h @ W.mT, labels) + 0.5 * weight * W.square().sum()

        W = minimise_lbfgs(differentiated(objective), W, gradient_tolerance=TOLERANCE).x
        fits.append((float(cross_entropy(h_heldout @ W.mT, labels_heldout)), weight, W))
    _, weight, W = min(fits, key=lambda fit: fit[0])
    with torch.no_grad():
        head.weight.copy_(W[:, :-1])
        head.bias.copy_(W[:, -1])
    return weight


def _features(model: PreTrainedModel, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """What enters the head with a one behind it, (rows, d + 1), and the labels."""
    h = head_inputs(model, batches).double()
    labels = torch.cat([batch["labels"] for batch in batches])
    return torch.cat([h, torch.ones_like(h[:, :1])], 1), labels
