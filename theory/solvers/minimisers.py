"""How one step's control is improved for a function of it alone, the others held fixed.

MSA minimises the Hamiltonian ``v -> H_t(x_t, v, p_{t+1})`` of each step, extended MSA the augmented
one. Three ways to do so, which all keep bounds on the control:

- `GradientStep`: ``u - step_size grad``, projected;
- `ExactArgmin`: the exact minimiser, where the function is quadratic in the control;
- `InnerLBFGS`: some iterations of L-BFGS-B, for any smooth function.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.work import count
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.linearisation import differentiable_attention
from deltacontrol.theory.solvers.lbfgs import minimise_lbfgs

__all__ = ["ExactArgmin", "GradientStep", "InnerLBFGS", "Minimiser", "NoMinimum", "Stage"]


class NoMinimum(Exception):
    """The function of a step's control has no minimum; the message names the step and says why."""


@dataclass(frozen=True, eq=False)
class Stage:
    """The minimisation over one control ``u_t``.

    Attributes:
        step: ``t``, for messages.
        name: what the function is called in messages, such as ``"H"``.
        objective: the function of a control of the shape of ``control``, a scalar that `torch.func`
            can differentiate twice.
        control: the present ``u_t``.
        gradient: the gradient there.
        bounds: the lower and the upper bound, or None.
        work: how many passes through the step one evaluation takes;
        `deltacontrol.theory.control.work` counts them, the
            same again for a gradient, and three times as many for a product with the Hessian.
    """

    step: int
    name: str
    objective: Callable[[Tensor], Tensor]
    control: Tensor
    gradient: Tensor
    bounds: tuple[Tensor, Tensor] | None = None
    work: int = 1

    def project(self, v: Tensor) -> Tensor:
        """The nearest control within the bounds."""
        return v if self.bounds is None else v.clamp(*self.bounds)

    def value_and_gradient(self, v: Tensor) -> tuple[float, Tensor]:
        """Value and gradient at another control."""
        count(2 * self.work)
        with differentiable_attention():
            gradient, value = torch.func.grad_and_value(self.objective)(v.detach())
        return float(value), gradient.detach()

    def hessian_product(self, r: Tensor) -> Tensor:
        """The Hessian at the present control, times a direction."""
        count(3 * self.work)
        with differentiable_attention():
            # Reverse over reverse: the Hessian is symmetric, and torch decomposes forward mode into
            # slow Python.
            pull = torch.func.vjp(torch.func.grad(self.objective), self.control.detach())[1]
            return pull(r)[0].detach()

    def hessian(self) -> Tensor:
        """The Hessian at the present control, ``(m, m)`` with ``m`` its number of entries."""
        u = self.control.detach()
        count(3 * self.work * u.numel())
        with differentiable_attention():
            R = torch.func.jacrev(torch.func.grad(self.objective))(u).detach()
        R = R.reshape(u.numel(), u.numel())
        return (R + R.mT) / 2


class Minimiser(ABC):
    """A way to improve one control."""

    @abstractmethod
    def minimise(self, stage: Stage) -> Tensor:
        """The new control, of the shape of ``stage.control``.

        Raises:
            NoMinimum: if the function is found to have none.
        """


@typed
@dataclass(frozen=True)
class GradientStep(Minimiser):
    """``proj(u - step_size grad)``.

    Attributes:
        step_size: the length of the step, in units of the gradient.

    Raises:
        InputError: if the step size is not positive.
    """

    step_size: float

    def __post_init__(self) -> None:
        """Check the step size."""
        if not self.step_size > 0:
            raise InputError(f"step_size = {self.step_size} must be positive")

    def minimise(self, stage: Stage) -> Tensor:
        """One projected gradient step."""
        return stage.project(stage.control - self.step_size * stage.gradient)


