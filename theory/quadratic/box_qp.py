"""Small box-constrained quadratic programmes, many at a time, by a projected Newton method.

    minimise 1/2 x'Hx + g'x   subject to   low <= x <= high

Source: Bertsekas, SIAM J. Control Optim. 20(2), 1982; Tassa, Mansard & Todorov, ICRA 2014,
section III-A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BoxSolution", "box_qp", "positive_cholesky"]

_ARMIJO = 0.1


@dataclass(frozen=True, eq=False)
class BoxSolution:
    """The minimum of a box-constrained quadratic.

    Attributes:
        x: ``(G, m)``.
        free: ``(G, m)``, true where neither bound holds ``x``.
        factor: Cholesky factor of ``H`` on the free entries, ``(G, m, m)``, the identity elsewhere.
    """

    x: Tensor
    free: Tensor
    factor: Tensor


def box_qp(
    H: Tensor, g: Tensor, low: Tensor, high: Tensor, *, max_steps: int = 100
) -> BoxSolution | None:
    """Projected Newton from the point of the box nearest to zero.

    An entry is held at its bound while the gradient points outward there; a Newton step of the
    others is projected, and shortened until the Armijo condition along the projected arc holds.
    Each step ends on the minimum of a face, or changes the face, so that few steps are needed.

    Args:
        H: ``(G, m, m)``, symmetric.
        g: ``(G, m)``.
        low: ``(G, m)``, may be ``-inf``; at most ``high``.
        high: ``(G, m)``, may be ``inf``.
        max_steps: after so many steps the last point, feasible and no worse than the first, is
            returned.

    Returns:
        The solution, or None where ``H`` is not positive definite on the free entries.

    Example:
        >>> H, g = torch.eye(2).unsqueeze(0), torch.tensor([[3.0, 0.5]])
        >>> found = box_qp(H, g, -torch.ones(1, 2), torch.ones(1, 2))
        >>> found.x.tolist(), found.free.tolist()
        ([[-1.0, -0.5]], [[False, True]])
    """
    x = torch.zeros_like(g).clamp(low, high)
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    eps = torch.finfo(H.dtype).eps
    magnitude = g.abs()
    held = factor = None
    for _ in range(max_steps):
        slope = g + _apply(H, x)
        magnitude = torch.maximum(magnitude, slope.abs())
        now_held = ((x <= low) & (slope > 0)) | ((x >= high) & (slope < 0)) | (low == high)
        if held is None or not torch.equal(now_held, held):
            held = now_held
            free = ~held
            both = free.unsqueeze(-1) & free.unsqueeze(-2)
            factor = positive_cholesky(torch.where(both, H, eye))
            if factor is None:
                return None
        assert factor is not None
        left = torch.where(held, 0.0, slope)
        # A group is done when what is left of its gradient is rounding.
        active = left.norm(dim=-1) > 8 * eps * (magnitude.norm(dim=-1) + _size(H, x))
        if not bool(active.any()):
            break
        step = -torch.cholesky_solve(left.unsqueeze(-1), factor).squeeze(-1)
        x = _search(H, x, slope, step, low, high, active)
    assert held is not None and factor is not None
    return BoxSolution(x, ~held, factor)


def _search(
    H: Tensor, x: Tensor, slope: Tensor, step: Tensor, low: Tensor, high: Tensor, active: Tensor
) -> Tensor:
    """Halve each group's step until the Armijo condition along the projected arc holds."""
    length = active.to(x.dtype).unsqueeze(-1)
    for _ in range(60):
        moved = (x + length * step).clamp(low, high) - x
        expected = (slope * moved).sum(-1)
        change = expected + 0.5 * (moved * _apply(H, moved)).sum(-1)
        short = change > _ARMIJO * expected
        if not bool(short.any()):
            break
        length = torch.where(short.unsqueeze(-1), 0.5 * length, length)
    return (x + length * step).clamp(low, high)


def positive_cholesky(H: Tensor) -> Tensor | None:
    """The Cholesky factors, or None unless every matrix is positive definite beyond rounding."""
    factor, info = torch.linalg.cholesky_ex(H)
    if bool(info.any()) or not bool(torch.isfinite(factor).all()):
        return None
    if H.numel():
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        least = H.shape[-1] * torch.finfo(H.dtype).eps
        if bool((pivots.amin(-1) <= least * H.diagonal(dim1=-2, dim2=-1).amax(-1)).any()):
            return None
    return factor


def _size(H: Tensor, x: Tensor) -> Tensor:
    return H.abs().amax((-2, -1)) * x.norm(dim=-1) if H.numel() else x.new_zeros(x.shape[0])


def _apply(H: Tensor, x: Tensor) -> Tensor:
    return (H @ x.unsqueeze(-1)).squeeze(-1)
