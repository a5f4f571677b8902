"""The discrete-time optimal control problem, its Hamiltonian and its costates.

Minimise over ``u = (u_0, ..., u_{L-1})``

    J(u) = Phi(x_L) + sum_t l_t(x_t, u_t)   subject to   x_{t+1} = f_t(x_t, u_t),  x_0 given.

With the Hamiltonian ``H_t(x, u, p) = l_t(x, u) + <p, f_t(x, u)>`` the costates are

    p_L = grad Phi(x_L),     p_t = grad_x H_t(x_t, u_t, p_{t+1}),

and ``dJ/du_t = grad_u H_t(x_t, u_t, p_{t+1})``, so that an unconstrained optimum has
``grad_u H_t = 0`` at every step. Where a box bounds the controls, ``-grad_u H_t`` lies in its
normal cone instead: ``u_t = proj(u_t - grad_u H_t)``.

Sign. This is the minimisation sign: the costate is the gradient of the cost to go and the control
minimises ``H``. Pontryagin's *maximum* principle is the same statement with ``p -> -p`` and
``H -> -H``. In discrete time ``grad_u H_t = 0`` is necessary, but ``u_t`` need not minimise ``H_t``
unless more is assumed (convexity of the reachable sets); the two are separate statements.

Shapes. ``x_t`` is any tensor and may change shape from step to step; ``u_t`` is ``(m_t,)``, shared
by the batch, or ``(batch, m_t)``, one per example, where the state has a batch axis before its own;
``m_t`` may be 0; ``p_t`` is shaped as ``x_t``.

Source: Bryson & Ho, *Applied Optimal Control*, 1975, section 2.2; Li, Chen, Tai & E, JMLR 18(165),
2018, equations (8) to (10).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.box import Box, Controls
from deltacontrol.theory.control.dynamics import Dynamics, zeros
from deltacontrol.theory.control.work import count
from deltacontrol.theory.display import html_table, text_table
from deltacontrol.theory.errors import InputError

__all__ = ["Box", "ControlProblem", "Controls", "Cost", "Dynamics", "Evaluation", "Residual"]


class Cost(ABC):
    """A running cost ``l_t`` and a terminal cost ``Phi``, both averaged over the batch."""

    def running(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """The running cost ``l_t(x, u)``, a scalar; zero unless a subclass says otherwise."""
        return u.new_zeros(())

    def all_running(self, x: Tensor, u: Tensor) -> Tensor | None:
        """``l_t(x_t, u_t)`` of all steps at once, ``(horizon,)``, or None where not offered.

        Arguments are those of `Dynamics.all_steps`. Each value is a mean over the examples.
        """
        return u.new_zeros(len(u)) if type(self).running is Cost.running else None

    @abstractmethod
    def terminal(self, x: Tensor) -> Tensor:
        """The terminal cost ``Phi(x_L)``, a scalar."""


@dataclass(frozen=True)
class Residual:
    """How far the stationarity condition ``grad_u H_t = 0`` is from holding.

    Attributes:
        per_step: ``||grad_u H_t||_2`` for each step, or ``||u_t - proj(u_t - grad_u H_t)||_2``
            with a box.
        norm: ``(sum_t per_step_t^2)^(1/2)``; without a box the norm of the gradient of ``J``.
    """

    per_step: tuple[float, ...]
    norm: float

    @classmethod
    def of(cls, gradient: Controls) -> Residual:
        """The residual of a tuple of gradients ``grad_u H_t``."""
        norms = [torch.linalg.vector_norm(g.detach().double()) for g in gradient]
        per_step = tuple(torch.stack(norms).tolist()) if norms else ()
        return cls(per_step, math.hypot(*per_step))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Everything that one forward rollout and one backward sweep give."""

    states: list[Tensor]
    costates: list[Tensor]
    objective: Tensor
    gradient: Controls


