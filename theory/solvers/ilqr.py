"""Iterative LQR and differential dynamic programming, regularised, with a line search and boxes.

Each iteration models ``J`` to second order along the present trajectory
(`deltacontrol.theory.solvers.quadratic_model`), minimises the model by a Riccati sweep, and rolls
the law

    u_t <- proj(u_t + a k_t + K_t (x_t - old x_t))

out through the *nonlinear* dynamics. `ILQR` neglects second derivatives of the dynamics; near an
optimum ``u*`` its error is multiplied by ``I - G^-1 H``, with ``H`` the Hessian of ``J`` and ``G``
that of the model, so it converges linearly, and fast only where residuals or the curvature of the
dynamics are small. `DDP` keeps them and converges quadratically.

Regularisation. A path leads from Newton's model to a short gradient step: a slight damping, for an
optimum that is not isolated; then the Hessian of every stage is moved in parts towards its absolute
value, which bends directions of negative curvature upward and leaves the others alone; then
``Q_uu`` is damped as by Levenberg and Marquardt, ``mu`` growing. Newton's step is taken where the
model holds along it. Else an iteration starts one place below the last one and walks on as long as
``J`` after the rollout falls: derivatives cost more than sweeps, so that the sweeps choose. Damping
alone would have to exceed the most negative curvature in every direction; bending need not.

Line search. ``a = 1, 1/2, 1/4, 1/8`` until ``J(new) <= J + c a J'``, with ``J'`` the exact
derivative along the law (Armijo). Where the expected change is below the rounding of ``J`` its
values say nothing: a step is accepted there if ``J`` does not rise above that rounding and the
residual falls. So the residual reaches the rounding level of the *gradient*. Where the model has
no positive curvature along the law it bounds no step; steps ten times as long are tried then as
long as ``J`` falls, which leaves saddle points quickly and exposes a ``J`` without minimum. A bent
or damped model is too stiff, and there doubled steps are tried.

Controls per example are independent problems with one sweep, one place on the path and one step
size for all, since a cost gives only the sum over the examples.

Source: Li & Todorov, ICINCO 2004 (iLQR); Jacobson & Mayne, 1970 (DDP); Tassa, Mansard & Todorov,
ICRA 2014 (boxes); Dauphin et al., NeurIPS 2014 (absolute values of curvature).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltacontrol.theory.control.dynamics import offers
from deltacontrol.theory.control.problem import ControlProblem, Controls, Evaluation
from deltacontrol.theory.linear.curvature import Curvature, GaussNewtonCurvature, HessianCurvature
from deltacontrol.theory.linear.linearisation import differentiable_attention
from deltacontrol.theory.quadratic.derivatives import evaluate, num_groups, running_costs
from deltacontrol.theory.solvers.quadratic_model import (
    IndefiniteError,
    Policy,
    QuadraticModel,
    sweep,
)
from deltacontrol.theory.solvers.solving import Ending, Memory, Report, Solver, Status

__all__ = ["DDP", "ILQR"]

_ARMIJO = 1e-4
_SIZES = (1.0, 0.5, 0.25, 0.125)
_ABREAST = 4  # growing steps that are rolled out side by side

_PATH = (
    *((0.0, mu) for mu in (0.0, 1e-6, 1e-4, 1e-2)),
    *((s, 0.0) for s in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)),
    *((1.0, 4e-2 * 4.0**i) for i in range(26)),
)
"""Convexity and damping, from Newton's own model on."""

_NEWTON = range(4)
"""Places that are always tried first, and taken where the model foretells the change of ``J``."""


@dataclass(frozen=True)
class _SecondOrder(Solver):
    """What both methods share."""

    takes_box: ClassVar[bool] = True

    @property
    @abstractmethod
    def second_order(self) -> bool:
        """Whether second derivatives of the dynamics are kept."""

    def run(
        self, problem: ControlProblem, u0: Controls, report: Report, memory: Memory
    ) -> Ending | None:
        """Improve until `report` says stop or no regularisation helps."""
        u, (now, along) = u0, evaluate(problem, u0)
        level = int(memory["level"]) if memory else 0
        stop = report(u, now, {"level": torch.tensor(level)})
        while math.isfinite(float(now.objective)):
            model = QuadraticModel.of(problem, u, now, second_order=self.second_order, along=along)
            if not model.is_finite:
                return Ending(
                    Status.LINE_SEARCH_FAILED,
                    "J is finite, but its first or second derivatives are not",
                )
            search = _Search(problem, u, now, model)
            if stop:
                gains, convex = search.gains(level)
                return Ending(gains=gains, convex=convex)
            best = search.best(level)
            if best is None:
                return Ending(
                    Status.LINE_SEARCH_FAILED,
                    "no step lowers J or the residual, however regularised",
                    *search.gains(level),
                )
            u, (now, along) = best.controls, evaluate(problem, best.controls)
            level = search.next(best.level, -1)
            stop = report(u, now, {"level": torch.tensor(level)})
        return None