@typed
@dataclass(frozen=True)
class ExactArgmin(Minimiser):
    """The exact minimiser of a quadratic function: one Newton step, ``u - R^{-1} grad``.

    ``R`` is the Hessian. If one product ``R r`` with a Gaussian ``r`` is a multiple of ``r``, then
    ``R`` is a multiple of the identity (with probability one) and no matrix is formed: so it is for
    a weight decay on dynamics that are affine in the control. Otherwise ``R`` is formed. That the
    function is quadratic is not trusted: at the minimiser, displaced in a random direction, its
    gradient must be that of the quadratic model.

    Where ``R`` is singular and the gradient lies in its range, the nearest of the minimisers is
    taken. With bounds, each entry is clipped on its own, which is exact for a diagonal ``R``; where
    an entry's curvature is not positive it goes to the better of its bounds.

    Attributes:
        dense_limit: the largest control of which a Hessian is formed.

    Raises:
        InputError: if the limit is negative.
    """

    dense_limit: int = 2048

    def __post_init__(self) -> None:
        """Check the limit."""
        if self.dense_limit < 0:
            raise InputError(f"dense_limit = {self.dense_limit} must not be negative")

    def minimise(self, stage: Stage) -> Tensor:
        """The minimiser.

        Raises:
            NoMinimum: if the Hessian is indefinite, or flat along a slope.
            InputError: if the function is not quadratic, if its Hessian is too large to form, or
                not diagonal although the control is bounded.
        """
        u, g = stage.control.detach(), stage.gradient.flatten()
        if not u.numel() or not bool(torch.isfinite(g).all()):
            return u
        R = self._hessian(stage)
        probe = _random_like(u) * max(1.0, float(u.norm()))
        try:
            d = (_newton_step if stage.bounds is None else _clipped_step)(stage, R, g).view_as(u)
        except NoMinimum:
            _check_quadratic(stage, R, probe)
            raise
        _check_quadratic(stage, R, d + probe)
        return stage.project(u + d)

    def _hessian(self, stage: Stage) -> Tensor:
        """``R`` as a matrix, or its diagonal ``(m,)`` where it is diagonal."""
        u = stage.control.detach()
        r = _random_like(u)
        Rr = stage.hessian_product(r)
        scale = torch.dot(r.flatten(), Rr.flatten()) / r.square().sum()
        rounding = 100 * torch.finfo(u.dtype).eps
        if float((Rr - scale * r).norm()) <= rounding * float(Rr.norm()):
            return scale.expand(u.numel())
        if u.numel() > self.dense_limit:
            raise InputError(
                f"the Hessian of {stage.name}_{stage.step} in its {u.numel()} control entries is "
                f"no multiple of the identity, and is not formed above {self.dense_limit}; raise "
                "dense_limit, or take InnerLBFGS or GradientStep"
            )
        R = stage.hessian()
        rest = R - torch.diag(R.diagonal())
        return R.diagonal() if bool((rest.abs() <= rounding * R.abs().max()).all()) else R


@typed
@dataclass(frozen=True)
class InnerLBFGS(Minimiser):
    """L-BFGS-B from the present control (scipy's; the values may be of any dtype and device).

    It never returns a control with a larger value than the present one.

    Attributes:
        steps: the largest number of iterations.
        reduction: stop when the largest entry of the gradient, projected where there are bounds,
            has shrunk by this factor.

    Raises:
        InputError: if the steps or the reduction are not positive.
    """

    steps: int = 20
    reduction: float = 1e-2

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.steps < 1 or not self.reduction > 0:
            raise InputError(
                f"steps = {self.steps} and reduction = {self.reduction} must be positive"
            )

    def minimise(self, stage: Stage) -> Tensor:
        """The best control found."""
        u = stage.control.detach()
        if not u.numel():
            return u
        found = minimise_lbfgs(
            stage.value_and_gradient,
            u,
            max_iterations=self.steps,
            max_evaluations=4 * self.steps,
            gradient_tolerance=self.reduction
            * float((stage.project(u - stage.gradient) - u).abs().max()),
            bounds=stage.bounds,
        )
        return stage.project(found.best)


def _random_like(u: Tensor) -> Tensor:
    """A fixed Gaussian direction of length 1."""
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(u.shape, generator=generator, dtype=torch.float64)
    return (r / r.norm()).to(u.device, u.dtype)


