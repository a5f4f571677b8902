"""LoRA and full fine-tuning of the same matrices, until both have one training loss.

LoRA is W + s B A with B = 0 at the start and A normal, of variance one over the inputs; the full
one is W + D. Both are trained by AdamW without decay on all rows at once. LoRA goes on until its
loss is small enough, and the full one until its loss is at most LoRA's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError

Weights = Mapping[str, Tensor]  # matrices by name
Loss = Callable[[Weights], Tensor]

RISE = 0.1  # of the loss at the start: a loss that rises by more does not fall steadily


@dataclass(frozen=True, eq=False)
class Tuned:
    """What is trained, and the matrices that it makes."""

    parameters: Sequence[Tensor]
    matrices: Callable[[], dict[str, Tensor]]

    @classmethod
    def low(cls, base: Weights, rank: int, scaling: float, seed: int) -> Tuned:
        """LoRA at its start; ``seed`` draws A."""
        random = torch.Generator().manual_seed(seed)
        A, B = {}, {}
        for name, W in base.items():
            A[name] = torch.randn(rank, W.shape[1], generator=random).to(W) / W.shape[1] ** 0.5
            B[name] = W.new_zeros(len(W), rank)
        return cls(
            [p.requires_grad_() for p in (*A.values(), *B.values())],
            lambda: {n: W + scaling * B[n] @ A[n] for n, W in base.items()},
        )

    @classmethod
    def full(cls, base: Weights) -> Tuned:
        """Full fine-tuning at its start."""
        D = {name: torch.zeros_like(W).requires_grad_() for name, W in base.items()}
        return cls([*D.values()], lambda: {n: W + D[n] for n, W in base.items()})

    def descent(self, loss: Loss, rate: float, *, steps: int, until: float) -> Iterator[float]:
        """Train, and give the loss at the start and after each step.

        It ends with the first loss that is at most ``until``, or after so many steps.
        """
        optimiser = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0)
        for step in range(steps + 1):
            now = loss(self.matrices())
            yield (value := float(now.detach()))
            if value <= until or step == steps:
                return
            slopes = torch.autograd.grad(now, self.parameters)
            for parameter, slope in zip(self.parameters, slopes, strict=True):
                parameter.grad = slope
            optimiser.step()

    @property
    def weights(self) -> Weights:
        """The matrices as they are now, without a gradient."""
        return {name: W.detach() for name, W in self.matrices().items()}


@dataclass(frozen=True, eq=False)
class LowAndFull:
    """Both fine-tunings of one task.

    Attributes:
        low: the matrices of LoRA.
        full: those of full fine-tuning.
        before: the training loss at the start.
        low_loss: LoRA's at the end.
        full_loss: that of the full one.
        steps: of LoRA and of the full one.
    """

    low: Weights
    full: Weights
    before: float
    low_loss: float
    full_loss: float
    steps: tuple[int, int]

    @classmethod
    def of(
        cls,
        loss: Loss,
        low: Tuned,
        full: Tuned,
        rates: tuple[float, float],
        *,
        steps: int,
        until: float,
    ) -> LowAndFull:
        """Train both.

        Args:
            loss: the training loss of matrices.
            low: LoRA at its start.
            full: full fine-tuning at its start.
            rates: of LoRA and of the full one.
            steps: of each, at most.
            until: the loss at which LoRA ends.
        """
        of_low = [*low.descent(loss, rates[0], steps=steps, until=until)]
        of_full = [*full.descent(loss, rates[1], steps=steps, until=of_low[-1])]
        return cls(
            low.weights,
            full.weights,
            of_low[0],
            of_low[-1],
            of_full[-1],
            (len(of_low) - 1, len(of_full) - 1),
        )


def steady_rate(
    loss: Loss,
    start: Callable[[], Tuned],
    rates: Sequence[float],
    *,
    steps: int,
    until: float,
) -> float:
    """The largest rate at which the loss falls steadily, until it is small enough.

    Steadily: no loss is above the lowest before it by more than a tenth of the loss at the start.

    Args:
        loss: the training loss of matrices.
        start: makes what is trained, at its start.
        rates: those that are tried, the largest first.
        steps: at most so many.
        until: the loss that must be reached.

    Raises:
        InputError: there is no such rate.
    """
    for rate in sorted(rates, reverse=True):
        if _is_steady(start().descent(loss, rate, steps=steps, until=until), until):
            return rate
    raise InputError(
        f"at no rate of {sorted(rates)} the loss falls steadily to {until:g} in {steps} steps; "
        "give smaller rates, or more steps"
    )


def _is_steady(losses: Iterator[float], until: float) -> bool:
    first = lowest = now = next(losses)
    for now in losses:
        if not now <= lowest + RISE * first:  # also where it is no number
            return False
        lowest = min(lowest, now)
    return now <= until
