"""What a solve tells: its iterates while it runs, its status and its solution at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from deltacontrol.theory.control.problem import Controls, Evaluation, Residual
from deltacontrol.theory.display import html_table, text_table

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["HISTORY", "Iterate", "Memory", "Solution", "Status"]

Memory: TypeAlias = Mapping[str, Tensor]

HISTORY = ("objective", "residual", "step_size", "sweeps")
"""What is kept of every iterate; the columns of `Solution.history`."""


class Status(StrEnum):
    """How a solve ended.

    ``STATIONARY`` is a point whose residual is at most ``tol`` and along which ``J`` has a
    direction of negative curvature, as solvers that see curvature find: a saddle or a maximum.
    """

    CONVERGED = "converged"
    STATIONARY = "stationary"
    MAX_STEPS = "max_steps"
    DIVERGED = "diverged"
    LINE_SEARCH_FAILED = "line_search_failed"
    UNBOUNDED = "unbounded"


@dataclass(frozen=True, eq=False, repr=False)
class Iterate:
    """What a callback sees of one iteration.

    Attributes:
        iteration: 0 for the initial controls.
        controls: the controls of this iteration.
        objective: ``J``.
        residual: ``||grad_u H_t||`` per step and in total.
        evaluation: states, costates and the gradients ``grad_u H_t`` under these controls.
    """

    iteration: int
    controls: Controls
    objective: float
    residual: Residual
    evaluation: Evaluation

    def __repr__(self) -> str:
        """Iteration, ``J`` and the residual."""
        return (
            f"Iterate({self.iteration}: J = {self.objective:.6g}, "
            f"residual = {self.residual.norm:.3g})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Solution:
    """The controls that a solver reached, and how good they are.

    Attributes:
        controls: the last iterate, or the last finite one if the solve diverged.
        states: ``x_0..x_L`` under these controls.
        costates: ``p_0..p_L``.
        objective: ``J``.
        residual: the stationarity residual of these controls.
        status: how the solve ended.
        message: what happened and, unless it converged, what to try.
        history: one row per iterate, the initial controls first, with the index ``iteration`` and
            the columns ``objective``, ``residual`` (total norm), ``step_size`` (Euclidean length of
            the change of all controls since the iterate before) and ``sweeps`` (the work so far in
            passes through all steps, as `deltacontrol.theory.control.work` counts it; a gradient is
            two).
        gains: feedback gains ``K_t`` of the law ``u_t + K_t (x - x_t)`` around this solution,
            ``(m_t, n_t)`` for each step, or None where the solver has none.
    """

    controls: Controls
    states: list[Tensor]
    costates: list[Tensor]
    objective: float
    residual: Residual
    status: Status
    message: str
    history: DataFrame
    gains: tuple[Tensor, ...] | None = None

    @property
    def iterations(self) -> int:
        """The number of iterations; the initial controls are not counted."""
        return len(self.history) - 1

    def _rows(self) -> dict[str, str]:
        return {
            "status": str(self.status),
            "J": f"{self.objective:.6g}",
            "residual": f"{self.residual.norm:.3g}",
            "iterations": str(self.iterations),
            "message": self.message,
        }

    def __repr__(self) -> str:
        """Status, ``J``, residual, iterations and message, one a line."""
        return text_table("Solution", self._rows())

    def _repr_html_(self) -> str:
        """The same as a table."""
        return html_table("Solution", self._rows())
