"""Conjugate gradients, which may end early.

Minimise ``m(s) = g's + 1/2 s'Hs`` over ``s``, inside of a ball where a radius is given, by products
with ``H`` alone. Four ends beside the tolerance: the ball's boundary, a direction of negative
curvature (followed to the boundary), the largest number of products, and a number that is not
finite (the last finite step is kept). Every iterate of conjugate gradients from zero lowers ``m``
and lengthens ``s``, so each end gives a descent step or none.
A definite system ``H s = b`` is the case ``g = -b`` without a radius.

Source: Steihaug, *The conjugate gradient method and trust regions in large scale optimization*,
SIAM J. Numer. Anal. 20(3), 1983; Nocedal & Wright, *Numerical Optimization*, 2nd ed., 2006,
algorithm 7.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.operator import SymmetricOperator

__all__ = ["End", "ModelStep", "conjugate_gradients"]


class End(StrEnum):
    """Why conjugate gradients stopped."""

    TOLERANCE = "tolerance"
    BOUNDARY = "boundary"
    NEGATIVE_CURVATURE = "negative_curvature"
    SINGULAR = "singular"
    PRODUCTS = "products"
    NOT_FINITE = "not_finite"


@dataclass(frozen=True, eq=False)
class ModelStep:
    """A step that lowers the quadratic model.

    Attributes:
        step: ``s``.
        curvature: ``s'Hs``.
        slope: ``g's``.
        residual: ``||g + Hs|| / ||g||``.
        products: the number of products with ``H``.
        end: why it is this step.
    """

    step: Tensor
    curvature: float
    slope: float
    residual: float
    products: int
    end: End

    @property
    def decrease(self) -> float:
        """``m(0) - m(s)``."""
        return -self.slope - 0.5 * self.curvature


@typed
def conjugate_gradients(
    H: SymmetricOperator,
    gradient: Tensor,
    *,
    rtol: float,
    max_products: int,
    radius: float = math.inf,
) -> ModelStep:
    """Minimise ``g's + 1/2 s'Hs``, ``||s|| <= radius``, approximately.

    A direction ``d`` whose curvature is not above rounding, ``d'Hd <= eps ||d|| ||Hd||``, has no
    minimum along it: with a radius it is followed to the boundary; without one the step so far is
    returned, with the end `SINGULAR` or `NEGATIVE_CURVATURE`. Where the gradient or a product is
    not finite, or numbers overflow, the last finite step is returned with the end `NOT_FINITE`.

    Args:
        H: ``(n, n)``.
        gradient: ``g``, ``(n,)``.
        rtol: stop where ``||g + Hs|| <= rtol ||g||``.
        max_products: stop after so many products.
        radius: of the ball.

    Raises:
        InputError: the gradient is of whole numbers, or not one vector of the size of ``H``; or
            ``rtol`` is negative or NaN, which no residual reaches.
    """
    if not rtol >= 0:
        raise InputError(f"rtol is {rtol}; expected a number of at least 0, such as 1e-8")
    if gradient.shape != H.shape[:1]:
        raise InputError(
            f"the gradient has shape {tuple(gradient.shape)}; expected {H.shape[:1]}, as {H!r} has"
        )
    if not gradient.is_floating_point():
        raise InputError(f"the gradient is {gradient.dtype}; expected a float dtype, as H has")
    s, hs, r = torch.zeros_like(gradient), torch.zeros_like(gradient), gradient.clone()
    scale = float(gradient.norm())
    d, rr = -r, float(r @ r)
    products, end = 0, End.TOLERANCE
    eps = torch.finfo(gradient.dtype).eps
    if not math.isfinite(rr):
        end = End.NOT_FINITE
    while end is End.TOLERANCE and math.sqrt(rr) > rtol * scale:
        if products == max_products:
            end = End.PRODUCTS
            break
        hd = H @ d
        products += 1
        bend = float(d @ hd)
        flat = eps * float(d.norm()) * float(hd.norm())
        if not (math.isfinite(bend) and math.isfinite(flat)):
            end = End.NOT_FINITE
            break
        if not bend > flat:
            end = End.NEGATIVE_CURVATURE if bend < -flat else End.SINGULAR
            if math.isfinite(radius):
                tau = _to_boundary(s, d, radius)
                s, hs, r = s + tau * d, hs + tau * hd, r + tau * hd
            break
        alpha = rr / bend
        ahead = s + alpha * d
        length = float(ahead.norm())
        if not math.isfinite(length):
            end = End.NOT_FINITE
            break
        if length >= radius:
            tau = _to_boundary(s, d, radius)
            s, hs, r, end = s + tau * d, hs + tau * hd, r + tau * hd, End.BOUNDARY
            break
        rest = r + alpha * hd
        rr, before = float(rest @ rest), rr
        if not math.isfinite(rr):
            end = End.NOT_FINITE
            break
        s, hs, r = ahead, hs + alpha * hd, rest
        d = -r + (rr / before) * d
    return ModelStep(
        step=s,
        curvature=float(s @ hs),
        slope=float(gradient @ s),
        residual=float(r.norm()) / scale if scale else 0.0,
        products=products,
        end=end,
    )


def _to_boundary(s: Tensor, d: Tensor, radius: float) -> float:
    """The positive ``tau`` with ``||s + tau d|| = radius``."""
    a, b, c = float(d @ d), float(s @ d), float(s @ s) - radius**2
    root = math.sqrt(max(b * b - a * c, 0.0))
    # Of the two forms of the root, the one without cancellation.
    return (root - b) / a if b <= 0 else -c / (b + root)
