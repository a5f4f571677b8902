"""Layered systems: one step, all steps at once, and steps that differ in constants alone.

Every system gives its steps one by one, which is the reference. Two more forms are offers, for
speed. `Dynamics.all_steps` serves systems of rows, whose examples do not interact.
`Dynamics.alike` serves any others of which some consecutive steps are one function with constants
of their own, such as the equal blocks of a Transformer between its input and its readout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.theory.control.box import Controls

__all__ = ["Alike", "Dynamics", "alike_steps", "offers", "zeros"]


@dataclass(frozen=True, eq=False)
class Alike:
    """Steps ``f_t(x, u) = f(c_t, x, u)`` for ``start <= t < stop``, with one ``f`` for all of them.

    Their states, also the one after the last, have one shape, and their controls have one size.

    Attributes:
        start: the first of these steps.
        stop: the step after the last of them.
        constants: the ``c_t``, tensors by name, ``(stop - start, ...)`` each.
        function: ``f(c, x, u)``, pure, so that `torch.func` transforms apply.
    """

    start: int
    stop: int
    constants: Mapping[str, Tensor]
    function: Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]


class Dynamics(ABC):
    """A layered system ``x_{t+1} = f_t(x_t, u_t)``, ``t = 0..horizon-1``.

    Attributes:
        horizon: the number of steps ``L``.
        control_sizes: the sizes ``(m_0, ..., m_{L-1})`` of the flat controls.
    """

    horizon: int
    control_sizes: tuple[int, ...]

    @abstractmethod
    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """The next state ``f_t(x, u)``.

        Pure: no side effect, no change in place, so that `torch.func` transforms apply.

        Args:
            t: the step, ``0 <= t < horizon``.
            x: the state entering step ``t``.
            u: the control, ``(m_t,)`` or ``(batch, m_t)``.
        """

    def all_steps(self, x: Tensor, u: Tensor) -> Tensor | None:
        """Every step at once, ``f_t(x_t, u_t)`` for all ``t``, or None where this is not offered.

        Derivatives of all steps then come from one call. It must agree with `step`, and step ``t``
        must depend on ``x_t`` and ``u_t`` alone.

        Args:
            x: ``(horizon, *state)``, the states entering the steps, which have one shape.
            u: ``(horizon, m)``, or ``(horizon, batch, m)``.
        """
        return None

    def alike(self) -> Alike | None:
        """Consecutive steps that are one function with constants of their own, or None.

        Derivatives of these steps are taken at once where the steps are so small that it pays. It
        must agree with `step`, for controls ``(m_t,)``.
        """
        return None

    def initial_controls(self, x0: Tensor) -> Controls:
        """Where a solver starts if it is not told: zeros.

        Dynamics whose controls have present values, such as those of a model, give these.

        Args:
            x0: the initial state; it gives device and dtype (torch's default where it holds
                integers).

        Returns:
            One control per step, ``(m_t,)``.
        """
        return zeros(self.control_sizes, (), x0, None)


def alike_steps(dynamics: Dynamics) -> Alike | None:
    """`Dynamics.alike`, unless it is a parent's answer for a step that a subclass has changed."""
    return dynamics.alike() if offers(dynamics, "step", "alike") else None


def offers(system: object, single: str, whole: str) -> bool:
    """Whether the class that says what one step is, or one derived from it, says all of them."""
    for kind in type(system).__mro__:
        if whole in vars(kind):
            return True
        if single in vars(kind):
            return False
    return False


def zeros(
    sizes: Sequence[int], lead: Sequence[int], like: Tensor, dtype: torch.dtype | None
) -> Controls:
    """Zeros ``(*lead, m_t)`` on the device of a state, by default of its dtype."""
    if dtype is None:
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    return tuple(torch.zeros((*lead, m), dtype=dtype, device=like.device) for m in sizes)
