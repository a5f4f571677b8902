"""Quadratics on a ball: the trust-region problem, by eigenvectors or by products alone.

``f(d) - f(0) = g'd + 1/2 d'Hd``, ``H`` symmetric and of any sign. Its least value on ``||d - c|| <=
r`` is attained at ``c + s`` with

    (H + lambda I) s = -grad f(c),   lambda >= max(0, -lambda_min(H)),   lambda (||s|| - r) = 0,

and these conditions are sufficient (More & Sorensen, lemmas 2.1 and 2.3), so that the tangent bound
(`deltacontrol.theory.certificates.tangent`) closes there. The *hard case*: where ``grad f(c)`` has
no part along the least eigenvectors, ``s`` may be too short for every such ``lambda``; then a
multiple of one of them is added, which changes no slope.

What the bound needs of ``H`` is a number that is not above ``lambda_min``. Of a dense matrix the
computed eigenvalue is lowered by a bound of its rounding error. Of an operator nothing is computed:
estimates of ``lambda_min`` by Lanczos lie above it, so the caller says what is certain by
construction, such as 0 for a Gauss-Newton matrix of convex costs, or its weight decay.

Source: More & Sorensen, *Computing a trust region step*, SIAM J. Sci. Stat. Comput. 4(3), 1983;
Golub & Van Loan, *Matrix Computations*, 2013, section 8.1 (eigenvalues under rounding).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltacontrol.theory.certificates.tangent import Ball, Model, to_boundary
from deltacontrol.theory.linear.conjugate_gradients import conjugate_gradients
from deltacontrol.theory.linear.operator import Shifted, SymmetricOperator

__all__ = ["DenseQuadratic", "ProductQuadratic"]

# The smallest multiplier that is tried, relative to the largest.
_LEAST = 1e-13


class DenseQuadratic(Model):
    """``g'd + 1/2 d'Hd`` of a stored matrix.

    Args:
        gradient: ``g``, ``(n,)``.
        hessian: ``H``, ``(n, n)``; its symmetric part counts.
    """

    def __init__(self, gradient: Tensor, hessian: Tensor) -> None:
        self.gradient, self.hessian = gradient, 0.5 * (hessian + hessian.mT)
        self._values, self._vectors = torch.linalg.eigh(self.hessian)
        size = float(self._values.abs().max())
        rounding = 10 * len(gradient) * torch.finfo(gradient.dtype).eps * size
        self.curvature = float(self._values[0]) - rounding

    def change(self, d: Tensor) -> float:
        """``g'd + 1/2 d'Hd``."""
        return float(self.gradient @ d + 0.5 * d @ (self.hessian @ d))

    def slope(self, d: Tensor) -> Tensor:
        """``g + Hd``."""
        return self.gradient + self.hessian @ d

    def minimiser(self, ball: Ball) -> Tensor:
        """The global minimiser, in the basis of eigenvectors; the centre where there is none."""
        along = self._vectors.mT @ self.slope(ball.centre)
        return ball.centre + self._vectors @ self._least_step(along, ball.radius)

    def _least_step(self, along: Tensor, radius: float) -> Tensor:
        """``s`` in the basis of eigenvectors, where the slope at the centre is ``along``."""
        values, lowest = self._values, float(self._values[0])
        shifted = values + max(0.0, -lowest)

        def step(multiplier: float) -> Tensor:
            return -along / (shifted + multiplier)

        if lowest > 0 and float(step(0.0).norm()) <= radius:
            return step(0.0)
        if math.isinf(radius):
            return torch.zeros_like(along)
        eps = torch.finfo(along.dtype).eps
        top = float(along.norm()) / radius
        low = eps * max(float(values.abs().max()), top)
        if low == 0:  # f is constant
            return torch.zeros_like(along)
        found = to_boundary(step, low, max(top, 2 * low), radius)
        short = radius**2 - float(found[1:] @ found[1:])
        if lowest < 0 and float(found.norm()) < radius * (1 - 1e-10) and short > 0:
            found = found.clone()  # the hard case
            found[0] = math.copysign(math.sqrt(short), float(found[0]))
        return found


class ProductQuadratic(Model):
    """``g'd + 1/2 d'Hd`` of an operator, by conjugate gradients.

    The hard case is not solved, so that the bound may not close there.

    Args:
        gradient: ``g``, ``(n,)``.
        hessian: ``H``.
        floor: a number that is certainly not above ``lambda_min(H)``.
        max_products: products of each of some thirty inner solves.
    """

    def __init__(
        self, gradient: Tensor, hessian: SymmetricOperator, floor: float, max_products: int
    ) -> None:
        self.gradient, self.hessian, self.curvature = gradient, hessian, floor
        self._max_products = max_products

    def change(self, d: Tensor) -> float:
        """``g'd + 1/2 d'Hd``."""
        return float(self.gradient @ d + 0.5 * d @ (self.hessian @ d))

    def slope(self, d: Tensor) -> Tensor:
        """``g + Hd``."""
        return self.gradient + self.hessian @ d

    def minimiser(self, ball: Ball) -> Tensor:
        """Where conjugate gradients with the ball's multiplier end."""
        at_centre = self.slope(ball.centre)
        if not bool(at_centre.any()):
            return ball.centre
        shift = max(0.0, -self.curvature)

        def step(multiplier: float) -> Tensor:
            return conjugate_gradients(
                Shifted(self.hessian, shift + multiplier),
                at_centre,
                rtol=1e-12,
                max_products=self._max_products,
            ).step

        if self.curvature >= 0:
            free = step(0.0)
            if float(free.norm()) <= ball.radius:
                return ball.centre + free
        if math.isinf(ball.radius):
            return ball.centre
        top = float(at_centre.norm()) / ball.radius
        return ball.centre + to_boundary(step, _LEAST * top, top, ball.radius, xtol=1e-8)
