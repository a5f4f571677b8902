"""Gauss-Newton and Newton's method for all controls at once, by products with the curvature.

Controls that a whole batch shares have no feedback form, and the state of the batch is too large
for Riccati's matrices; but the quadratic model

    m(d) = J + g'd + 1/2 d'M d,   g = grad J,   M = G (Gauss-Newton) or Hess J (Newton),

needs only products ``M v``, each a sweep forward and one backward (`theory.curvature`), and
conjugate gradients need little else. With ``M = G`` its minimiser is the optimum of the
linear-quadratic problem along the present trajectory.

Accuracy of the inner solve. ``||g + M d|| <= eta ||g||`` with Eisenstat and Walker's choice 2,
``eta_k = 0.9 (||g_k|| / ||g_{k-1}||)^1.618``: few products far from an optimum, superlinear
convergence at it.

Rounding. Near an optimum the change of ``J`` drowns in its rounding long before the gradient does.
Where the predicted decrease is below ``eps^(2/3) |J|`` the actual one is therefore taken from the
gradients at both ends, ``-(g + g_new)'d / 2``, exact to third order in ``d``.

Sources: Nocedal & Wright, *Numerical Optimization*, 2nd ed., 2006, sections 7.1 and 10.3; Eisenstat
& Walker, SIAM J. Sci. Comput. 17(1), 1996, equation (2.6); Martens, ICML 2010 (Hessian-free).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from theory.curvature import (
    Curvature,
    GaussNewtonCurvature,
    HessianCurvature,
    flatten,
    unflatten,
)
from theory.errors import InputError
from theory.problem import ControlProblem, Controls, Evaluation
from theory.solvers.base import Ending, Memory, Report, Solver, Status
from theory.solvers.truncated_cg import End, ModelStep, minimise_model

__all__ = ["GaussNewton", "NewtonCG", "damped_step"]

ACCEPT = 1e-4  # least ratio of actual to predicted decrease
GOLDEN = (1 + math.sqrt(5)) / 2  # Eisenstat and Walker's exponent
TRIES = 60  # rejected steps in one iteration before the method gives up


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
    return minimise_model(
        lambda z: curvature.product(z) + damping * z,
        curvature.gradient,
        rtol=rtol,
        max_products=max_products,
    )


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

    def __post_init__(self) -> None:
        """Check the settings."""
        _positive(damping=self.damping, forcing=self.forcing, max_products=self.max_products)

    def run(
        self, problem: ControlProblem, u0: Controls, report: Report, memory: Memory
    ) -> Ending | None:
        """Step until `report` says stop or no damping gives a decrease."""
        u, now = u0, problem.evaluate(u0)
        kappa, forcing = _recall(memory, "damping", self.damping), _Forcing.of(self.forcing, memory)
        while not report(u, now, {"damping": _scalar(kappa), **forcing.memory()}):
            curvature = GaussNewtonCurvature(problem, u, now, keep=self.keep)
            rtol, norm = forcing.next(curvature.gradient), float(curvature.gradient.norm())
            accepted, growth = None, 4.0
            for _ in range(TRIES):
                found = damped_step(
                    curvature, kappa * norm, rtol=rtol, max_products=self.max_products
                )
                # The ratio judges the model without the damping, which is not part of J.
                model_decrease = found.decrease + 0.5 * kappa * norm * float(
                    found.step @ found.step
                )
                trial = _try(problem, u, now, found.step, model_decrease)
                if trial.evaluation is not None:
                    accepted = trial
                    break
                kappa, growth = kappa * growth, 2 * growth
            if accepted is None or accepted.evaluation is None:
                return _stuck("a stronger damping", found)
            u, now = accepted.controls, accepted.evaluation
            kappa *= 0.1 if accepted.ratio > 0.9 else 1 / 3 if accepted.ratio > 0.75 else 1.0
            kappa *= 4.0 if accepted.ratio < 0.25 else 1.0
        return None


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

    def __post_init__(self) -> None:
        """Check the settings."""
        _positive(radius=self.radius, forcing=self.forcing, max_products=self.max_products)

    def run(
        self, problem: ControlProblem, u0: Controls, report: Report, memory: Memory
    ) -> Ending | None:
        """Step until `report` says stop or no radius gives a decrease."""
        u, now = u0, problem.evaluate(u0)
        radius, forcing = _recall(memory, "radius", self.radius), _Forcing.of(self.forcing, memory)
        while not report(u, now, {"radius": _scalar(radius), **forcing.memory()}):
            curvature = HessianCurvature(problem, u, now, keep=self.keep)
            rtol = forcing.next(curvature.gradient)
            accepted = None
            for _ in range(TRIES):
                found = minimise_model(
                    curvature.product,
                    curvature.gradient,
                    rtol=rtol,
                    max_products=self.max_products,
                    radius=radius,
                )
                trial = _try(problem, u, now, found.step, found.decrease)
                if trial.evaluation is not None:
                    accepted = trial
                    break
                radius = 0.25 * float(found.step.norm())
            if accepted is None or accepted.evaluation is None:
                return _stuck("a smaller radius", found)
            u, now = accepted.controls, accepted.evaluation
            length = float(found.step.norm())
            if accepted.ratio < 0.25:
                radius = 0.25 * length
            elif accepted.ratio > 0.75 and length > 0.99 * radius:
                radius *= 2.0
        return None


@dataclass(frozen=True, eq=False)
class _Trial:
    """A step that was tried; without an evaluation it is rejected."""

    controls: Controls
    evaluation: Evaluation | None
    ratio: float


def _try(
    problem: ControlProblem, u: Controls, now: Evaluation, step: Tensor, predicted: float
) -> _Trial:
    """Evaluate at ``u + step`` if the decrease there is a fair part of the predicted one."""
    ahead = tuple(a + d for a, d in zip(u, unflatten(step, u), strict=True))
    moved = any(not torch.equal(a, b) for a, b in zip(u, ahead, strict=True))
    if not predicted > 0 or not moved or not bool(torch.isfinite(step).all()):
        return _Trial(ahead, None, -math.inf)
    with torch.no_grad():
        states = problem.rollout(ahead)
        objective = problem.total_cost(states, ahead)
    before, after = float(now.objective), float(objective)
    if not math.isfinite(after):
        return _Trial(ahead, None, -math.inf)
    eps = torch.finfo(step.dtype).eps
    resolved = predicted > eps ** (2 / 3) * max(abs(before), abs(after))
    ratio = (before - after) / predicted
    if resolved and ratio < ACCEPT:
        return _Trial(ahead, None, ratio)
    costates, gradient = problem.adjoint(states, ahead)
    if not resolved:
        slopes = (flatten(now.gradient) + flatten(gradient)) @ step
        ratio = -0.5 * float(slopes) / predicted
        if not ratio >= ACCEPT:
            return _Trial(ahead, None, ratio)
    return _Trial(ahead, Evaluation(states, costates, objective, gradient), ratio)


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


def _stuck(tried: str, found: ModelStep) -> Ending:
    reason = f"{tried} gave no decrease of J in {TRIES} tries"
    if found.end in (End.SINGULAR, End.NEGATIVE_CURVATURE):
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
