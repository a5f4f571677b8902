"""Shooting: minimise ``J`` over all controls at once with L-BFGS, gradients by costates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.problem import ControlProblem, Controls, Evaluation
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers.lbfgs import LBFGSEnd, minimise_lbfgs
from deltacontrol.theory.solvers.solving import Ending, Memory, Report, Solver, Status

__all__ = ["Shooting"]


@typed
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
    default_steps: ClassVar[int] = 2000

    def run(
        self, problem: ControlProblem, u0: Controls, report: Report, memory: Memory
    ) -> Ending | None:
        """Minimise until `report` says stop or the line search fails."""
        latest: tuple[Tensor, Evaluation] | None = None

        def evaluate(z: Tensor) -> Evaluation:
            nonlocal latest
            if latest is None or not torch.equal(latest[0], z):
                latest = z, problem.evaluate(_split(z, u0))
            return latest[1]

        def value_and_gradient(z: Tensor) -> tuple[float, Tensor]:
            now = evaluate(z)
            return float(now.objective), _flat(now.gradient)

        start = _flat(u0)
        if report(u0, evaluate(start)):
            return None
        found = minimise_lbfgs(
            value_and_gradient,
            start,
            memory=self.memory,
            bounds=_bounds(problem, u0),
            callback=lambda z: report(_split(z, u0), evaluate(z)),
        )
        if found.end is LBFGSEnd.STOPPED:
            return None
        return Ending(Status.LINE_SEARCH_FAILED, f"L-BFGS stopped: {found.message}")


def _bounds(problem: ControlProblem, like: Controls) -> tuple[Tensor, Tensor] | None:
    """Lower and upper bounds of all controls."""
    if problem.box is None or not like:
        return None
    low, high = zip(*(problem.box.bounds(t, u) for t, u in enumerate(like)), strict=True)
    return _flat(low), _flat(high)


def _flat(tensors: Controls) -> Tensor:
    """All entries in float64 on the CPU, so that L-BFGS does not round them between calls."""
    parts = [t.detach().to("cpu", torch.float64).reshape(-1) for t in tensors]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _split(z: Tensor, like: Controls) -> Controls:
    parts = z.split([u.numel() for u in like])
    return tuple(
        part.reshape(u.shape).to(u.device, u.dtype) for part, u in zip(parts, like, strict=True)
    )
