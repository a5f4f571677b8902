"""Whether fine-tuning follows the tangent kernel of its start.

Gradient descent on the controls ``u`` of a model with margins ``z`` of two classes, against the
same descent of the model that is linear in ``u``, which needs the kernel ``K = J J'`` alone:

    u <- u - eta J(u)' grad l(z),      real,
    z <- z - eta K grad l(z),          predicted, on training and on unseen examples.

Source: Malladi, Wettig, Yu, Chen & Arora, ICML 2023, definition 3.2 (kernel behaviour: linear in
the parameters, features that stay).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltacontrol.deltas import attach
from deltacontrol.experiments.measures.margins import (
    MarginData,
    logistic_derivatives,
    logistic_loss,
)
from deltacontrol.experiments.measures.tangent_kernel import TangentKernel, tangent_kernel
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from deltacontrol.deltas import Delta, DeltaModel


@dataclass(frozen=True)
class Followed:
    """A fine-tuning beside its prediction.

    Attributes:
        error: ``||dz - dz_predicted|| / ||dz||`` over the margins' changes on unseen examples.
        train_error: likewise on the examples that were tuned on.
        drift: ``||K_T - K_0||_F / ||K_0||_F`` over all examples.
        direction: cosine between the real and the predicted change on unseen examples.
        start: training loss before.
        predicted: training loss after, of the linear model.
        loss: training loss after.
        test_accuracy: on the unseen examples: before, predicted, after.
        steps: of gradient descent.
        rate: their ``eta``.
    """

    error: float
    train_error: float
    drift: float
    direction: float
    start: float
    predicted: float
    loss: float
    test_accuracy: tuple[float, float, float]
    steps: int
    rate: float


def follow(
    data: MarginData,
    deltas: Sequence[Delta],
    *,
    fall: float = 0.5,
    steps: int = 30,
    stretch: float = 1.0,
    seed: int = 0,
) -> Followed:
    """Fine-tune by gradient descent, and predict it from the kernel at the start.

    The rate is ``1/lambda``, ``lambda`` the largest curvature that the kernel allows,
    ``lambda_max(K)/4n``. The descent ends where the linear model's loss has fallen by a share.

    Args:
        data: with unseen examples.
        deltas: what is trained.
        fall: that share of the loss at the start.
        steps: at most.
        stretch: factor on the rate.
        seed: of the deltas.

    Raises:
        InputError: there are no unseen examples.
    """
    if not len(data.test):
        raise InputError("the prediction is judged on unseen examples; give test_rows")
    controlled = attach(data.model, *deltas, seed=seed)
    try:
        n = len(data.examples)
        before = kernel_of(data, controlled)
        K, z = before.total(), before.outputs[:, 0].double()
        rate = stretch * 4 * n / float(torch.linalg.eigvalsh(K[:n, :n])[-1])
        start = float(logistic_loss(z[:n], data.signs))
        predicted, done = z.clone(), 0
        while done < steps:
            done += 1
            slope = logistic_derivatives(predicted[:n], data.signs)[0]
            predicted = predicted - rate * K[:, :n] @ slope
            if float(logistic_loss(predicted[:n], data.signs)) <= (1 - fall) * start:
                break
        _descend(data, controlled, rate, done)
        after = kernel_of(data, controlled)
    finally:
        controlled.detach()
    real = after.outputs[:, 0].double()
    change, expected = real - z, predicted - z

    def error(rows: slice) -> float:
        return float((change[rows] - expected[rows]).norm() / change[rows].norm())

    def accuracy(margins: Tensor) -> float:
        return float((margins[n:] * data.test_signs > 0).double().mean())

    unseen = slice(n, None)
    product = change[unseen] @ expected[unseen]
    return Followed(
        error=error(unseen),
        train_error=error(slice(n)),
        drift=float((after.total() - K).norm() / K.norm()),
        direction=float(product / change[unseen].norm() / expected[unseen].norm()),
        start=start,
        predicted=float(logistic_loss(predicted[:n], data.signs)),
        loss=float(logistic_loss(real[:n], data.signs)),
        test_accuracy=(accuracy(z), accuracy(predicted), accuracy(real)),
        steps=done,
        rate=rate,
    )


def kernel_of(data: MarginData, controlled: DeltaModel) -> TangentKernel:
    """Of the margins of all examples, those that are tuned on first."""
    examples = [*data.singles(data.examples), *data.singles(data.test)]

    def read(out: Any, example: dict[str, Tensor]) -> Tensor:
        return data.margins(out.logits, example["attention_mask"])

    return tangent_kernel(controlled, controlled.trainable(), examples, read)


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Between two kernels scaled to equal length: ``||K/||K|| - L/||L|| ||_F``."""
    return float((first / first.norm() - second / second.norm()).norm())


def _descend(data: MarginData, controlled: DeltaModel, rate: float, steps: int) -> None:
    batch = data.batch(data.examples)
    parameters = list(controlled.trainable().values())
    for _ in range(steps):
        margins = data.margins(controlled(**batch).logits, batch["attention_mask"])
        found = torch.autograd.grad(logistic_loss(margins, data.signs), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter -= rate * gradient
