"""Shooting: minimise ``J`` over all controls at once with L-BFGS, gradients by costates.

Source: Byrd, Lu, Nocedal & Zhu, SIAM J. Sci. Comput. 16(5), 1995, as `scipy.optimize` provides it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from deltacontrol.theory.control.problem import ControlProblem, Controls, Evaluation
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers.solve import Ending, Memory, Report, Solver, Status

__all__ = ["Shooting"]

_UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class Shooting(Solver):
    """L-BFGS on ``J`` over the concatenated controls.

    scipy works in float64 on the CPU; the problem is evaluated in the dtype and on the device of
    ``u0``. scipy's own tolerances are off, so that the residual alone decides when to stop. Where
    the line search can no longer lower ``J``, the method gives up and hands on scipy's message.
    Mostly rounding hides the descent then: a residual below about ``(eps |J| lambda)^(1/2)``, with
    ``lambda`` the curvature of ``J`` and ``eps`` the precision, cannot be reached by comparing
    values of ``J``.

    Attributes:
        memory: the number of past steps from which curvature is estimated.

    Raises:
        InputError: if the memory is not positive.
    """

    memory: int = 20

    def __post_init__(self) -> None:
        """Check the memory."""
        if self.memory < 1:
            raise InputError(f"memory = {self.memory} must be at least 1")

    takes_box: ClassVar[bool] = True

    def run(
        self, problem: ControlProblem, u0: Controls, report: Report, memory: Memory
    ) -> Ending | None:
        """Minimise until `report` says stop or the line search fails."""
        latest: tuple[np.ndarray, Evaluation] | None = None

        def evaluate(z: np.ndarray) -> Evaluation:
            nonlocal latest
            if latest is None or not np.array_equal(latest[0], z):
                latest = z.copy(), problem.evaluate(_split(z, u0))
            return latest[1]

        def value_and_gradient(z: np.ndarray) -> tuple[float, np.ndarray]:
            now = evaluate(z)
            return float(now.objective), _flat(now.gradient)

        stopped = False

        def after_iteration(intermediate_result: optimize.OptimizeResult) -> None:
            nonlocal stopped
            z = intermediate_result.x
            stopped = report(_split(z, u0), evaluate(z))
            if stopped:
                raise StopIteration

        start = _flat(u0)
        now = evaluate(start)
        if report(u0, now):
            return None
        result = optimize.minimize(
            value_and_gradient,
            start,
            jac=True,
            bounds=_bounds(problem, u0),
            method="L-BFGS-B",
            callback=after_iteration,
            options={
                "maxcor": self.memory,
                "ftol": 0.0,
                "gtol": 0.0,
                "maxiter": _UNLIMITED,
                "maxfun": _UNLIMITED,
            },
        )
        if stopped:
            return None
        return Ending(Status.LINE_SEARCH_FAILED, f"L-BFGS stopped: {result.message}")


def _bounds(problem: ControlProblem, like: Controls) -> np.ndarray | None:
    """Lower and upper bounds as two columns."""
    if problem.box is None or not like:
        return None
    low, high = zip(*(problem.box.bounds(t, u) for t, u in enumerate(like)), strict=True)
    return np.stack([_flat(low), _flat(high)], axis=1)


def _flat(tensors: Controls) -> np.ndarray:
    parts = [t.detach().to("cpu", torch.float64).reshape(-1) for t in tensors]
    return torch.cat(parts).numpy() if parts else np.zeros(0)


def _split(z: np.ndarray, like: Controls) -> Controls:
    parts: tuple[Tensor, ...] = torch.from_numpy(z.copy()).split([u.numel() for u in like])
    return tuple(
        part.reshape(u.shape).to(u.device, u.dtype) for part, u in zip(parts, like, strict=True)
    )