def _check_quadratic(stage: Stage, R: Tensor, d: Tensor) -> None:
    """Compare the gradient at ``u + d`` with that of the quadratic model, ``g + R d``."""

    def times(v: Tensor) -> Tensor:
        return (R * v.flatten() if R.ndim == 1 else R @ v.flatten()).view_as(v)

    u, change = stage.control.detach(), times(d)
    _, found = stage.value_and_gradient(u + d)
    error = float((found - stage.gradient - change).norm())
    # A small gradient may be what R u and a costate's part left, with the rounding of both.
    size = sum(float(part.norm()) for part in (stage.gradient, change, times(u)))
    if not error <= math.sqrt(torch.finfo(d.dtype).eps) * size:
        raise InputError(
            f"{stage.name}_{stage.step} is not quadratic in u_{stage.step}: its gradient elsewhere "
            f"differs by {error:.2g} from the quadratic model's, beside gradients of size "
            f"{size:.2g}; ExactArgmin needs dynamics that are affine in the control and a "
            "quadratic running cost; take InnerLBFGS or GradientStep"
        )


def _newton_step(stage: Stage, R: Tensor, g: Tensor) -> Tensor:
    """The shortest ``d`` with ``R d = -g``."""
    if R.ndim == 1:
        curvatures, slopes = R, g
        basis = None
    else:
        curvatures, basis = torch.linalg.eigh(R)
        slopes = basis.mT @ g
    flat = _flat_curvatures(curvatures)
    if bool(((curvatures < 0) & ~flat).any()):
        raise NoMinimum(
            f"{stage.name}_{stage.step} is unbounded below in u_{stage.step}: its Hessian has the "
            f"eigenvalue {float(curvatures.min()):.3g}"
        )
    slope = float(slopes[flat].norm())
    if slope > math.sqrt(torch.finfo(g.dtype).eps) * float(g.norm()):
        raise NoMinimum(
            f"{stage.name}_{stage.step} is unbounded below in u_{stage.step}: it is linear, with "
            f"slope {slope:.3g}, along a direction without curvature"
        )
    d = -torch.where(flat, 0.0, slopes / torch.where(flat, 1.0, curvatures))
    return d if basis is None else basis @ d


def _clipped_step(stage: Stage, R: Tensor, g: Tensor) -> Tensor:
    """The step to the minimiser in the box, entry by entry."""
    if R.ndim == 2:
        raise InputError(
            f"{stage.name}_{stage.step} has a Hessian in u_{stage.step} that is not diagonal, so "
            "that clipping is not its minimiser in the box; take InnerLBFGS or GradientStep"
        )
    assert stage.bounds is not None
    u = stage.control.detach().flatten()
    low, high = (bound.flatten() - u for bound in stage.bounds)
    flat = _flat_curvatures(R)
    convex = (R > 0) & ~flat
    inside = (-g / torch.where(convex, R, 1.0)).clamp(low, high)
    # Without positive curvature one of the two ends is best.
    ends = torch.stack([low, high])
    curvature = torch.where(flat, 0.0, R)
    values = g * ends + torch.where(flat, 0.0, 0.5 * curvature * ends.square())
    still = flat & (g == 0)
    unbounded = ~convex & ~still & ~(torch.isfinite(values) | (values > 0)).all(0)
    if bool(unbounded.any()):
        entry = int(unbounded.nonzero()[0])
        raise NoMinimum(
            f"{stage.name}_{stage.step} is unbounded below in u_{stage.step}: entry {entry} has "
            f"curvature {float(curvature[entry]):.3g} and no bound on the side to which it falls"
        )
    best = torch.where(values[0] <= values[1], low, high)
    return torch.where(convex, inside, torch.where(still, 0.0, best))


def _flat_curvatures(curvatures: Tensor) -> Tensor:
    """Which curvatures are zero up to rounding."""
    size = curvatures.abs()
    eps = torch.finfo(curvatures.dtype).eps
    return size <= 100 * len(curvatures) * eps * size.max()
