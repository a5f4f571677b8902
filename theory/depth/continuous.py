"""A layered system in continuous depth, and its discretisations.

A step that keeps the shape of the state is one Euler step, of size 1, of the differential equation

    x'(s) = F(s, x(s), u(s)),   0 <= s <= L,      F(t, x, u) = f_t(x, u) - x   at s = t = 0..L-1.

Between the layers, at ``s = t + w`` with ``0 <= w < 1``, the interpolation of the weights says

    constant    F(s, x, v) = f_t(x, v) - x
    linear      F(s, x, v) = (1-w) f_t(x, v) + w f_{t+1}(x, v) - x

which interpolates the vector fields, for the weights of a general step are not known. A system with
a method `step_between` (`DepthInterpolation`) interpolates its weights themselves instead; the
two differ where a step is not affine in its weights. The controls are held or interpolated in the
same way: ``u(s) = u_t``, or ``u(s) = (1-w) u_t + w u_{t+1}``. After ``s = L-1`` the last layer goes
on. All linear choices need controls of one size. So Euler steps of size 1 are the layered system in
every case, and the controls remain the tuple ``u_0..u_{L-1}``.

With ``J = Phi(x(L)) + int_0^L l(s, x, u) ds``, ``l(s, ., .) = l_t`` for ``t <= s < t+1``, and
``H(s, x, u, p) = l + <p, F>``,

    p(L) = grad Phi(x(L)),     p'(s) = -grad_x H,
    dJ/du_t = int grad_v H(s, x, u(s), p) du(s)/du_t ds.

`ContinuousDepth.evaluate` integrates both equations with the Dormand-Prince pair of order 5(4), one
layer at a time since ``F`` may jump where one ends; the backward integration begins each layer at
the state that the forward one stored. `ContinuousDepth.refine` gives the system of ``factor L``
steps of size ``1/factor``, whose states, objective, costates and gradients tend to these at the
order of the method: 1 for Euler, 2 for the midpoint rule.

Source: Pontryagin et al., *The Mathematical Theory of Optimal Processes*, 1962, theorem 1, with the
sign of `deltacontrol.theory.control.problem`; Chen, Rubanova, Bettencourt & Duvenaud, NeurIPS 2018,
equations (3) to (5); Hairer, Norsett & Wanner, *Solving Ordinary Differential Equations I*, 1993,
section II.1 and table II.5.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.problem import ControlProblem, Controls, Cost, Dynamics, Evaluation
from deltacontrol.theory.depth.integration import integrate
from deltacontrol.theory.errors import InputError, unknown

__all__ = ["ContinuousDepth", "DepthInterpolation", "RefinedDynamics"]

Interpolation = Literal["constant", "linear"]
Method = Literal["euler", "midpoint"]


@runtime_checkable
class DepthInterpolation(Protocol):
    """A system that can interpolate its weights between two layers, as `ResidualNetwork` can.

    A `Segment` of one hides that, and has its fields interpolated.
    """

    def step_between(self, t: int, weight: float, x: Tensor, u: Tensor) -> Tensor:
        """The step with ``(1 - weight)`` times the weights of ``t`` and ``weight`` those of t+1."""
        ...


@typed
@dataclass(frozen=True, eq=False)
class ContinuousDepth:
    """The differential equation ``x' = F(s, x, u(s))`` of a layered system.

    Attributes:
        dynamics: the layers; each must keep the shape of the state.
        weights: how the layers are interpolated, ``"constant"`` or ``"linear"``.
        controls: how the controls are.
        rtol: relative tolerance of a step of the integration.
        atol: absolute tolerance. The defaults need float64.
        max_steps: steps of the integration of one layer at most. A stiff layer needs about
            ``|lambda| / 3`` of them, ``lambda`` the eigenvalue of its Jacobian of largest modulus.
        progress: show how far the integration is.

    Raises:
        InputError: for an unknown interpolation, or a linear one where control sizes differ.

    Example:
        ``x' = u x`` with ``u = 1``, then ``u = -2``, hence ``x(2) = x_0 / e``:

        >>> class Growth(Dynamics):
        ...     horizon, control_sizes = 2, (1, 1)
        ...
        ...     def step(self, t, x, u):
        ...         return x + u * x
        >>> x0 = torch.ones(1, dtype=torch.float64)
        >>> states = ContinuousDepth(Growth()).rollout(x0, (x0, -2 * x0))
        >>> round(float(states[-1]), 9)
        0.367879441
    """

    dynamics: Dynamics
    weights: Interpolation = "constant"
    controls: Interpolation = "constant"
    rtol: float = 1e-10
    atol: float = 1e-12
    max_steps: int = 10_000
    progress: bool = False

    def __post_init__(self) -> None:
        """Check the choices and what they need."""
        if not (0 < self.rtol < 1 and 0 < self.atol < math.inf) or self.max_steps < 1:
            raise InputError(
                f"rtol is {self.rtol:g}, atol {self.atol:g} and max_steps {self.max_steps}; "
                "expected 0 < rtol < 1, a finite atol > 0 and at least one step"
            )
        for choice in (self.weights, self.controls):
            if choice not in get_args(Interpolation):
                raise unknown("interpolation", choice, get_args(Interpolation))
        sizes = self.dynamics.control_sizes
        if "linear" in (self.weights, self.controls) and len(set(sizes)) > 1:
            raise InputError(
                f"linear interpolation needs controls of one size, but the sizes are {sizes}; "
                "use weights='constant' and controls='constant'"
            )

    @property
    def horizon(self) -> int:
        """``L``, the number of layers and the length of the depth."""
        return self.dynamics.horizon

    def field(self, s: float, x: Tensor, v: Tensor) -> Tensor:
        """``F(s, x, v)``; where a layer ends, that of the next one.

        Args:
            s: the depth, ``0 <= s <= L``.
            x: the state.
            v: the control at this depth, of the size of ``u_t``.

        Raises:
            InputError: if the step does not keep the shape of the state.
        """
        t, w = self._layer(s)
        return self._field(t, w, x, v)

    def control(self, s: float, u: Controls) -> Tensor:
        """``u(s)``; where a layer ends, that of the next one."""
        t, w = self._layer(s)
        return self._control(t, w, u[t], u[self._next(t)])

    def rollout(self, x0: Tensor, u: Controls) -> list[Tensor]:
        """The states ``x(0), x(1), ..., x(L)``.

        Raises:
            InputError: as `evaluate`.
        """
        return self._forward(_NoCost(), x0, u)[0]

    def objective(self, cost: Cost, x0: Tensor, u: Controls) -> Tensor:
        """``J = Phi(x(L)) + int_0^L l ds``, of the forward integration alone.

        Raises:
            InputError: as `evaluate`.
        """
        states, running = self._forward(cost, x0, u)
        with torch.no_grad():
            return cost.terminal(states[-1]) + running

    def evaluate(self, cost: Cost, x0: Tensor, u: Controls) -> Evaluation:
        """States and costates at ``s = 0, 1, ..., L``, ``J`` and ``dJ/du_t``.

        Args:
            cost: ``l_t``, integrated over the depth, and ``Phi``.
            x0: the initial state, of floats.
            u: ``u_0..u_{L-1}``, each ``(m_t,)`` or ``(batch, m_t)``.

        Raises:
            InputError: if the controls do not fit, a step does not keep the shape of the state, or
                the integration cannot meet the tolerances.
        """
        states, running = self._forward(cost, x0, u)
        gradient = [torch.zeros_like(u_t) for u_t in u]
        with torch.enable_grad():
            x = states[-1].detach().requires_grad_()
            terminal = cost.terminal(x)
            p = torch.zeros_like(x)
            if terminal.requires_grad:
                (p,) = torch.autograd.grad(terminal, x, allow_unused=True, materialize_grads=True)
        costates = [p]
        for t in reversed(range(self.horizon)):
            a, b = u[t].detach(), u[self._next(t)].detach()
            zeros = (torch.zeros_like(a), torch.zeros_like(b))

            def adjoint(s: Tensor, y: Any, t: int = t, a: Tensor = a, b: Tensor = b) -> Any:
                return self._adjoint(cost, t, float(s) - t, y[0], y[1], a, b)

            y = integrate(adjoint, t + 1.0, float(t), (states[t + 1], p, *zeros), t, self)
            p = y[1]
            gradient[t] += y[2]
            gradient[self._next(t)] += y[3]
            costates.append(p)
        objective = terminal.detach() + running
        return Evaluation(states, costates[::-1], objective, tuple(gradient))

    def refine(self, factor: int, method: Method = "euler") -> RefinedDynamics:
        """The system of ``factor L`` steps of size ``1/factor``.

        Args:
            factor: steps for each layer, at least 1.
            method: ``"euler"``, of order 1, or ``"midpoint"``, of order 2.

        Raises:
            InputError: for a factor below 1 or an unknown method.
        """
        return RefinedDynamics(self, factor, method)

    def _forward(self, cost: Cost, x0: Tensor, u: Controls) -> tuple[list[Tensor], Tensor]:
        """The states at the ends of the layers, and the integral of the running cost."""
        ControlProblem(self.dynamics, cost, x0).check_controls(u)
        if not x0.is_floating_point():
            raise InputError(
                f"the initial state has dtype {x0.dtype}; a differential equation needs floats: "
                "take the Segment of the layers that map hidden states to hidden states"
            )
        states, running = [x0.detach()], x0.new_zeros(())
        for t in range(self.horizon):
            a, b = u[t].detach(), u[self._next(t)].detach()

            def flow(s: Tensor, y: Any, t: int = t, a: Tensor = a, b: Tensor = b) -> Any:
                w = float(s) - t
                v = self._control(t, w, a, b)
                return self._field(t, w, y[0], v), cost.running(t, y[0], v).to(y[1])

            with torch.no_grad():
                x, running = integrate(flow, float(t), t + 1.0, (states[-1], running), t, self)
            states.append(x)
        return states, running

    def _adjoint(
        self, cost: Cost, t: int, w: float, x: Tensor, p: Tensor, a: Tensor, b: Tensor
    ) -> tuple[Tensor, ...]:
        """``x'``, ``p'``, and minus the integrands of the gradients in ``u_t`` and ``u_{t+1}``.

        Minus, for the integration runs from ``t+1`` down to ``t``.
        """
        with torch.enable_grad():
            x, a, b = (z.detach().requires_grad_() for z in (x, a, b))
            v = self._control(t, w, a, b)
            slope = self._field(t, w, x, v)
            hamiltonian = cost.running(t, x, v) + (p * slope).sum()
            grads = torch.autograd.grad(
                hamiltonian, (x, a, b), allow_unused=True, materialize_grads=True
            )
        return (slope.detach(), *(-g for g in grads))

    def _layer(self, s: float) -> tuple[int, float]:
        if not 0 <= s <= self.horizon:
            raise InputError(f"depth {s} is outside of [0, {self.horizon}]")
        t = min(int(s), self.horizon - 1)
        return t, s - t

    def _next(self, t: int) -> int:
        return min(t + 1, self.horizon - 1)

    def _control(self, t: int, w: float, a: Tensor, b: Tensor) -> Tensor:
        return a if self.controls == "constant" else (1 - w) * a + w * b

    def _field(self, t: int, w: float, x: Tensor, v: Tensor) -> Tensor:
        if self.weights == "constant" or w == 0 or t == self.horizon - 1:
            return self._step(t, x, v) - x
        if isinstance(self.dynamics, DepthInterpolation):
            return self.dynamics.step_between(t, w, x, v) - x
        return (1 - w) * self._step(t, x, v) + w * self._step(t + 1, x, v) - x

    def _step(self, t: int, x: Tensor, v: Tensor) -> Tensor:
        y = self.dynamics.step(t, x, v)
        if y.shape != x.shape or not x.is_floating_point():
            raise InputError(
                f"step {t} maps a state of shape {tuple(x.shape)} ({x.dtype}) to "
                f"{tuple(y.shape)}; continuous depth needs steps that keep the shape of a "
                "floating-point state: take the Segment of those that do"
            )
        return y


@typed
@dataclass(frozen=True, eq=False)
class RefinedDynamics(Dynamics):
    """``x_{k+1} = x_k + h F(s, y, u_k)``, ``h = 1/factor``, ``k = 0..factor L - 1``.

    Euler has ``s = s_k = k h`` and ``y = x_k``; the midpoint rule has ``s = s_k + h/2`` and
    ``y = x_k + h/2 F(s_k, x_k, u_k)``. Each step has a control of its own; `lift` makes them from
    one a layer, and `restrict` takes gradients back.

    Attributes:
        depth: the differential equation.
        factor: steps for each layer.
        method: ``"euler"`` or ``"midpoint"``.

    Raises:
        InputError: for a factor below 1 or an unknown method.
    """

    depth: ContinuousDepth
    factor: int
    method: Method = "euler"

    def __post_init__(self) -> None:
        """Check the factor and the method."""
        if self.factor < 1:
            raise InputError(f"factor = {self.factor}; a layer needs at least one step")
        if self.method not in get_args(Method):
            raise unknown("method", self.method, get_args(Method))

    @property
    def horizon(self) -> int:
        """``factor L``."""
        return self.factor * self.depth.horizon

    @property
    def control_sizes(self) -> tuple[int, ...]:
        """``m_t``, ``factor`` times each."""
        return tuple(m for m in self.depth.dynamics.control_sizes for _ in range(self.factor))

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """``x + h F(s, y, u)``."""
        layer, weight = self._place(t)
        return x + self.depth._field(layer, weight, self.stage(t, x, u), u) / self.factor

    def initial_controls(self, x0: Tensor) -> Controls:
        """Those of the layers, lifted."""
        return self.lift(self.depth.dynamics.initial_controls(x0))

    def stage(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """The state ``y`` at which step ``t`` evaluates the field and the running cost."""
        if self.method == "euler":
            return x
        layer, j = divmod(t, self.factor)
        return x + self.depth._field(layer, j / self.factor, x, u) / (2 * self.factor)

    def cost(self, cost: Cost) -> Cost:
        """``h l_t(y, u)`` for each step of layer ``t``, and the same terminal cost."""
        return _RefinedCost(self, cost)

    def lift(self, u: Controls) -> Controls:
        """The controls of the steps, ``u(s)`` of the layers' controls ``u_0..u_{L-1}``."""
        places = (self._place(k) for k in range(self.horizon))
        return tuple(self.depth._control(t, w, u[t], u[self.depth._next(t)]) for t, w in places)

    def restrict(self, gradient: Controls) -> Controls:
        """The transpose of `lift`: gradients in ``u_0..u_{L-1}`` from those in the steps' controls.

        Raises:
            InputError: if there is not one gradient for each step.
        """
        if len(gradient) != self.horizon:
            raise InputError(f"expected {self.horizon} gradients, one a step, got {len(gradient)}")
        total = [torch.zeros_like(g) for g in gradient[:: self.factor]]
        for k, g in enumerate(gradient):
            t, w = self._place(k)
            w = 0.0 if self.depth.controls == "constant" else w
            total[t] += (1 - w) * g
            total[self.depth._next(t)] += w * g
        return tuple(total)

    def _place(self, k: int) -> tuple[int, float]:
        """The layer of a step, and how far into it the step evaluates the field."""
        t, j = divmod(k, self.factor)
        return t, (j if self.method == "euler" else j + 0.5) / self.factor


@dataclass(frozen=True, eq=False)
class _RefinedCost(Cost):
    """The rule of the steps, applied to the integral of the running cost."""

    refined: RefinedDynamics
    cost: Cost

    def running(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        y = self.refined.stage(t, x, u)
        factor = self.refined.factor
        return self.cost.running(t // factor, y, u) / factor

    def terminal(self, x: Tensor) -> Tensor:
        return self.cost.terminal(x)


class _NoCost(Cost):
    def terminal(self, x: Tensor) -> Tensor:
        return x.new_zeros(())
