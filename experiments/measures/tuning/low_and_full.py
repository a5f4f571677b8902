"""LoRA and full fine-tuning of the same matrices, until both have one training loss.

LoRA is W + s B A with B = 0 at the start and A normal, of variance one over the inputs; the full
one is W + D. Both are trained by AdamW without decay on all rows at once; the full one ends at the
first step at which its loss is at most LoRA's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]  # matrices by name
Loss = Callable[[Weights], Tensor]


@dataclass(frozen=True, eq=False)
class LowAndFull:
    """Both fine-tunings of one task.

    Attributes:
        low: the matrices of LoRA.
        full: those of full fine-tuning.
        before: the training loss at the start.
        low_loss: LoRA's at the end.
        full_loss: that of the full one.
    """

    low: Weights
    full: Weights
    before: float
    low_loss: float
    full_loss: float

    @classmethod
    def of(
        cls,
        loss: Loss,
        base: Weights,
        *,
        rank: int,
        scaling: float,
        rates: tuple[float, float],
        steps: int,
        seed: int,
    ) -> LowAndFull:
        """Train both.

        Args:
            loss: the training loss of matrices.
            base: the pre-trained ones.
            rank: of LoRA.
            scaling: s.
            rates: of LoRA and of the full one.
            steps: of LoRA; the full one has thrice as many at most.
            seed: of A.
        """
        random = torch.Generator().manual_seed(seed)
        A, B, D = {}, {}, {}
        for name, W in base.items():
            A[name] = torch.randn(rank, W.shape[1], generator=random).to(W) / W.shape[1] ** 0.5
            B[name], D[name] = W.new_zeros(len(W), rank), torch.zeros_like(W)

        def low() -> Weights:
            return {n: W + scaling * B[n] @ A[n] for n, W in base.items()}

        def full() -> Weights:
            return {n: W + D[n] for n, W in base.items()}

        with torch.no_grad():
            before = float(loss(base))
        low_loss = _descend(lambda: loss(low()), [*A.values(), *B.values()], rates[0], steps)
        full_loss = _descend(lambda: loss(full()), [*D.values()], rates[1], 3 * steps, low_loss)
        with torch.no_grad():
            return cls(low(), full(), before, low_loss, full_loss)


def _descend(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    rate: float,
    steps: int,
    until: float = float("-inf"),
) -> float:
    """AdamW until the loss is low enough; the loss at the end."""
    for parameter in parameters:
        parameter.requires_grad_()
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for _ in range(steps):
        now = loss()
        if float(now.detach()) <= until:
            break
        for parameter, slope in zip(parameters, torch.autograd.grad(now, parameters), strict=True):
            parameter.grad = slope
        optimiser.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    with torch.no_grad():
        return float(loss())
