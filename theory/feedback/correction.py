"""Corrections of a disturbed state towards the subspace of undisturbed ones.

The control is added to the state that enters a step (Chen, Li & Zhang, ICLR 2021, section 3),

    x_{t+1} = f_t(x_t + u_t),     e_t = (I - V_t V_t') (x_t - mu_t),

with ``mu_t + span V_t`` the principal subspace of states seen on undisturbed data, so that the
error ``e_t`` is what those data do not explain. Two laws act on it:

    projection   u_t = -k_t e_t
    PID          u_t = -(kp_t e_t + ki_t sum_{s<=t} e_s + kd_t (e_t - e_{t-1})),  e_{-1} = e_0

The gain ``k_t = 1/(1+c)`` minimises ``1/2 ||e_t + u||^2 + c/2 ||u||^2``; `PIDGains.optimal` gives
those that minimise the sum over all steps.

A subspace acts on the last axis, hence on each token alone: what stands on padding cannot matter.

Source: Chen, Li & Zhang, *Towards robust neural networks via close-loop control*, ICLR 2021;
*Self-healing robust neural networks via closed-loop control*, JMLR 23(319), 2022; the PID law:
Chen, Wang, Yang, Li & Zhang, *PID control-based self-healing*, TMLR 2024.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.problem import ControlProblem, Controls, Dynamics
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.feedback.affine_subspace import AffineSubspace
from deltacontrol.theory.feedback.laws import FeedbackLaw

__all__ = [
    "AdditiveControl",
    "PIDCorrection",
    "PIDGains",
    "ProjectionCorrection",
    "StateFeedback",
]


@typed
class AdditiveControl(Dynamics):
    """``x_{t+1} = f_t(x_t + u_t)``: the steps of a system under controls of its states.

    Args:
        problem: the system, with its initial state; its cost is not looked at.
        controls: the controls ``v_t`` that the system keeps, ``f_t = f_t(., v_t)``.

    Attributes:
        control_sizes: the number of state entries of one example, 0 where the state holds integers.
    """

    def __init__(self, problem: ControlProblem, controls: Controls) -> None:
        self.base, self.controls = problem.dynamics, controls
        self.horizon = problem.dynamics.horizon
        with torch.no_grad():
            states = problem.rollout(controls)[:-1]
        self._shapes = tuple(x.shape if x.ndim == 1 else x.shape[1:] for x in states)
        self.control_sizes = tuple(
            shape.numel() if x.is_floating_point() else 0
            for x, shape in zip(states, self._shapes, strict=True)
        )

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """``f_t(x + u)``."""
        if self.control_sizes[t]:
            x = x + u.reshape(*u.shape[:-1], *self._shapes[t])
        return self.base.step(t, x, self.controls[t])


class StateFeedback(FeedbackLaw):
    """A law whose control is added to the state itself, as in `AdditiveControl`."""

    @property
    @abstractmethod
    def horizon(self) -> int:
        """The number of steps that the law was made for."""

    @abstractmethod
    def correction(self, t: int, x: Tensor) -> Tensor | None:
        """What to add to ``x``, of its shape; None where the law does not act.

        It is asked in the order of time, and a law that remembers starts anew at its first step.
        """

    def control(self, t: int, x: Tensor) -> Tensor:
        """The correction, flattened: ``(m_t,)``, or ``(batch, m_t)`` for a batch of states."""
        u = self.correction(t, x) if x.is_floating_point() else None
        if u is None:
            dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
            sizes = x.shape if x.ndim == 1 else x.shape[1:]
            size = sizes.numel() if x.is_floating_point() else 0
            batch = x.shape[:1] if x.ndim > 1 else ()
            return torch.zeros(*batch, size, dtype=dtype, device=x.device)
        return u if x.ndim == 1 else u.flatten(1)


@typed
@dataclass(frozen=True, eq=False)
class ProjectionCorrection(StateFeedback):
    """``u_t = -k_t (I - V_t V_t') (x_t - mu_t)``.

    Attributes:
        subspaces: one for each step, or None where the law does not act.
        gain: ``k_t``, one number or one for each step.

    Raises:
        InputError: if the numbers of gains and of steps differ.
    """

    subspaces: Sequence[AffineSubspace | None]
    gain: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        """Check the number of gains."""
        _per_step("gain", self.gain, len(self.subspaces))

    @property
    def horizon(self) -> int:
        """The number of steps."""
        return len(self.subspaces)

    def correction(self, t: int, x: Tensor) -> Tensor | None:
        """``-k_t e_t``."""
        subspace = self.subspaces[t]
        return None if subspace is None else -_at(self.gain, t) * subspace.error(x)


@typed
@dataclass(frozen=True, eq=False)
class PIDCorrection(StateFeedback):
    """``u_t = -(kp_t e_t + ki_t sum_{s<=t} e_s + kd_t (e_t - e_{t-1}))``, ``e_{-1} = e_0``.

    The sum runs over the steps at which the law acts, and ``e_{t-1}`` is the error of the last one.
    It is kept for each step until the next pass begins, so that a step may be run again.

    Attributes:
        subspaces: one for each step, all of one width, or None where the law does not act.
        proportional: ``kp_t``, one number or one for each step.
        integral: ``ki_t``, one number or one for each step.
        derivative: ``kd_t``, one number or one for each step.

    Raises:
        InputError: if the numbers of gains and of steps differ.
    """

    subspaces: Sequence[AffineSubspace | None]
    proportional: float | Sequence[float] = 1.0
    integral: float | Sequence[float] = 0.0
    derivative: float | Sequence[float] = 0.0
    _memory: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the number of gains."""
        for name in ("proportional", "integral", "derivative"):
            _per_step(name, getattr(self, name), len(self.subspaces))

    @property
    def horizon(self) -> int:
        """The number of steps."""
        return len(self.subspaces)

    def correction(self, t: int, x: Tensor) -> Tensor | None:
        """The sum of the three terms."""
        subspace = self.subspaces[t]
        if subspace is None:
            return None
        error = subspace.error(x)
        before = [s for s in range(t) if self.subspaces[s] is not None]
        if before:
            total, last = self._memory[before[-1]]
            if last.shape != error.shape:
                raise InputError(
                    f"the error at step {t} has shape {tuple(error.shape)} and the one before "
                    f"{tuple(last.shape)}; the sum of a PID correction takes states of one shape: "
                    "leave the law out (None) at the others"
                )
            total = total + error
        else:
            self._memory.clear()
            total, last = error, error
        self._memory[t] = (total, error)
        gains = _at(self.proportional, t), _at(self.integral, t), _at(self.derivative, t)
        return -(gains[0] * error + gains[1] * total + gains[2] * (error - last))


@dataclass(frozen=True)
class PIDGains:
    """Gains of `PIDCorrection`, one for each step.

    Attributes:
        proportional: ``kp_t``.
        integral: ``ki_t``.
        derivative: ``kd_t``.
    """

    proportional: tuple[float, ...]
    integral: tuple[float, ...]
    derivative: tuple[float, ...]

    @classmethod
    def optimal(
        cls,
        horizon: int,
        control_cost: float,
        *,
        transverse: float = 0.0,
        integral_cost: float = 0.0,
        derivative_cost: float = 0.0,
    ) -> PIDGains:
        """The gains of the linear-quadratic regulator of the error.

        Where the layers carry the subspaces into each other and multiply what is orthogonal to them
        by an isometry and by ``sigma``, the error obeys ``e_{t+1} = sigma R_t (e_t + u_t)``. With
        the sum ``z_t`` of the errors up to ``t`` (carried along by the ``R_t``) the gains minimise

            sum_t 1/2 ||e_t + u_t||^2 + c/2 ||u_t||^2 + ci/2 ||z_t||^2
                  + cd/2 ||e_t + u_t - e_{t-1}||^2

        over all feedback laws, by the Riccati recursion in ``(e_t, z_{t-1}, e_{t-1})``, the same
        3 x 3 system for every orthogonal direction. (A cost of the uncorrected difference
        ``e_t - e_{t-1}`` would give no derivative term: when ``u_t`` is chosen it is spent.)
        Without ``ci`` and ``cd`` only ``kp`` remains:
        ``kp_t = b_t/(b_t + c)``, ``b_t = 1 + sigma^2 c kp_{t+1}``, which is the greedy ``1/(1+c)``
        at the last step, or at every step if ``sigma = 0``.

        Args:
            horizon: the number of steps.
            control_cost: ``c > 0``.
            transverse: ``sigma``.
            integral_cost: ``ci >= 0``.
            derivative_cost: ``cd >= 0``.

        Raises:
            InputError: for a cost out of range.

        Example:
            >>> PIDGains.optimal(2, 1.0, transverse=1.0).proportional
            (0.6, 0.5)
        """
        if not control_cost > 0 or integral_cost < 0 or derivative_cost < 0:
            raise InputError(
                f"control_cost = {control_cost} must be positive, integral_cost = {integral_cost} "
                f"and derivative_cost = {derivative_cost} not negative"
            )
        ci, cd, rows = integral_cost, derivative_cost, torch.float64
        A = torch.tensor([[transverse, 0, 0], [1, 1, 0], [1, 0, 0]], dtype=rows)
        B = torch.tensor([transverse, 0, 0], dtype=rows)
        Q = torch.tensor([[1 + ci + cd, ci, -cd], [ci, ci, 0], [-cd, 0, cd]], dtype=rows)
        N = torch.tensor([1 + cd, 0, -cd], dtype=rows)
        P, gains = torch.zeros(3, 3, dtype=rows), []
        for _ in range(horizon):
            K = (B @ P @ A + N) / (1 + control_cost + cd + B @ P @ B)
            P = Q + A.mT @ P @ A - torch.outer(K, B @ P @ A + N)
            P = 0.5 * (P + P.mT)
            gains.append((float(K[0] - K[1] + K[2]), float(K[1]), float(-K[2])))
        proportional, integral, derivative = zip(*gains[::-1], strict=True) if gains else ((),) * 3
        return cls(proportional, integral, derivative)


def _at(gain: float | Sequence[float], t: int) -> float:
    return gain[t] if isinstance(gain, list | tuple) else gain  # type: ignore[return-value]


def _per_step(name: str, gain: float | Sequence[float], horizon: int) -> None:
    if isinstance(gain, list | tuple) and len(gain) != horizon:
        raise InputError(f"{name} has {len(gain)} entries; expected {horizon}, one for each step")
