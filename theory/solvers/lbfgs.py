"""L-BFGS-B on functions of torch tensors: the one place where scipy's is called.

scipy works in float64 on the CPU. The function is asked in the shape, the dtype and on the device
of the start; give a start in float64 where points must not be rounded between calls.

Source: Byrd, Lu, Nocedal & Zhu, SIAM J. Sci. Comput. 16(5), 1995, as `scipy.optimize` provides it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from deltacontrol.theory.errors import InputError

__all__ = ["LBFGSEnd", "LBFGSResult", "differentiated", "minimise_lbfgs"]

ValueAndGradient: TypeAlias = Callable[[Tensor], tuple[float, Tensor]]

UNLIMITED = 2**31 - 1


class LBFGSEnd(StrEnum):
    """Why L-BFGS-B ended."""

    TOLERANCE = "tolerance"
    LIMIT = "limit"
    LINE_SEARCH_FAILED = "line_search_failed"
    STOPPED = "stopped"


_ENDS = {0: LBFGSEnd.TOLERANCE, 1: LBFGSEnd.LIMIT, 2: LBFGSEnd.LINE_SEARCH_FAILED}
"""By scipy's status."""


@dataclass(frozen=True, eq=False)
class LBFGSResult:
    """Where L-BFGS-B ended.

    Attributes:
        x: its last iterate, of the shape, dtype and device of the start.
        value: the function there.
        best: the point with the least value of all that were evaluated, line searches included.
        best_value: the function there; infinite, with ``best`` the start, if no value was finite.
        end: why it ended.
        message: scipy's words for it.
        evaluations: of the function.
    """

    x: Tensor
    value: float
    best: Tensor
    best_value: float
    end: LBFGSEnd
    message: str
    evaluations: int


def minimise_lbfgs(
    function: ValueAndGradient,
    start: Tensor,
    *,
    memory: int = 10,
    max_iterations: int = UNLIMITED,
    max_evaluations: int = UNLIMITED,
    gradient_tolerance: float = 0.0,
    value_tolerance: float = 0.0,
    bounds: tuple[Tensor, Tensor] | None = None,
    callback: Callable[[Tensor], bool] | None = None,
) -> LBFGSResult:
    """Minimise a smooth function, with bounds on its argument if wanted.

    Args:
        function: value and gradient at a point; an exception in it reaches the caller.
        start: the point to begin at, of any shape.
        memory: the number of past steps from which curvature is estimated.
        max_iterations: the largest number of iterations.
        max_evaluations: of the function; looked at between iterations.
        gradient_tolerance: end when no entry of the gradient, projected where there are bounds, is
            larger; 0 leaves it to the line search.
        value_tolerance: end when an iteration lowers the value by at most this share of it.
        bounds: lower and upper bounds of the shape of ``start``; ``inf`` is no bound.
        callback: called with each new iterate; True ends the minimisation.

    Raises:
        InputError: if the memory is below 1, or a bound has not the shape of the start.

    Example:
        ``x^4 - x`` has its minimum at ``4^(-1/3)``:

        >>> found = minimise_lbfgs(differentiated(lambda x: x**4 - x), torch.zeros(()).double(),
        ...                        gradient_tolerance=1e-12)
        >>> found.end.value, abs(float(found.x) - 4 ** (-1 / 3)) < 1e-9
        ('tolerance', True)
    """
    if memory < 1:
        raise InputError(f"memory = {memory} must be at least 1")
    if bounds is not None and any(bound.shape != start.shape for bound in bounds):
        raise InputError(
            f"the bounds have shapes {[tuple(bound.shape) for bound in bounds]}; expected "
            f"{tuple(start.shape)}, that of the start"
        )
    best, best_value = start.detach().clone(), math.inf
    evaluations, stopped = 0, False

    def point(z: np.ndarray) -> Tensor:
        return torch.from_numpy(z.copy()).view(start.shape).to(start.device, start.dtype)

    def value_and_gradient(z: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best, best_value, evaluations
        x = point(z)
        value, gradient = function(x)
        evaluations += 1
        if value < best_value:
            best, best_value = x, value
        return value, _flat(gradient)

    def after_iteration(intermediate_result: optimize.OptimizeResult) -> None:
        nonlocal stopped
        stopped = callback is not None and callback(point(intermediate_result.x))
        if stopped:
            raise StopIteration

    found = optimize.minimize(
        value_and_gradient,
        _flat(start),
        jac=True,
        bounds=None if bounds is None else np.stack([_flat(bound) for bound in bounds], axis=1),
        method="L-BFGS-B",
        callback=None if callback is None else after_iteration,
        options={
            "maxcor": memory,
            "maxiter": max_iterations,
            "maxfun": max_evaluations,
            "gtol": gradient_tolerance,
            "ftol": value_tolerance,
        },
    )
    return LBFGSResult(
        x=point(found.x),
        value=float(found.fun),
        best=best,
        best_value=best_value,
        end=LBFGSEnd.STOPPED if stopped else _ENDS[found.status],
        message=str(found.message),
        evaluations=evaluations,
    )


def differentiated(function: Callable[[Tensor], Tensor]) -> ValueAndGradient:
    """Value and gradient of a scalar function, by automatic differentiation."""

    def value_and_gradient(x: Tensor) -> tuple[float, Tensor]:
        x = x.detach().requires_grad_()
        value = function(x)
        (gradient,) = torch.autograd.grad(value, x)
        return float(value.detach()), gradient

    return value_and_gradient


def _flat(x: Tensor) -> np.ndarray:
    return x.detach().to("cpu", torch.float64).reshape(-1).numpy()
