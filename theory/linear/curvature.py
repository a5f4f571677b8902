"""Second-order models of the objective, matrix-free.

Around controls ``u`` with trajectory ``x`` and costates ``p`` the Hessian of ``J`` is

    d'(Hess J) d = sum_t (dx_t, d_t)' [Hess l_t + Hess_{x,u} <p_{t+1}, f_t>] (dx_t, d_t)
                   + dx_L' (Hess Phi) dx_L,          dx_{t+1} = A_t dx_t + B_t d_t,  dx_0 = 0.

Without the terms of the dynamics' own second derivatives it is the (generalised) Gauss-Newton
matrix ``G``: the curvature of the linear-quadratic model, positive semidefinite where the costs are
convex. Either is applied to ``v`` by a sweep forward, which gives ``dx``, and one backward: with
``c_t`` the bracket times ``(dx_t, v_t)``,

    q_L = Hess Phi dx_L,   q_t = A_t'q_{t+1} + c_t^x,   (G v)_t = B_t'q_{t+1} + c_t^u.

No Jacobian of a state is formed. Controls are one flat vector here, ``(sum_t m_t,)``, or ``(sum_t
batch m_t,)`` where each example has its own. Libraries of curvature operators, such as curvlinops,
take a model of parameters and data; here ``J`` has running costs, and one rollout serves all
products.

Source: Schraudolph, *Fast curvature matrix-vector products for second-order gradient descent*,
Neural Computation 14(7), 2002; Dunn & Bertsekas, *Efficient dynamic programming implementations of
Newton's method for unconstrained optimal control problems*, JOTA 63(1), 1989.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.problem import ControlProblem, Controls, Evaluation
from deltacontrol.theory.control.work import count
from deltacontrol.theory.linear.linearisation import Linearisation
from deltacontrol.theory.linear.operator import SymmetricOperator, by_rows, flatten, unflatten
from deltacontrol.theory.linear.step_graph import SecondDerivative, StepGraph

__all__ = ["Curvature", "GaussNewtonCurvature", "HessianCurvature"]


class Curvature(SymmetricOperator):
    """A symmetric operator on the flat controls.

    Args:
        problem: the problem.
        u: the controls to expand at.
        evaluation: what `ControlProblem.evaluate` gives there; computed where it is not given.
        keep: keep the graphs of all steps, the memory of two or three training steps, which saves
            most of the time of each product after the first.
    """

    def __init__(
        self,
        problem: ControlProblem,
        u: Controls,
        evaluation: Evaluation | None = None,
        *,
        keep: bool = True,
    ) -> None:
        now = problem.evaluate(u) if evaluation is None else evaluation
        self.problem, self.evaluation, self.keep = problem, now, keep
        self.controls = tuple(control.detach() for control in u)
        self.gradient = flatten(now.gradient)
        super().__init__(len(self.gradient), self.gradient.dtype, self.gradient.device)
        self._terminal: SecondDerivative | None = None

    def _product(self, x: Tensor) -> Tensor:
        def product(z: Tensor) -> Tensor:
            return flatten(self._of_controls(unflatten(z, self.controls)))

        return by_rows(product, x, self.shape[0])

    @abstractmethod
    def _of_controls(self, v: Controls) -> Controls:
        """The product with controls in their shapes."""

    def _terminal_product(self, dx: Tensor) -> Tensor:
        if self._terminal is None:
            terminal = SecondDerivative(self.problem.cost.terminal, [self.evaluation.states[-1]])
            if not self.keep:
                return terminal.curve([dx])[0]
            self._terminal = terminal
        return self._terminal.curve([dx])[0]


@typed
class GaussNewtonCurvature(Curvature):
    """``G``: the cost's Hessians seen through the linearised rollout."""

    def __init__(
        self,
        problem: ControlProblem,
        u: Controls,
        evaluation: Evaluation | None = None,
        *,
        keep: bool = True,
    ) -> None:
        super().__init__(problem, u, evaluation, keep=keep)
        states = self.evaluation.states
        self.linearisation = Linearisation(problem.dynamics, states, self.controls, keep)
        self._running: dict[int, SecondDerivative] = {}

    def _of_controls(self, v: Controls) -> Controls:
        dx = self.linearisation.tangent(v)
        parts = [self._running_product(t, dx[t], v_t) for t, v_t in enumerate(v)]
        _, pulled = self.linearisation.adjoint(
            self._terminal_product(dx[-1]), [in_x for in_x, _ in parts]
        )
        return tuple(a + in_u for a, (_, in_u) in zip(pulled, parts, strict=True))

    def _running_product(self, t: int, dx: Tensor, du: Tensor) -> list[Tensor]:
        cost = self._running.get(t)
        if cost is None:
            at = [self.evaluation.states[t], self.controls[t]]
            cost = SecondDerivative(lambda x, u: self.problem.cost.running(t, x, u), at)
            if self.keep:
                self._running[t] = cost
        return cost.curve([dx, du])


@typed
class HessianCurvature(Curvature):
    """The exact Hessian of ``J``: Gauss-Newton and the second derivatives of the dynamics."""

    def __init__(
        self,
        problem: ControlProblem,
        u: Controls,
        evaluation: Evaluation | None = None,
        *,
        keep: bool = True,
    ) -> None:
        super().__init__(problem, u, evaluation, keep=keep)
        self._graphs: dict[int, StepGraph] = {}

    def _of_controls(self, v: Controls) -> Controls:
        horizon, x0 = self.problem.dynamics.horizon, self.evaluation.states[0]
        count(3 * horizon)
        dx = torch.zeros_like(x0, dtype=x0.dtype if x0.is_floating_point() else v[0].dtype)
        parts = []
        for t in range(horizon):
            dx, *part = self._graph(t).curve(dx, v[t])
            parts.append(part)
        q, result = self._terminal_product(dx), []
        for t in reversed(range(horizon)):
            a, b = self._graph(t).adjoint(q)
            in_x, in_u = parts[t]
            q = a + in_x
            result.append(b + in_u)
        return tuple(result[::-1])

    def _graph(self, t: int) -> StepGraph:
        graph = self._graphs.get(t)
        if graph is None:
            now, problem = self.evaluation, self.problem
            graph = StepGraph(
                lambda x, u: problem.dynamics.step(t, x, u),
                now.states[t],
                self.controls[t],
                now.costates[t + 1],
                running=lambda x, u: problem.cost.running(t, x, u),
            )
            if self.keep:
                self._graphs[t] = graph
        return graph
