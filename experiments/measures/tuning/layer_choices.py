"""LoRA in some layers of a model: the tangent kernel at the start, and a training.

All choices of layers share one start. With B = 0 there, LoRA changes nothing wherever it is not
trained, so that it lies in all layers and a choice is which of its tensors are trained. The kernel
of a choice S is the sum of those of its tensors p,

    K_S = Σ_{p in S} J_p J_p',      κ_S = λ_max(K_S) / λ_min(K_S),

over the margins of all examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.deltas import DeltaModel, LoRA, attach
from deltacontrol.experiments.measures.kernel_regime import kernel_of
from deltacontrol.experiments.measures.margins import MarginData, logistic_loss
from deltacontrol.theory.errors import InputError

Layers = tuple[int, ...]

NONE = 1e-12  # an eigenvalue below this share of the largest is rounding


def condition_number(K: Tensor) -> float:
    """The largest eigenvalue over the least, which counts as rounding's if it is below."""
    values = torch.linalg.eigvalsh(K.double())
    return float(values[-1] / values[0].clamp_min(NONE * values[-1]))


@dataclass(frozen=True)
class Choices:
    """Of each choice of layers, in one order.

    Attributes:
        conditions: condition numbers of the kernels at the start.
        losses: on the rows that were trained on, at the end.
        counts: numbers of parameters.
        start: the loss before.
    """

    conditions: tuple[float, ...]
    losses: tuple[float, ...]
    counts: tuple[int, ...]
    start: float = float("nan")

    @classmethod
    def of(
        cls,
        data: MarginData,
        lora: LoRA,
        choices: Sequence[Layers],
        *,
        steps: int,
        rate: float,
        seed: int,
    ) -> Choices:
        """Kernels of all choices, in float64, and their trainings by AdamW on all rows at once.

        Raises:
            InputError: a choice has no layer in which LoRA acts.
        """
        conditions = _conditions(data, lora, choices, seed)
        ends = [_trained(data, lora, layers, steps, rate, seed) for layers in choices]
        start, _ = _trained(data, lora, choices[0], 0, rate, seed)
        return cls(conditions, tuple(e[0] for e in ends), tuple(e[1] for e in ends), start)


def _chosen(controlled: DeltaModel, layers: Layers) -> list[str]:
    """The names of the controls in these layers."""
    host = controlled.host
    found = [
        name
        for name in controlled.trainable()
        if host.sites.layer_of(host.state_path[name]) in layers
    ]
    if not found:
        raise InputError(f"LoRA has no tensor in the layers {layers}; choose layers it acts in")
    return found


def _conditions(
    data: MarginData, lora: LoRA, choices: Sequence[Layers], seed: int
) -> tuple[float, ...]:
    controlled, dtype = attach(data.model, lora, seed=seed).eval(), data.model.dtype
    try:
        kernel = kernel_of(data, controlled.double())
        return tuple(
            condition_number(kernel.total(_chosen(controlled, layers))) for layers in choices
        )
    finally:
        controlled.to(dtype)
        controlled.detach()


def _trained(
    data: MarginData, lora: LoRA, layers: Layers, steps: int, rate: float, seed: int
) -> tuple[float, int]:
    """The loss after a training in these layers alone, and its number of parameters."""
    controlled = attach(data.model, lora, seed=seed).eval()
    try:
        trainable = controlled.trainable()
        parameters = [trainable[name] for name in _chosen(controlled, layers)]
        batch = data.batch(data.examples)

        def loss() -> Tensor:
            logits = controlled(**batch).logits
            return logistic_loss(data.margins(logits, batch["attention_mask"]), data.signs)

        optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        for _ in range(steps):
            slopes = torch.autograd.grad(loss(), parameters)
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.grad = slope
            optimiser.step()
        with torch.no_grad():
            return float(loss()), sum(p.numel() for p in parameters)
    finally:
        controlled.detach()
