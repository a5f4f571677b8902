"""Whether stationary controls are a minimum: the curvature of ``J`` along a Krylov space.

The residual vanishes at maxima and saddles too, and a start on a symmetry of ``J`` stays on it. A
few Lanczos steps with the Hessian from a random direction find a direction of negative curvature
where there is one to speak of: the extreme eigenvalues of ``T`` are the first to converge.

Source: Golub & Van Loan, *Matrix Computations*, 2013, section 10.1; Conn, Gould & Toint,
*Trust-Region Methods*, 2000, section 7.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltacontrol.theory.linear.krylov import lanczos
from deltacontrol.theory.linear.operator import SymmetricOperator

__all__ = ["STEPS", "falling_curvature"]

STEPS = 12


def falling_curvature(curvature: SymmetricOperator, free: Tensor | None = None) -> float | None:
    """A negative curvature of ``J``, or None where `STEPS` products find none.

    Curvatures above ``-eps^(1/3)`` of the largest one that was seen count as zero, as the gradient
    of controls that `solve` takes for stationary is known no better.

    Args:
        curvature: the Hessian of ``J``, or its Gauss-Newton part, on the flat controls.
        free: which of these count, ``(n,)``, as those at no bound do; all by default.

    Returns:
        ``d'Hd`` of a direction ``d`` of length one.
    """
    size = curvature.shape[0]
    if not size:
        return None
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(1, size, generator=draw, dtype=torch.float64)
    start = start.to(curvature.device, curvature.dtype)
    kept = torch.ones_like(start[0]) if free is None else free.to(start)
    if not bool(kept.any()):
        return None
    start = start * kept / (start * kept).norm()
    eps = torch.finfo(curvature.dtype).eps
    found = lanczos(
        lambda rows: (rows @ curvature) * kept, start, STEPS, rounding=eps**0.5, one_operator=True
    )
    if not bool(torch.isfinite(found.matrix).all()):
        return None
    values = torch.linalg.eigvalsh(found.matrix[0].double())
    lowest, largest = float(values[0]), float(values.abs().max())
    return lowest if lowest < -(eps ** (1 / 3)) * largest else None
