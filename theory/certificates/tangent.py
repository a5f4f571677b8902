"""What a function is at least on a ball, told by its value and its slope at any one point.

Notation. ``f`` is a function of a flat vector, ``B = {v : ||v - c|| <= r}`` a ball. ``f`` has a
curvature of at least ``sigma``, a number of any sign, if ``f(v) - sigma/2 ||v||^2`` is convex: for
a quadratic ``sigma`` is the least eigenvalue of its matrix, for a convex loss with a weight decay
it is the weight decay.

*The bound.* For every point ``w`` with the slope ``e = grad f(w)``, and for all ``v``,

    f(v) >= f(w) + <e, v - w> + sigma/2 ||v - w||^2,

since the right side is the tangent at ``w`` of a convex function, plus ``sigma/2 ||v||^2``. Its
level sets are spheres, so that its least value on a ball is known. With ``q = c - w`` and its slope
``h = e + sigma q`` at the centre,

    min_B f  >=  f(w) + <e, q> + sigma/2 ||q||^2 + min_{0 <= s <= r} (sigma/2 s^2 - ||h|| s).

Nothing is asked of ``w``: whatever a solver returned, the bound is valid, and where the solver was
inaccurate it is lower, never wrong. With ``sigma = 0`` its distance to ``f(w)`` is the gap of Frank
and Wolfe, ``<e, w - c> + r ||e||``.

*It is exact* at a point ``w`` of the ball with ``e = lambda (c - w)``, where ``lambda >= 0``,
``lambda + sigma >= 0``, and ``lambda = 0`` unless ``||w - c|| = r``: then ``h`` is ``(lambda +
sigma) q`` and the right side is ``f(w)``. Every minimiser of a convex ``f`` on the ball is such a
point, and so is every global minimiser of a quadratic, definite or not (More and Sorensen). So the
bound closes on both, and ``lambda`` is the multiplier of the ball: for a quadratic of slope ``g``
at the centre and matrix ``H`` the bound is then Lagrange's, ``-1/2 g'(H + lambda I)^+ g - lambda
r^2/2``.

*It is Fenchel's dual* for ``f(v) = Phi(z + G v)`` with convex ``Phi`` and ``sigma = 0``: the right
side is ``<a, z + G c> - Phi*(a) - r ||G'a||`` at the dual point ``a = grad Phi(z + G w)``.

Sources: Jaggi, *Revisiting Frank-Wolfe*, ICML 2013, equation (2); More & Sorensen, SIAM J. Sci.
Stat. Comput. 4(3), 1983, lemmas 2.1 and 2.3; Boyd & Vandenberghe, *Convex Optimization*, 2004,
appendix B.1 (strong duality of one quadratic constraint); Borwein & Lewis, *Convex Analysis and
Nonlinear Optimization*, 2006, theorem 3.3.5.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor

__all__ = ["Ball", "Least", "Model", "least_on_ball", "to_boundary"]

# Rounding errors of the bound, in units of the precision times the sizes of its terms.
_ROUNDING = 500


@dataclass(frozen=True, eq=False)
class Ball:
    """``{v : ||v - c||_2 <= r}`` of flat vectors.

    Attributes:
        centre: ``c``, ``(n,)``.
        radius: ``r``, positive; it may be infinite.
    """

    centre: Tensor
    radius: float

    def project(self, v: Tensor) -> Tensor:
        """The nearest point of the ball."""
        away = v - self.centre
        length = float(away.norm())
        return v if length <= self.radius else self.centre + (self.radius / length) * away


@dataclass(frozen=True)
class Least:
    """A lower bound of a function on a ball.

    Attributes:
        bound: the bound, less an allowance for rounding errors.
        multiplier: ``lambda``, the slope of the bound in ``-r^2/2``.
    """

    bound: float
    multiplier: float


def least_on_ball(
    value: float, slope: Tensor, point: Tensor, curvature: float, ball: Ball, *, scale: float = 0.0
) -> Least:
    """The bound of this module.

    Args:
        value: ``f(w)``.
        slope: ``e = grad f(w)``, ``(n,)``.
        point: ``w``, ``(n,)``; it need not lie in the ball.
        curvature: ``sigma``.
        ball: where the bound holds.
        scale: the size of what ``value`` was computed from, such as the objective where ``value``
            is a difference of two; rounding errors are relative to it.

    Example:
        ``f(v) = -1/2 v^2`` on ``|v| <= 1`` is least, ``-1/2``, at both ends; so says its centre:

        >>> zero = torch.zeros(1, dtype=torch.float64)
        >>> least = least_on_ball(0.0, zero, zero, -1.0, Ball(zero, 1.0))
        >>> round(least.bound, 12), least.multiplier
        (-0.5, 1.0)
    """
    sigma, r, q = curvature, ball.radius, ball.centre - point
    length = float((slope + sigma * q).norm())
    along, bent = float(slope @ q), 0.5 * sigma * float(q @ q)
    if sigma > 0 and length <= sigma * r:
        ends = (-0.5 * length**2 / sigma,)
    elif length == 0 and sigma == 0:
        ends = (0.0,)
    else:
        ends = (-r * length, 0.5 * sigma * r**2 if sigma else 0.0)
    terms = (value, along, bent, *ends)
    sizes = abs(scale) + sum(map(abs, terms))
    rounding = _ROUNDING * torch.finfo(slope.dtype).eps * sizes if math.isfinite(sizes) else 0.0
    bound = sum(terms)  # inf - inf where the ball is the whole space and f is not convex
    multiplier = max(0.0, length / r - sigma) if math.isfinite(r) else 0.0
    return Least(-math.inf if math.isnan(bound) else bound - rounding, multiplier)


class Model(ABC):
    """A function ``f`` of a step ``d``, of known least curvature, and how to minimise it.

    Attributes:
        curvature: ``sigma``; a number that is certainly not too large.
        scale: the size of the numbers of which `change` is a difference.
    """

    curvature: float
    scale: float = 0.0

    @abstractmethod
    def change(self, d: Tensor) -> float:
        """``f(d) - f(0)``."""

    @abstractmethod
    def slope(self, d: Tensor) -> Tensor:
        """``grad f(d)``."""

    @abstractmethod
    def minimiser(self, ball: Ball) -> Tensor:
        """A point that is meant to be least on the ball; no bound relies on it."""

    def least(self, d: Tensor, ball: Ball) -> Least:
        """What ``f - f(0)`` is at least on the ball, told by the point ``d``."""
        change, slope = self.change(d), self.slope(d)
        return least_on_ball(change, slope, d, self.curvature, ball, scale=self.scale)


def to_boundary(
    step: Callable[[float], Tensor], low: float, top: float, radius: float, *, xtol: float = 1e-12
) -> Tensor:
    """The step of length ``radius``, where its length falls with the multiplier.

    Args:
        step: the step of a multiplier.
        low: the least multiplier that is tried.
        top: a multiplier whose step is not longer than the radius.
        radius: the length.
        xtol: the error of the logarithm of the multiplier.

    Returns:
        The step of ``low`` where even that is shorter.
    """
    found = step(top)
    inside = outside = math.log(top)
    least = math.log(low)
    while float(found.norm()) <= radius:
        if outside <= least:
            return found
        inside, outside = outside, max(outside - math.log(8.0), least)
        found = step(math.exp(outside))
    if outside == inside:  # the step of `top` is longer by rounding alone
        return found

    def excess(t: float) -> float:
        return math.log(max(float(step(math.exp(t)).norm()), 1e-300) / radius)

    if not excess(outside) > 0 > excess(inside):  # between the two only rounding
        return step(math.exp(inside))
    root: Any = brentq(excess, outside, inside, xtol=xtol, maxiter=200)
    return step(math.exp(root))