@dataclass(frozen=True)
class ILQR(_SecondOrder):
    """Iterative LQR: dynamics to first, costs to second order.

    Solves problems whose states, or whose batch of states where controls are shared, have up to a
    few thousand entries; it raises `InputError` beyond (then `GaussNewton`), and where examples
    with controls of their own interact.

    The gains are ``(m_t, n_t)`` of the flattened states; where a batch shares the controls ``n_t``
    counts the entries of all its states, and for controls per example they are ``(batch, m_t,
    n_t)``.

    Example:
        A linear-quadratic problem takes one iteration. ``J = 1/2 u^2 + 1/2 (1 + u)^2``:

        >>> from deltacontrol.theory import ControlProblem, LinearDynamics, QuadraticCost, solve
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> cost = QuadraticCost.constant(1, Q=0 * one, R=one, Qf=one)
        >>> problem = ControlProblem(LinearDynamics.constant(1, one, one), cost, x0=one[0])
        >>> solution = solve(problem, ILQR(), problem.zero_controls(), max_steps=9, tol=1e-12)
        >>> solution.iterations, round(solution.controls[0].item(), 12)
        (1, -0.5)
    """

    curvature: ClassVar[type[Curvature]] = GaussNewtonCurvature

    @property
    def second_order(self) -> bool:
        """No."""
        return False


@dataclass(frozen=True)
class DDP(_SecondOrder):
    """Differential dynamic programming: dynamics and costs to second order.

    Second derivatives of the dynamics are contracted with the costate, so that the unregularised
    step is Newton's on ``J``. Limits are those of `ILQR`.
    """

    curvature: ClassVar[type[Curvature]] = HessianCurvature

    @property
    def second_order(self) -> bool:
        """Yes."""
        return True


@dataclass(frozen=True, eq=False)
class _Trial:
    """Controls that a regularised step leads to.

    Attributes:
        level: the place in `_PATH`.
        controls: the new controls.
        value: ``J`` there.
        trusted: whether the model foretold at least half of the change, or the change is rounding.
    """

    level: int
    controls: Controls
    value: float
    trusted: bool


