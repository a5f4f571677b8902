"""Gauss-Newton and Newton's method for all controls at once, by products with the curvature.

Controls that a whole batch shares have no feedback form, and the state of the batch is too large
for Riccati's matrices; but the quadratic model

    m(d) = J + g'd + 1/2 d'M d,   g = grad J,   M = G (Gauss-Newton) or Hess J (Newton),

needs only products ``M v``, each a sweep forward and one backward
(`deltacontrol.theory.linear.curvature`), and conjugate gradients need little else. With ``M = G``
its minimiser is the optimum of the linear-quadratic problem along the present trajectory.

Accuracy of the inner solve. ``||g + M d|| <= eta ||g||`` with Eisenstat and Walker's choice 2,
``eta_k = 0.9 (||g_k|| / ||g_{k-1}||)^1.618``: few products far from an optimum, superlinear
convergence at it.

Rounding. Near an optimum the change of ``J`` drowns in its rounding long before the gradient does.
Where the predicted decrease is below ``eps^(2/3) |J|`` the actual one is therefore taken from the
gradients at both ends, ``-(g + g_new)'d / 2``, exact to third order in ``d``.

Sources: Nocedal & Wright, *Numerical Optimization*, 2nd ed., 2006, sections 7.1 and 10.3; Eisenstat
& Walker, SIAM J. Sci. Comput. 17(1), 1996, equation (2.6); Nocedal & Yuan, *Combining trust region
and line search techniques*, 1998; Martens, ICML 2010 (Hessian-free).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.problem import ControlProblem, Controls, Evaluation
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.conjugate_gradients import End, ModelStep, conjugate_gradients
from deltacontrol.theory.linear.curvature import Curvature, GaussNewtonCurvature, HessianCurvature
from deltacontrol.theory.linear.operator import Shifted, flatten, unflatten
from deltacontrol.theory.solvers.solving import Ending, Memory, Report, Solver, Status

__all__ = ["GaussNewton", "NewtonCG", "damped_step"]

ACCEPT = 1e-4  # least ratio of actual to predicted decrease
GOLDEN = (1 + math.sqrt(5)) / 2  # Eisenstat and Walker's exponent
TRIES = 60  # parts of one step that are tried before the method gives up


def damped_step(
    curvature: Curvature, damping: float, *, rtol: float = 1e-10, max_products: int = 10_000
) -> ModelStep:
    """Minimise ``g'd + 1/2 d'(M + damping I) d`` by conjugate gradients.

    Where ``M`` is singular, as for LoRA without a weight decay, whose factors ``(A S, S^-1 B)`` all
    give one product, and the damping is zero, the end is `End.SINGULAR` if the gradient has a part
    where ``M`` has none, and else the step of least norm.

    Raises:
        InputError: if the damping is negative.
    """
    if not damping >= 0:
        raise InputError(f"damping = {damping} must not be negative")
    return conjugate_gradients(
        Shifted(curvature, damping), curvature.gradient, rtol=rtol, max_products=max_products
    )


@typed
@dataclass(frozen=True)
class GaussNewton(Solver):
    """Levenberg-Marquardt: ``(G + kappa ||g|| I) d = -g``, solved inexactly, any controls.

    The damping ``kappa ||g||`` vanishes at an optimum, so that the method converges as fast as
    undamped Gauss-Newton there, and it makes the system definite where ``G`` is singular, as along
    LoRA's gauge freedom ``(A S, S^-1 B)``. ``kappa`` follows the ratio of actual to predicted
    decrease. Convergence is superlinear where the dynamics' second derivatives, weighted by the
    costates, vanish at the optimum, and linear else; take `NewtonCG` there.

    Attributes:
        damping: the initial ``kappa``, an inverse length: the first step is at most ``1/kappa``.
        forcing: the largest relative residual with which an inner solve may end.
        max_products: the largest number of products with ``G`` in one solve.
        keep: keep the graphs of all steps between products, see `Curvature`.

    Raises:
        InputError: if a setting is not positive.

    Source: Li, Fukushima, Qi & Yamashita, Comput. Optim. Appl. 28, 2004 (regularisation by the
    gradient's norm); Nocedal & Wright, section 10.3.
    """

    damping: float = 1.0
    forcing: float = 0.5
    max_products: int = 250
    keep: bool = True

    curvature: ClassVar[type[Curvature]] = GaussNewtonCurvature

    def __post_init__(self) -> None:
        """Check the settings."""
        _positive(damping=self.damping, forcing=self.forcing, max_products=self.max_products)

    def run(
        self, problem: ControlProblem, u0: Controls, report: Report, memory: Memory
    ) -> Ending | None:
        """Step until `report` says stop or no part of a step lowers ``J``."""
        u, now = u0, problem.evaluate(u0)
        kappa, forcing = _recall(memory, "damping", self.damping), _Forcing.of(self.forcing, memory)
        while not report(u, now, {"damping": _scalar(kappa), **forcing.memory()}):
            curvature = GaussNewtonCurvature(problem, u, now, keep=self.keep)
            rtol, norm = forcing.next(curvature.gradient), float(curvature.gradient.norm())
            growth = 10.0
            while True:
                damping = kappa * norm
                found = damped_step(curvature, damping, rtol=rtol, max_products=self.max_products)
                if bool(found.step.any()) or not math.isfinite(damping):
                    break
                if found.end is End.NOT_FINITE:
                    break  # no damping makes a product finite
                # G has no positive curvature along the gradient: costs that are not convex.
                kappa, growth = kappa * growth, 10.0 * growth
            # The ratio judges the model without the damping, which is not part of J.
            bend = found.curvature - damping * float(found.step @ found.step)
            moved = _search(problem, u, now, found, bend)
            if moved is None:
                return _stuck(found)
            u, now = moved.controls, moved.evaluation
            kappa *= 1 / moved.share
            if moved.ratio < 0.25:
                kappa *= 4.0
            elif moved.share == 1.0 and moved.ratio > 0.75:
                kappa *= 0.1 if moved.ratio > 0.9 else 1 / 3
        return None


@typed
@dataclass(frozen=True)
class NewtonCG(Solver):
    """Newton's method in a ball, ``||d|| <= radius``, with the exact Hessian of ``J``.

    Conjugate gradients in the manner of Steihaug follow directions of negative curvature to the
    boundary. The radius follows the ratio of actual to predicted decrease. Convergence to an
    optimum with a definite Hessian is superlinear.

    Attributes:
        radius: the initial radius, in units of the controls.
        forcing: the largest relative residual with which an inner solve may end.
        max_products: the largest number of products with the Hessian in one solve.
        keep: keep the graphs of all steps between products, see `Curvature`.

    Raises:
        InputError: if a setting is not positive.

    Source: Steihaug, SIAM J. Numer. Anal. 20(3), 1983; Nocedal & Wright, algorithms 4.1 and 7.2.
    """

    radius: float = 1.0
    forcing: float = 0.1
    max_products: int = 250
    keep: bool = True

    curvature: ClassVar[type[Curvature]] = HessianCurvature

    def __post_init__(self) -> None:
        """Check the settings."""
        _positive(radius=self.radius, forcing=self.forcing, max_products=self.max_products)

    def run(
        self, problem: ControlProblem, u0: Controls, report: Report, memory: Memory
    ) -> Ending | None:
        """Step until `report` says stop or no part of a step lowers ``J``."""
        u, now = u0, problem.evaluate(u0)
        radius, forcing = _recall(memory, "radius", self.radius), _Forcing.of(self.forcing, memory)
        while not report(u, now, {"radius": _scalar(radius), **forcing.memory()}):
            curvature = HessianCurvature(problem, u, now, keep=self.keep)
            found = conjugate_gradients(
                curvature,
                curvature.gradient,
                rtol=forcing.next(curvature.gradient),
                max_products=self.max_products,
                radius=radius,
            )
            moved = _search(problem, u, now, found, found.curvature)
            if moved is None:
                return _stuck(found)
            u, now = moved.controls, moved.evaluation
            length = moved.share * float(found.step.norm())
            if moved.ratio < 0.25:
                radius = 0.25 * length
            elif moved.share < 1.0:
                radius = length
            elif moved.ratio > 0.75 and length > 0.99 * radius:
                radius *= 2.0
        return None


@dataclass(frozen=True, eq=False)
class _Move:
    """An accepted part of a step.

    Attributes:
        controls: where it led.
        evaluation: what the problem gives there.
        share: the part of the step that was taken.
        ratio: actual over predicted decrease.
    """

    controls: Controls
    evaluation: Evaluation
    share: float
    ratio: float


def _search(
    problem: ControlProblem, u: Controls, now: Evaluation, found: ModelStep, bend: float
) -> _Move | None:
    """Shorten the step until ``J`` falls by a fair part of what the model predicts.

    A shorter part of the same step costs one rollout, a new solve many products; so the solve is
    repeated only from the next iterate (Nocedal & Yuan 1998).

    Args:
        problem: the problem.
        u: the controls.
        now: what the problem gives there.
        found: the step, a descent direction.
        bend: ``d'Md`` of the model to be judged.
    """
    if not found.slope < 0 or not bool(torch.isfinite(found.step).all()):
        return None
    share = 1.0
    for _ in range(TRIES):
        step = share * found.step
        ahead = tuple(a + d for a, d in zip(u, unflatten(step, u), strict=True))
        if all(torch.equal(a, b) for a, b in zip(u, ahead, strict=True)):
            return None  # too short to change the controls
        predicted = -share * found.slope - 0.5 * share**2 * bend
        evaluation, ratio = _evaluate(problem, now, ahead, step, predicted)
        if evaluation is not None:
            return _Move(ahead, evaluation, share, ratio)
        # The minimum of the parabola through both values and the slope at zero, safeguarded.
        drop = ratio * predicted
        fall = -share * found.slope
        best = 0.5 * fall / (fall - drop) if math.isfinite(drop) and fall > drop else 0.1
        share *= min(max(best, 0.1), 0.5)
    return None


def _evaluate(
    problem: ControlProblem, now: Evaluation, ahead: Controls, step: Tensor, predicted: float
) -> tuple[Evaluation | None, float]:
    """Actual over predicted decrease, and the evaluation where it is acceptable."""
    with torch.no_grad():
        states = problem.rollout(ahead)
        objective = problem.total_cost(states, ahead)
    before, after = float(now.objective), float(objective)
    if not math.isfinite(after) or not predicted > 0:
        return None, -math.inf
    eps = torch.finfo(step.dtype).eps
    resolved = predicted > eps ** (2 / 3) * max(abs(before), abs(after))
    ratio = (before - after) / predicted
    if resolved and ratio < ACCEPT:
        return None, ratio
    costates, gradient = problem.adjoint(states, ahead)
    if not resolved:
        slopes = (flatten(now.gradient) + flatten(gradient)) @ step
        ratio = -0.5 * float(slopes) / predicted
        # Rounding errors in the gradient let a step pass now and then, which leads nowhere.
        falls = flatten(gradient).norm() < flatten(now.gradient).norm()
        if not (ratio >= ACCEPT and bool(falls)):
            return None, ratio
    return Evaluation(states, costates, objective, gradient), ratio


@dataclass
class _Forcing:
    """Eisenstat and Walker's tolerances for the inner solves, at most `largest`."""

    largest: float
    rtol: float = 0.0
    norm: float = 0.0

    @classmethod
    def of(cls, largest: float, memory: Memory) -> _Forcing:
        return cls(largest, *(_recall(memory, name, 0.0) for name in ("forcing", "gradient_norm")))

    def memory(self) -> dict[str, Tensor]:
        return {"forcing": _scalar(self.rtol), "gradient_norm": _scalar(self.norm)}

    def next(self, gradient: Tensor) -> float:
        norm = float(gradient.norm())
        if self.norm == 0.0:
            rtol = self.largest
        else:
            rtol = 0.9 * (norm / self.norm) ** GOLDEN
            # Not much tighter than the last one while that was loose (their safeguard).
            kept = 0.9 * self.rtol**GOLDEN
            rtol = max(rtol, kept) if kept > 0.1 else rtol
        floor = torch.finfo(gradient.dtype).eps ** 0.5
        self.rtol, self.norm = min(max(rtol, floor), self.largest), norm
        return self.rtol


def _stuck(found: ModelStep) -> Ending:
    reason = "no part of the step lowers J"
    if found.end in (End.SINGULAR, End.NEGATIVE_CURVATURE, End.NOT_FINITE):
        reason += f" (conjugate gradients ended with {found.end.value.replace('_', ' ')})"
    return Ending(Status.LINE_SEARCH_FAILED, reason)


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _recall(memory: Memory, name: str, default: float) -> float:
    return float(memory[name]) if name in memory else default


def _positive(**settings: float) -> None:
    for name, value in settings.items():
        if not value > 0:
            raise InputError(f"{name} = {value} must be positive")
    if not settings["forcing"] < 1:
        raise InputError(f"forcing = {settings['forcing']} must be below 1, a relative residual")