@typed
@dataclass(frozen=True, eq=False, repr=False)
class ControlProblem:
    """Minimise ``J(u) = Phi(x_L) + sum_t l_t(x_t, u_t)`` along ``x_{t+1} = f_t(x_t, u_t)``.

    Attributes:
        dynamics: the steps ``f_t``.
        cost: the running and the terminal cost.
        x0: the initial state; integer tensors (token numbers) are allowed and get zero costates.
        box: bounds on the controls, or None.
    """

    dynamics: Dynamics
    cost: Cost
    x0: Tensor
    box: Box | None = None

    def __post_init__(self) -> None:
        """Check that each step has a control size."""
        horizon, sizes = self.dynamics.horizon, self.dynamics.control_sizes
        if len(sizes) != horizon:
            raise InputError(
                f"the dynamics have horizon {horizon} but {len(sizes)} control sizes; "
                "control_sizes needs one entry per step"
            )

    def _rows(self) -> dict[str, str]:
        sizes, box = self.dynamics.control_sizes, self.box
        bounds = "none"
        if box is not None:
            low, high = (
                f"{bound:g}" if isinstance(bound, int | float) else "one bound a step"
                for bound in (box.low, box.high)
            )
            bounds = f"[{low}, {high}]"
        return {
            "dynamics": f"{type(self.dynamics).__name__}, horizon {self.dynamics.horizon}",
            "initial state": f"{tuple(self.x0.shape)} {str(self.x0.dtype).removeprefix('torch.')}",
            "controls": f"{sum(sizes)} in {sum(m > 0 for m in sizes)} of {len(sizes)} steps",
            "cost": type(self.cost).__name__,
            "box": bounds,
        }

    def __repr__(self) -> str:
        """Dynamics, horizon, state, number of controls, cost and box, one a line."""
        return text_table("ControlProblem", self._rows())

    def _repr_html_(self) -> str:
        """The same as a table."""
        return html_table("ControlProblem", self._rows())

    def zero_controls(
        self, *, per_example: bool = False, dtype: torch.dtype | None = None
    ) -> Controls:
        """Zero controls on the device of ``x0``.

        Args:
            per_example: give shapes ``(batch, m_t)`` instead of ``(m_t,)``.
            dtype: by default that of ``x0``, or torch's default where ``x0`` holds integers.

        Raises:
            InputError: if controls per example are asked for and ``x0`` has no batch axis.
        """
        if per_example and self.x0.ndim < 2:
            raise InputError(
                f"the initial state has shape {tuple(self.x0.shape)}, without a batch axis; "
                "controls per example need a state (batch, n); take shared controls"
            )
        lead = self.x0.shape[:1] if per_example else ()
        return zeros(self.dynamics.control_sizes, lead, self.x0, dtype)

    def initial_controls(self) -> Controls:
        """Where a solver starts if it is not told: `Dynamics.initial_controls`."""
        return self.dynamics.initial_controls(self.x0)

    def check_controls(self, u: Controls) -> None:
        """Check the number, the shapes and the dtypes of the controls.

        Raises:
            InputError: naming the step, the shape that was given and the one expected.
        """
        sizes = self.dynamics.control_sizes
        if not isinstance(u, list | tuple) or not all(isinstance(u_t, Tensor) for u_t in u):
            raise InputError(
                f"the controls are {type(u).__name__}; expected a tuple of tensors, one a step, as "
                "ControlProblem.initial_controls() gives it"
            )
        if len(u) != len(sizes):
            raise InputError(f"expected {len(sizes)} controls, one per step, but got {len(u)}")
        for t, (u_t, m) in enumerate(zip(u, sizes, strict=True)):
            shared = u_t.shape == (m,)
            batched = self.x0.ndim > 1
            per_example = batched and u_t.shape == (self.x0.shape[0], m)
            if not (shared or per_example):
                given = f"control at step {t} has shape {tuple(u_t.shape)}"
                if not batched:
                    raise InputError(
                        f"{given} but the initial state has shape {tuple(self.x0.shape)}, without "
                        f"a batch axis; expected {(m,)}; controls per example need a state "
                        "(batch, n)"
                    )
                raise InputError(
                    f"{given}; expected {(m,)}, shared by the batch, or "
                    f"{(self.x0.shape[0], m)}, one per example"
                )
            if not u_t.is_floating_point() or u_t.is_meta:
                found = "lies on meta, without values" if u_t.is_meta else f"has dtype {u_t.dtype}"
                raise InputError(f"control at step {t} {found}; expected floats")
            if self.x0.is_floating_point() and u_t.dtype != self.x0.dtype:
                raise InputError(
                    f"control at step {t} has dtype {u_t.dtype} and the initial state "
                    f"{self.x0.dtype}; give both one dtype"
                )

    def rollout(self, u: Controls) -> list[Tensor]:
        """The states ``x_0, ..., x_L`` (a list of length ``horizon + 1``)."""
        self.check_controls(u)
        count(len(u))
        states = [self.x0]
        for t, u_t in enumerate(u):
            with _located(t, states[-1], u_t):
                states.append(self.dynamics.step(t, states[-1], u_t))
        return states

    def total_cost(self, states: Sequence[Tensor], u: Controls) -> Tensor:
        """``Phi(x_L) + sum_t l_t(x_t, u_t)`` of states that are already known."""
        total = self.cost.terminal(states[-1])
        for t, u_t in enumerate(u):
            total = total + self.cost.running(t, states[t], u_t)
        return total

    def objective(self, u: Controls) -> Tensor:
        """``J(u)``, a scalar that automatic differentiation can follow."""
        return self.total_cost(self.rollout(u), u)

    def hamiltonian(self, t: int, x: Tensor, u: Tensor, p_next: Tensor) -> Tensor:
        """``H_t(x, u, p) = l_t(x, u) + <p, f_t(x, u)>``, a scalar.

        Raises:
            InputError: if ``p_next`` has not the shape of the next state.
        """
        with _located(t, x, u):
            x_next = self.dynamics.step(t, x, u)
        if x_next.shape != p_next.shape:
            raise InputError(
                f"costate p_{t + 1} has shape {tuple(p_next.shape)} but step {t} gives a state of "
                f"shape {tuple(x_next.shape)}; a costate has the shape of its state"
            )
        return self.cost.running(t, x, u) + (p_next * x_next).sum()

    def adjoint(self, states: Sequence[Tensor], u: Controls) -> tuple[list[Tensor], Controls]:
        """One backward sweep: the costates ``p_0..p_L`` and the gradients ``grad_u H_t``.

        Each step is evaluated once more and differentiated alone, so that no graph outlives its
        step: the memory is that of the states. A step that ignores its state or its control gives
        zeros, and so does a state that holds integers.

        Args:
            states: ``x_0..x_L`` as `rollout` gives them.
            u: the controls that produced the states.

        Raises:
            InputError: if the number of states or of controls does not fit the horizon.
        """
        self.check_controls(u)
        if len(states) != len(u) + 1:
            raise InputError(f"expected {len(u) + 1} states, x_0 to x_L, but got {len(states)}")
        count(len(u))
        with torch.enable_grad():
            x = _leaf(states[-1])
            (p,) = _gradients(self.cost.terminal(x), (x,))
            costates, gradient = [p], []
            for t in reversed(range(len(u))):
                x, u_t = _leaf(states[t]), _leaf(u[t])
                p, g = _gradients(self.hamiltonian(t, x, u_t, p), (x, u_t))
                costates.append(p)
                gradient.append(g)
        return costates[::-1], tuple(gradient[::-1])

    def evaluate(self, u: Controls) -> Evaluation:
        """States, costates, objective and gradient: one rollout and one backward sweep."""
        with torch.no_grad():
            states = self.rollout(u)
            objective = self.total_cost(states, u)
        costates, gradient = self.adjoint(states, u)
        return Evaluation(states, costates, objective, gradient)

    def costates(self, states: Sequence[Tensor], u: Controls) -> list[Tensor]:
        """``p_L = grad Phi(x_L)`` and ``p_t = grad_x H_t(x_t, u_t, p_{t+1})``, as ``p_0..p_L``."""
        return self.adjoint(states, u)[0]

    def gradient(self, u: Controls) -> Controls:
        """``dJ/du_t = grad_u H_t(x_t, u_t, p_{t+1})``, by costates rather than one large graph."""
        return self.evaluate(u).gradient

    def residual(self, u: Controls) -> Residual:
        """The stationarity residual ``||grad_u H_t||_2`` of each step and in total."""
        return self.residual_of(u, self.gradient(u))

    def residual_of(self, u: Controls, gradient: Controls) -> Residual:
        """The residual where the gradient is known; with a box that of the projected gradient."""
        if self.box is None:
            return Residual.of(gradient)
        moved = self.box.project(tuple(a - g for a, g in zip(u, gradient, strict=True)))
        return Residual.of(tuple(a - b for a, b in zip(u, moved, strict=True)))


def _leaf(x: Tensor) -> Tensor:
    x = x.detach()
    return x.requires_grad_() if x.is_floating_point() else x


def _gradients(value: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of a scalar; zero where it ignores an input or the input holds integers."""
    wanted = [x for x in inputs if x.requires_grad]
    found: dict[int, Tensor | None] = {}
    if value.requires_grad and wanted:
        grads = torch.autograd.grad(value, wanted, allow_unused=True)
        found = {id(x): g for x, g in zip(wanted, grads, strict=True)}
    result = []
    for x in inputs:
        g = found.get(id(x))
        if g is None:
            g = torch.zeros_like(x, dtype=x.dtype if x.is_floating_point() else value.dtype)
        result.append(g.detach())
    return result


@contextmanager
def _located(t: int, x: Tensor, u: Tensor) -> Iterator[None]:
    """Say at which step, and with which shapes, a step failed."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if x.is_floating_point() and x.dtype != u.dtype and isinstance(error, RuntimeError):
            raise InputError(
                f"step {t} has a state of {x.dtype} and a control of {u.dtype}; give both one dtype"
            ) from error
        error.add_note(f"in step {t}, state {tuple(x.shape)}, control {tuple(u.shape)}")
        raise