@dataclass(eq=False)
class _Search:
    """The choice of a step from one model."""

    problem: ControlProblem
    u: Controls
    now: Evaluation
    model: QuadraticModel

    def __post_init__(self) -> None:
        self.tried: dict[int, _Trial | None] = {}
        self.bounds: list[tuple[Tensor, Tensor]] | None = None
        if self.problem.box is not None:
            groups = num_groups(self.u)
            self.bounds = []
            for t, u in enumerate(self.u):
                low, high = self.problem.box.bounds(t, u)
                self.bounds.append(((low - u).view(groups, -1), (high - u).view(groups, -1)))

    def best(self, level: int) -> _Trial | None:
        """Newton's trial if the model holds there, else that of least ``J`` near ``level``."""
        for newton in _NEWTON:
            found = self.trial(newton)
            if found is not None and found.trusted:
                return found
        start, best = level, None
        while best is None and level < len(_PATH):
            best = self.trial(level)
            level = self.next(level, +1)
        if best is None:
            return None
        for direction in (+1, -1) if best.level == start else (+1,):
            while (level := self.next(best.level, direction)) != best.level:
                other = self.trial(level)
                if other is None or not other.value < best.value:
                    break
                best = other
        return best

    def next(self, level: int, direction: int) -> int:
        """The neighbouring place on the path, or ``level`` where the path ends."""
        place = level + direction
        while 0 < place < len(_PATH) and _PATH[place][1] == 0 and self.model.is_convex:
            place += direction  # there is nothing to bend
        return place if place >= 0 else level

    def trial(self, level: int) -> _Trial | None:
        """The longest acceptable step with this regularisation, or None; each is tried once."""
        if level >= len(_PATH):
            return None
        if level not in self.tried:
            self.tried[level] = self.attempt(level)
        return self.tried[level]

    def attempt(self, level: int) -> _Trial | None:
        """`trial`, computed."""
        convexity, damping = _PATH[level]
        try:
            policy = sweep(self.model, convexity=convexity, damping=damping, bounds=self.bounds)
        except IndefiniteError:
            return None
        slope, curvature = policy.slope, policy.curvature
        if not (slope < 0 and math.isfinite(curvature)):
            return None
        old, eps = float(self.now.objective), torch.finfo(self.now.objective.dtype).eps
        tried = self.rollouts(policy, _SIZES)
        for size, (controls, value, magnitude) in zip(_SIZES, tried, strict=False):
            noise = 8 * eps * magnitude
            if -size * slope <= noise:
                fine = value <= old + noise and self.residual(controls) < self.residual(self.u)
                return _Trial(level, controls, value, trusted=True) if fine else None
            if value <= old + _ARMIJO * size * slope:
                if size == 1.0 and (curvature <= 0 or level not in _NEWTON):
                    factor = 10.0 if curvature <= 0 else 2.0
                    controls, value = self.extend(policy, controls, value, factor)
                expected = size * slope + 0.5 * size**2 * curvature
                return _Trial(level, controls, value, trusted=value - old <= 0.5 * expected < 0)
        return None

    def extend(
        self, policy: Policy, controls: Controls, value: float, factor: float
    ) -> tuple[Controls, float]:
        """Steps that grow by the factor, as long as ``J`` falls."""
        sizes = [factor**i for i in range(1, 17)]
        for start in range(0, len(sizes), _ABREAST):
            for further, new, _ in self.rollouts(policy, sizes[start : start + _ABREAST]):
                if not -math.inf < new < value:
                    return controls, value
                controls, value = further, new
        return controls, value

    def rollouts(
        self, policy: Policy, sizes: Sequence[float]
    ) -> Iterator[tuple[Controls, float, float]]:
        """For each size the controls under the law, ``J``, and the sum of its terms' magnitudes.

        Where the system takes rows, all sizes are rolled out side by side, each as examples of its
        own; else one after another, as they are asked for.
        """
        x0, rows = self.problem.x0, self.now.states[0].shape[:-1]
        small = offers(self.problem.dynamics, "step", "all_steps") and x0.ndim <= 2
        if not small or self.problem.box is not None or num_groups(self.u) > 1:
            for size in sizes:
                yield self.rollout(policy, size)
            return
        number, step = len(sizes), self.problem.dynamics.step
        factors = torch.tensor(sizes, dtype=policy.k[0].dtype, device=x0.device).unsqueeze(1)
        states, controls = [x0.expand(number, *x0.shape).reshape(-1, x0.shape[-1])], []
        with torch.no_grad():
            for t, u_t in enumerate(self.u):
                new = torch.addcmul(u_t, factors, policy.k[t])
                if t:
                    moved = states[t].view(number, -1) - self.now.states[t].view(-1)
                    new = torch.addmm(new, moved, policy.K[t][0].mT)
                controls.append(new)
                spread = new if not rows else new.repeat_interleave(rows[0], 0)
                states.append(step(t, states[t], spread))
            for i in range(number):
                trial = [x.view(number, *rows, -1)[i] for x in states]
                yield self.valued(trial, [u_t[i] for u_t in controls])

    def rollout(self, policy: Policy, size: float) -> tuple[Controls, float, float]:
        """Controls under the law, ``J``, and the sum of the magnitudes of its terms."""
        problem, states, controls = self.problem, [self.problem.x0], []
        with torch.no_grad(), differentiable_attention():
            for t, u_t in enumerate(self.u):
                change = size * policy.k[t]
                if t:
                    moved = (states[t] - self.now.states[t]).reshape(len(change), -1, 1)
                    change = change + (policy.K[t] @ moved).squeeze(-1)
                new = u_t + change.reshape(u_t.shape)
                if problem.box is not None:
                    new = new.clamp(*problem.box.bounds(t, u_t))
                controls.append(new)
                states.append(problem.dynamics.step(t, states[t], new))
            return self.valued(states, controls)

    def valued(
        self, states: Sequence[Tensor], controls: Sequence[Tensor]
    ) -> tuple[Controls, float, float]:
        running = running_costs(self.problem, states, controls)
        terms = [*running, self.problem.cost.terminal(states[-1])]
        if len({term.dtype for term in terms}) == 1:
            terms = torch.stack(terms).tolist()
        values = [float(term) for term in terms]
        return tuple(controls), sum(values), sum(map(abs, values))

    def residual(self, u: Controls) -> float:
        gradient = self.now.gradient if u is self.u else self.problem.gradient(u)
        return self.problem.residual_of(u, gradient).norm

    def gains(self, level: int) -> tuple[tuple[Tensor, ...] | None, bool]:
        """Feedback gains, with as little regularisation as possible, and whether none was needed.

        The sweep factorises the model's Hessian in all controls: where it needs no regularisation
        that is positive definite.
        """
        for place in sorted({0, 1, level, len(_PATH) // 2}):
            convexity, damping = _PATH[place]
            try:
                found = sweep(
                    self.model, convexity=convexity, damping=damping, bounds=self.bounds
                ).K
            except IndefiniteError:
                continue
            gains = tuple(K if self.u[t].ndim == 2 else K[0] for t, K in enumerate(found))
            return gains, place == 0
        return None, False
