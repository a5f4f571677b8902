"""What all solvers share: iterates, the stopping rule, an honest status, the solution.

A solver never says that it converged. It reports iterates; `solve` computes the residual
``(sum_t ||grad_u H_t||^2)^(1/2)`` of each, stops when it is at most ``tol``, and derives the status
from the residual that was reached.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from theory.errors import InputError
from theory.problem import ControlProblem, Controls, Evaluation, Residual

__all__ = ["Iterate", "Report", "Solution", "Solver", "Status", "solve"]


class Status(StrEnum):
    """How a solve ended."""

    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    DIVERGED = "diverged"
    LINE_SEARCH_FAILED = "line_search_failed"


@dataclass(frozen=True, eq=False)
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


class Report(Protocol):
    """How a solver hands over an iterate; the answer says whether to stop."""

    def __call__(self, controls: Controls, evaluation: Evaluation) -> bool:
        """Record the iterate and return True if the solver must stop."""
        ...


class Solver(ABC):
    """A method that improves controls step by step."""

    @abstractmethod
    def run(self, problem: ControlProblem, u0: Controls, report: Report) -> str | None:
        """Report ``u0``, then each new iterate, until `report` answers True.

        Args:
            problem: the problem to solve.
            u0: the initial controls.
            report: takes the controls of an iterate and what `ControlProblem.evaluate` gives there.

        Returns:
            None, or why the method itself could not go on (a failed line search); not looked at
            if `report` had said stop.
        """


@dataclass(frozen=True, eq=False)
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
        history: lists with one entry per iterate, the initial controls first: ``objective``,
            ``residual`` (total norm) and ``step_size`` (Euclidean length of the change of all
            controls since the iterate before).
    """

    controls: Controls
    states: list[Tensor]
    costates: list[Tensor]
    objective: float
    residual: Residual
    status: Status
    message: str
    history: dict[str, list[float]]

    @property
    def iterations(self) -> int:
        """The number of iterations; the initial controls are not counted."""
        return len(self.history["objective"]) - 1


def solve(
    problem: ControlProblem,
    solver: Solver,
    u0: Controls,
    *,
    max_steps: int,
    tol: float,
    callback: Callable[[Iterate], object] | None = None,
    progress: bool = False,
) -> Solution:
    """Run a solver from ``u0`` until the residual is at most ``tol`` or the steps run out.

    Args:
        problem: the problem to solve.
        solver: the method.
        u0: initial controls; their dtype, device and shapes are those of the solution.
        max_steps: the largest number of iterations; 0 only evaluates ``u0``.
        tol: absolute bound on the total residual norm ``(sum_t ||grad_u H_t||^2)^(1/2)``.
        callback: called with each `Iterate`. An exception in it, like an interrupt from the
            keyboard, ends the solve and reaches the caller: in a long solve, save iterates here.
        progress: show a progress bar.

    Returns:
        The solution. It is returned, not raised, when the solve did not converge: read its status.

    Raises:
        InputError: for a negative ``max_steps`` or ``tol``, or for controls that do not fit.

    Example:
        ``J(u) = 1/2 (1 + u)^2 + 1/2 u^2`` has its minimum 1/4 at ``u = -1/2``:

        >>> from theory import ControlProblem, LinearDynamics, MSA, QuadraticCost
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> cost = QuadraticCost.constant(1, Q=0 * one, R=one, Qf=one)
        >>> problem = ControlProblem(LinearDynamics.constant(1, one, one), cost, x0=one[0])
        >>> solution = solve(problem, MSA(0.5), problem.zero_controls(), max_steps=9, tol=1e-12)
        >>> solution.status.value, solution.objective, solution.controls[0].item()
        ('converged', 0.25, -0.5)
    """
    if max_steps < 0 or not tol >= 0:
        raise InputError(f"max_steps = {max_steps} and tol = {tol} must not be negative")
    problem.check_controls(u0)
    with tqdm(total=max_steps, disable=not progress, unit="step") as bar:
        recorder = _Recorder(max_steps, tol, callback, bar)
        failure = solver.run(problem, tuple(u.detach().clone() for u in u0), recorder)
    controls = recorder.best if recorder.best is not None else u0
    final = problem.evaluate(controls)
    residual = Residual.of(final.gradient)
    status = recorder.status(failure)
    return Solution(
        controls=controls,
        states=final.states,
        costates=final.costates,
        objective=float(final.objective),
        residual=residual,
        status=status,
        message=recorder.message(status, failure),
        history=recorder.history,
    )


@dataclass
class _Recorder:
    """The `Report` that `solve` gives to a solver."""

    max_steps: int
    tol: float
    callback: Callable[[Iterate], object] | None
    bar: Any
    best: Controls | None = None
    history: dict[str, list[float]] = field(
        default_factory=lambda: {"objective": [], "residual": [], "step_size": []}
    )

    def __call__(self, controls: Controls, evaluation: Evaluation) -> bool:
        value, residual = float(evaluation.objective), Residual.of(evaluation.gradient)
        iteration = len(self.history["objective"])
        self.history["objective"].append(value)
        self.history["residual"].append(residual.norm)
        self.history["step_size"].append(_distance(controls, self.best))
        finite = math.isfinite(value) and math.isfinite(residual.norm)
        if finite:
            self.best = controls
        if iteration:
            self.bar.update()
        self.bar.set_postfix_str(f"J={value:.4g} residual={residual.norm:.2e}", refresh=False)
        if self.callback is not None:
            self.callback(Iterate(iteration, controls, value, residual, evaluation))
        return not finite or residual.norm <= self.tol or iteration >= self.max_steps

    def status(self, failure: str | None) -> Status:
        value, residual = self.history["objective"][-1], self.history["residual"][-1]
        if not (math.isfinite(value) and math.isfinite(residual)):
            return Status.DIVERGED
        if residual <= self.tol:
            return Status.CONVERGED
        if failure is None or len(self.history["objective"]) > self.max_steps:
            return Status.MAX_STEPS
        return Status.LINE_SEARCH_FAILED

    def message(self, status: Status, failure: str | None) -> str:
        steps, residual = len(self.history["objective"]) - 1, self.history["residual"][-1]
        if status is Status.CONVERGED:
            return f"residual {residual:.3g} <= tol {self.tol:.3g} after {steps} iterations"
        if status is Status.DIVERGED and steps == 0:
            return (
                "the objective or its gradient is not finite at the initial controls; "
                "start elsewhere, and check the problem's data for NaN"
            )
        if status is Status.DIVERGED:
            return (
                f"the objective or its gradient was not finite at iteration {steps}; the last "
                "finite iterate is returned; try a smaller step or another start"
            )
        if status is Status.MAX_STEPS:
            return (
                f"residual {residual:.3g} > tol {self.tol:.3g} after all {steps} iterations; "
                "allow more steps, or try another step size or solver"
            )
        return (
            f"{failure}; residual {residual:.3g} > tol {self.tol:.3g} after {steps} iterations; "
            "the objective may not resolve smaller gradients in this precision: raise tol, use "
            "float64, or rescale the cost"
        )


def _distance(new: Controls, old: Controls | None) -> float:
    if old is None:
        return 0.0
    return math.hypot(
        *(float(torch.linalg.vector_norm(a - b)) for a, b in zip(new, old, strict=True))
    )
