"""The first-order model of a rollout, matrix-free.

Around a trajectory ``x_{t+1} = f_t(x_t, u_t)`` it is the time-varying linear system

    dx_{t+1} = A_t dx_t + B_t du_t,   A_t = d f_t/dx,   B_t = d f_t/du   at (x_t, u_t),

whose adjoint runs backward: ``q_t = A_t' q_{t+1} + s_t`` and the part of the control is
``B_t' q_{t+1}``. With the sources ``s_t = grad_x l_t`` and ``q_L = grad Phi`` the ``q_t`` are the
costates. `Linearisation` is the operator ``C`` from all controls to the last state, ``dx_L = C du``
with ``dx_0 = 0``. A product costs one forward-mode, one with its adjoint one reverse-mode
derivative of each step, and neither forms a matrix, so a state may have 10^5 entries. `tangent` and
`adjoint` give the states and costates between as well.

Shapes are those of `deltacontrol.theory.control.problem`: a control without a batch axis is shared,
so that ``B_t'`` sums over the batch; integer states have no perturbation, theirs are zero.

Source: Bryson & Ho, *Applied Optimal Control*, 1975, section 2.2 and appendix A4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.checks import require_control
from deltacontrol.theory.control.problem import ControlProblem, Controls, Dynamics
from deltacontrol.theory.control.work import count
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.operator import LinearOperator, flatten, mapped, unflatten
from deltacontrol.theory.linear.step_graph import StepGraph, differentiable_attention

__all__ = ["Linearisation", "StateTransition", "differentiable_attention"]


@typed
@dataclass(frozen=True, eq=False, repr=False)
class Linearisation(LinearOperator):
    """The linear system ``dx_{t+1} = A_t dx_t + B_t du_t`` along a trajectory.

    As an operator it takes the flat controls ``(sum_t m_t,)`` to the flat last state. The rows of a
    block advance together, so that each step is evaluated once for all of them.

    Attributes:
        dynamics: the steps ``f_t``.
        states: ``x_0..x_L``, as a rollout gives them.
        controls: the controls that produced the states.
        keep: keep the graph of each step from its first product on. It costs the memory of one
            training step where only adjoints are taken and about twice that with tangents; it saves
            the evaluation of the step in each later product, most of its time.

    Raises:
        InputError: if the numbers of states and controls do not fit the horizon, if a control has
            another size than the dynamics say, or, from the first product on, if a step takes its
            state to another shape than that of the next state.
    """

    dynamics: Dynamics
    states: Sequence[Tensor]
    controls: Controls
    keep: bool = False
    _graphs: dict[int, StepGraph] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the lengths and the dtypes."""
        horizon = self.dynamics.horizon
        if len(self.states) != horizon + 1 or len(self.controls) != horizon:
            raise InputError(
                f"expected {horizon + 1} states and {horizon} controls, but got "
                f"{len(self.states)} and {len(self.controls)}"
            )
        for t, (x, u) in enumerate(zip(self.states, self.controls, strict=False)):
            if not u.is_floating_point() or (x.is_floating_point() and x.dtype != u.dtype):
                raise InputError(
                    f"step {t} has a state of {x.dtype} and a control of {u.dtype}; expected one "
                    "float dtype for both"
                )
            require_control(self.dynamics.control_sizes, t, x, u)
        last, entries = self.states[-1], sum(u.numel() for u in self.controls)
        super().__init__((last.numel(), entries), last.dtype, last.device)

    @classmethod
    def of(cls, problem: ControlProblem, u: Controls, *, keep: bool = False) -> Linearisation:
        """Roll the problem out under ``u`` and linearise there."""
        u = tuple(control.detach() for control in u)
        with torch.no_grad(), differentiable_attention():
            return cls(problem.dynamics, problem.rollout(u), u, keep)

    @property
    def horizon(self) -> int:
        """The number of steps."""
        return self.dynamics.horizon

    def tangent(self, du: Controls, dx0: Tensor | None = None) -> list[Tensor]:
        """``dx_0, ..., dx_L`` that the perturbations ``du`` and ``dx0`` cause.

        Args:
            du: perturbations of the controls, of their shapes.
            dx0: perturbation of the initial state; zero by default.
        """
        x0 = self.states[0]
        dx = _zeros_like(x0, self.states[-1].dtype) if dx0 is None else dx0
        result = [dx]
        for t in range(self.horizon):
            dx = self.tangent_step(t, dx, du[t])
            result.append(dx)
        return result

    def tangent_step(self, t: int, dx: Tensor, du: Tensor) -> Tensor:
        """``A_t dx + B_t du``."""
        count(1)
        if self.keep:
            return self._graph(t).tangent(dx, du)
        x, u = self.states[t].detach(), self.controls[t].detach()
        with differentiable_attention(), torch.no_grad():
            if x.is_floating_point():
                return _jvp(lambda x, u: self._step(t, x, u), (x, u), (dx, du))
            return _jvp(lambda u: self._step(t, x, u), (u,), (du,))

    def adjoint(
        self, terminal: Tensor, sources: Sequence[Tensor | None] | None = None
    ) -> tuple[list[Tensor], Controls]:
        """The adjoint sweep: ``q_0..q_L`` and ``B_t' q_{t+1}`` for each step.

        Args:
            terminal: ``q_L``, of the shape of the last state.
            sources: ``s_0..s_{L-1}``, each of the shape of its state or None for zero.
        """
        q, costates, controls = terminal, [terminal], []
        for t in reversed(range(self.horizon)):
            q, g = self.adjoint_step(t, q)
            source = None if sources is None else sources[t]
            q = q if source is None else q + source
            costates.append(q)
            controls.append(g)
        return costates[::-1], tuple(controls[::-1])

    def adjoint_step(self, t: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """``A_t' q`` and ``B_t' q``."""
        count(1)
        return self._graph(t).adjoint(q)

    def _product(self, x: Tensor) -> Tensor:
        def last(du: Tensor) -> Tensor:
            return self.tangent(unflatten(du, self.controls))[-1].reshape(-1)

        return mapped(last, x, self.shape[0])

    def _transpose_product(self, y: Tensor) -> Tensor:
        def controls(q: Tensor) -> Tensor:
            return flatten(self.adjoint(q.reshape(self.states[-1].shape))[1])

        return mapped(controls, y, self.shape[1])

    @property
    def transition(self) -> StateTransition:
        """``A_{L-1} ... A_0``, from the first state to the last."""
        return StateTransition(self)

    def _step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        after, kept = self.dynamics.step(t, x, u), self.states[t + 1]
        if after.shape != kept.shape:
            raise InputError(
                f"step {t} takes its state {tuple(x.shape)} to one of shape {tuple(after.shape)}, "
                f"but the next state that was given has {tuple(kept.shape)}; expected the states "
                "of a rollout of these dynamics, or take Linearisation.of(problem, controls)"
            )
        return after

    def _graph(self, t: int) -> StepGraph:
        graph = self._graphs.get(t)
        if graph is None:
            graph = StepGraph(lambda x, u: self._step(t, x, u), self.states[t], self.controls[t])
            if self.keep:
                self._graphs[t] = graph
        return graph


class StateTransition(LinearOperator):
    """The state transition matrix ``Phi = A_{L-1} ... A_0``: ``dx_L = Phi dx_0``, flat.

    Raises:
        InputError: if the first state holds integers, which have no perturbation.
    """

    def __init__(self, linearisation: Linearisation) -> None:
        first, last = linearisation.states[0], linearisation.states[-1]
        if not first.is_floating_point():
            raise InputError(f"the first state holds {first.dtype}, which cannot be perturbed")
        super().__init__((last.numel(), first.numel()), last.dtype, last.device)
        self._linearisation = linearisation
        self._still = tuple(torch.zeros_like(u) for u in linearisation.controls)

    def _product(self, x: Tensor) -> Tensor:
        lin = self._linearisation

        def last(dx: Tensor) -> Tensor:
            return lin.tangent(self._still, dx.reshape(lin.states[0].shape))[-1].reshape(-1)

        return mapped(last, x, self.shape[0])

    def _transpose_product(self, y: Tensor) -> Tensor:
        lin = self._linearisation

        def first(q: Tensor) -> Tensor:
            return lin.adjoint(q.reshape(lin.states[-1].shape))[0][0].reshape(-1)

        return mapped(first, y, self.shape[1])


def _jvp(f: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor:
    return torch.func.jvp(f, at, along)[1]


def _zeros_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(x, dtype=x.dtype if x.is_floating_point() else dtype)
