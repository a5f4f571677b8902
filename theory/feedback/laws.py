"""Feedback laws and the closed loop.

A feedback law chooses the control from the state that it sees, ``u_t = law(t, x_t)``, and so it
reacts to disturbances,

    x_{t+1} = f_t(x_t, law(t, x_t)) + w_t.

Open-loop controls (`deltacontrol.theory.control.problem.Controls`) are numbers fixed beforehand,
mostly one vector for all data; a law gives each example a control of its own. The two are
different types.

Source: Bryson & Ho, *Applied Optimal Control*, 1975, section 5.2 and chapter 6.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.checks import require_control, require_one_dtype
from deltacontrol.theory.control.problem import Controls, Dynamics
from deltacontrol.theory.errors import InputError

__all__ = ["AffineFeedback", "FeedbackLaw", "Trajectory", "closed_loop"]


class Solved(Protocol):
    """What `AffineFeedback.of` reads of a solution of `deltacontrol.theory.solvers`, above."""

    @property
    def controls(self) -> Controls:
        """``u_t``."""
        ...

    @property
    def states(self) -> Sequence[Tensor]:
        """``x_t``."""
        ...

    @property
    def gains(self) -> tuple[Tensor, ...] | None:
        """``K_t``, where the solver has any."""
        ...


class FeedbackLaw(ABC):
    """A rule that chooses the control from the state."""

    @abstractmethod
    def control(self, t: int, x: Tensor) -> Tensor:
        """The control ``u_t`` at the state ``x``: ``(m_t,)``, or ``(batch, m_t)``.

        `closed_loop` asks once a step, in the order of time. A law that remembers, as one with an
        integral does, starts anew at ``t = 0``.

        Args:
            t: the step.
            x: the state entering it.
        """


@typed
@dataclass(frozen=True, eq=False)
class AffineFeedback(FeedbackLaw):
    """``u_t + K_t (x - x_t)`` around the trajectory ``(x_t, u_t)``.

    The gain acts on the flattened state. Its number of columns says on which: if it is the size of
    the whole ``x_t``, batch included, one control answers to all examples together; if it is the
    size of one example ``x_t[i]``, each example has a control of its own. A trajectory of one
    example serves a batch of states as well.

    Attributes:
        gains: ``K_t`` for each step, ``(m_t, n_t)``, or ``(batch, m_t, n_t)``, one per example.
        controls: ``u_t`` for each step, ``(m_t,)`` or ``(batch, m_t)``.
        states: ``x_t`` for each step; a last one, ``x_L``, may follow.

    Raises:
        InputError: if a gain does not fit its state and its control.
    """

    gains: Sequence[Tensor]
    controls: Controls
    states: Sequence[Tensor]

    def __post_init__(self) -> None:
        """Check the lengths, and each gain against its state and its control."""
        horizon = len(self.gains)
        if len(self.controls) != horizon or len(self.states) not in (horizon, horizon + 1):
            raise InputError(
                f"expected as many gains as controls, and as many states or one more, but got "
                f"{horizon} gains, {len(self.controls)} controls, {len(self.states)} states"
            )
        for t, (K, u, x) in enumerate(zip(self.gains, self.controls, self.states, strict=False)):
            fits_state = (
                K.ndim >= 2 and u.ndim >= 1 and K.shape[-1] in (x.numel(), x.shape[1:].numel())
            )
            require_one_dtype(gain=K, control=u, **({"state": x} if x.is_floating_point() else {}))
            if not fits_state or K.shape[-2] != u.shape[-1]:
                raise InputError(
                    f"the gain of step {t} has shape {tuple(K.shape)}; its control has "
                    f"{tuple(u.shape)} and its state {tuple(x.shape)}: expected one row for each "
                    "entry of the control and one column for each entry of the state, or of one "
                    "example of it"
                )

    @classmethod
    def of(cls, solution: Solved) -> AffineFeedback:
        """The law around a solution, with the gains that its solver found.

        Raises:
            InputError: if the solution has no gains.
        """
        if solution.gains is None:
            raise InputError(
                "this solution has no feedback gains; solve with Riccati, ILQR or DDP, which have"
            )
        return cls(solution.gains, solution.controls, solution.states)

    @property
    def horizon(self) -> int:
        """The number of gains."""
        return len(self.gains)

    def control(self, t: int, x: Tensor) -> Tensor:
        """``u_t + K_t (x - x_t)``.

        Raises:
            InputError: if the state does not fit the gain.
        """
        K, u, nominal = self.gains[t], self.controls[t], self.states[t]
        if not x.is_floating_point():
            return u
        axes = nominal.ndim if nominal.numel() == K.shape[-1] else nominal.ndim - 1
        if x.shape[x.ndim - axes :] != nominal.shape[nominal.ndim - axes :]:
            raise InputError(
                f"the state entering step {t} has shape {tuple(x.shape)}; the law was made for "
                f"{tuple(nominal.shape)}"
            )
        if not nominal.is_floating_point():
            raise InputError(
                f"the state entering step {t} has {x.dtype}, and that of the law {nominal.dtype}; "
                "give the law the states that it was found at"
            )
        deviation = x - nominal
        deviation = deviation.reshape(*deviation.shape[: deviation.ndim - axes], K.shape[-1])
        return u + (K @ deviation.unsqueeze(-1)).squeeze(-1)


class Trajectory(NamedTuple):
    """The states ``x_0..x_L`` and the controls ``u_0..u_{L-1}`` of a closed loop."""

    states: list[Tensor]
    controls: Controls


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    own = shape[::-1]
    return len(own) <= len(to) and all(a in (1, b) for a, b in zip(own, to[::-1], strict=False))


@typed
def closed_loop(
    dynamics: Dynamics,
    law: FeedbackLaw,
    x0: Tensor,
    disturbance: Sequence[Tensor | None] | None = None,
) -> Trajectory:
    """Run ``x_{t+1} = f_t(x_t, u_t) + w_t`` with ``u_t = law(t, x_t)``.

    Args:
        dynamics: the steps ``f_t``.
        law: the law that sees the disturbed states.
        x0: the initial state.
        disturbance: ``w_t`` for each step, broadcast to the state ``x_{t+1}``; None is zero.

    Raises:
        InputError: if the number of disturbances is not the horizon, if one changes the shape of
            the state, or if the law is for fewer steps.
    """
    if disturbance is not None and len(disturbance) != dynamics.horizon:
        raise InputError(
            f"expected {dynamics.horizon} disturbances, one per step, but got {len(disturbance)}"
        )
    steps = getattr(law, "horizon", dynamics.horizon)
    if steps < dynamics.horizon:
        raise InputError(
            f"the law is for {steps} steps and the system has {dynamics.horizon}; expected one of "
            "the same system"
        )
    states, controls = [x0], []
    for t in range(dynamics.horizon):
        u = law.control(t, states[-1])
        require_control(dynamics.control_sizes, t, states[-1], u)
        if states[-1].is_floating_point() and u.dtype != states[-1].dtype:
            raise InputError(
                f"step {t} has a state of {states[-1].dtype} and a control of {u.dtype}; give both "
                "one dtype"
            )
        x = dynamics.step(t, states[-1], u)
        w = None if disturbance is None else disturbance[t]
        if w is not None:
            if not _broadcasts(w.shape, x.shape):
                raise InputError(
                    f"the disturbance of step {t} has shape {tuple(w.shape)}; expected one that "
                    f"broadcasts to the state {tuple(x.shape)}"
                )
            x = x + w
        controls.append(u)
        states.append(x)
    return Trajectory(states, tuple(controls))
