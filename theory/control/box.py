"""Bounds on controls.

Controls ``u = (u_0, ..., u_{L-1})`` are one tensor a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError

Controls: TypeAlias = tuple[Tensor, ...]


@typed
@dataclass(frozen=True, eq=False)
class Box:
    """Bounds ``low <= u <= high`` on every entry of the controls.

    Attributes:
        low: a number, or one tensor a step that broadcasts to ``u_t``; ``-inf`` is no bound.
        high: likewise.

    Raises:
        InputError: if a lower bound exceeds its upper bound, or both are for different numbers of
            steps.
    """

    low: float | Sequence[Tensor] = -math.inf
    high: float | Sequence[Tensor] = math.inf

    def __post_init__(self) -> None:
        """Check that the box is not empty."""
        steps = [len(b) for b in (self.low, self.high) if not isinstance(b, int | float)]
        if len(set(steps)) > 1:
            raise InputError(
                f"low has {steps[0]} bounds and high {steps[1]}; expected one tensor a step in both"
            )
        for t in range(max(steps, default=1)):
            low, high = (
                torch.as_tensor(_bound(bound, t), dtype=torch.float64)
                for bound in (self.low, self.high)
            )
            if not bool(((low <= high) & (low < math.inf) & (high > -math.inf)).all()):
                raise InputError(
                    f"the box is empty at step {t}: low exceeds high, low is inf, high is -inf, or "
                    "one is NaN"
                )

    def bounds(self, t: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """``low`` and ``high`` of step ``t`` as tensors of the shape and dtype of ``like``."""
        low, high = (
            torch.as_tensor(_bound(b, t), dtype=like.dtype, device=like.device).expand_as(like)
            for b in (self.low, self.high)
        )
        return low, high

    def inside(self, u: Controls) -> Tensor:
        """Which of the flat controls are at no bound, and free to move both ways."""
        found = [
            ((low < u_t) & (u_t < high)).reshape(-1)
            for u_t, (low, high) in ((u_t, self.bounds(t, u_t)) for t, u_t in enumerate(u))
        ]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.bool)

    def check(self, u: Controls) -> None:
        """Check the number and the shapes of the bounds against controls.

        Raises:
            InputError: naming the step, the shape of the bound and that of the control.
        """
        for name, bound in (("low", self.low), ("high", self.high)):
            if isinstance(bound, int | float):
                continue
            if len(bound) != len(u):
                raise InputError(
                    f"the box has {len(bound)} bounds {name} for {len(u)} controls; give a number, "
                    "or one tensor a step"
                )
            for t, (b, u_t) in enumerate(zip(bound, u, strict=True)):
                shape = tuple(torch.as_tensor(b).shape)
                fits = len(shape) <= u_t.ndim and all(
                    given in (1, size)
                    for given, size in zip(reversed(shape), reversed(u_t.shape), strict=False)
                )
                if not fits:
                    raise InputError(
                        f"the box has {name} of shape {shape} at step {t}, whose control has shape "
                        f"{tuple(u_t.shape)}; give a number, or one tensor a step that broadcasts "
                        "to the control"
                    )

    def project(self, u: Controls) -> Controls:
        """The nearest controls in the box."""
        return tuple(u_t.clamp(*self.bounds(t, u_t)) for t, u_t in enumerate(u))


def _bound(bound: float | Sequence[Tensor], t: int) -> float | Tensor:
    return bound if isinstance(bound, int | float) else bound[t]
