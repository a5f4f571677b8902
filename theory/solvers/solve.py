"""What all solvers share: iterates, the stopping rule, an honest status, the solution.

A solver never says that it converged. It reports iterates; `solve` computes the residual
``(sum_t ||grad_u H_t||^2)^(1/2)`` of each (with a box, that of the projected gradient), stops when
it is at most ``tol``, and derives the status from the residual that was reached.

A solve can be interrupted and resumed. With ``checkpoint=path`` the controls, the history and the
solver's own memory are kept in one safetensors file, written at most every few seconds and on the
way out, whatever ends the solve; the same call continues from there.
"""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from deltacontrol.theory.control.problem import ControlProblem, Controls, Evaluation, Residual
from deltacontrol.theory.control.work import Meter, metered
from deltacontrol.theory.errors import InputError

__all__ = ["Ending", "Iterate", "Memory", "Report", "Solution", "Solver", "Status", "solve"]


Memory = Mapping[str, Tensor]

CHECKPOINT_SECONDS = 5.0


class Status(StrEnum):
    """How a solve ended."""

    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    DIVERGED = "diverged"
    LINE_SEARCH_FAILED = "line_search_failed"
    UNBOUNDED = "unbounded"


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

    def __call__(
        self, controls: Controls, evaluation: Evaluation, memory: Memory | None = None
    ) -> bool:
        """Record the iterate and return True if the solver must stop.

        ``memory`` is what the solver needs beside the controls to go on from here, such as its
        damping: plain tensors, kept in the checkpoint.
        """
        ...


@dataclass(frozen=True, eq=False)
class Ending:
    """What a solver hands over when it returns.

    Attributes:
        failure: ``LINE_SEARCH_FAILED`` or ``UNBOUNDED`` if the method itself could not go on;
            not looked at where the residual or the steps ended the solve.
        reason: what happened, and what to try.
        gains: feedback gains ``K_t`` around the last iterate, ``(m_t, n_t)``, from solvers that
            have them.
    """

    failure: Status | None = None
    reason: str = ""
    gains: tuple[Tensor, ...] | None = None


class Solver(ABC):
    """A method that improves controls step by step.

    Attributes:
        takes_box: whether the method keeps the controls inside `ControlProblem.box`.
        linear_quadratic: whether it is for linear dynamics with a quadratic cost alone.
        descends: whether it accepts no iterate that raises ``J``, and ends where none lowers it.
    """

    takes_box: ClassVar[bool] = False
    linear_quadratic: ClassVar[bool] = False
    descends: ClassVar[bool] = True

    @classmethod
    def example(cls, problem: ControlProblem, u0: Controls) -> Solver:
        """An instance that solves the problem from ``u0``, for tests; by default the defaults."""
        return cls()

    @abstractmethod
    def run(
        self, problem: ControlProblem, u0: Controls, report: Report, memory: Memory
    ) -> Ending | None:
        """Report ``u0``, then each new iterate, until `report` answers True.

        Args:
            problem: the problem to solve.
            u0: the initial controls.
            report: takes the controls of an iterate and what `ControlProblem.evaluate` gives there.
            memory: empty, or what the solver reported with ``u0`` when the solve was interrupted.

        Returns:
            None, or an `Ending` with gains or with the reason why the method could not go on.
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
            ``residual`` (total norm), ``step_size`` (Euclidean length of the change of all
            controls since the iterate before) and ``sweeps`` (the work so far in passes through all
            steps, as `deltacontrol.theory.control.work` counts it; a gradient is two).
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
    history: dict[str, list[float]]
    gains: tuple[Tensor, ...] | None = None

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
    checkpoint: Path | str | None = None,
) -> Solution:
    """Run a solver from ``u0`` until the residual is at most ``tol`` or the steps run out.

    Args:
        problem: the problem to solve.
        solver: the method.
        u0: initial controls; their dtype, device and shapes are those of the solution.
        max_steps: the largest number of iterations; 0 only evaluates ``u0``.
        tol: absolute bound on the total residual norm ``(sum_t ||grad_u H_t||^2)^(1/2)``.
        callback: called with each new `Iterate`. An exception in it, like an interrupt from the
            keyboard, ends the solve and reaches the caller; a checkpoint is written first.
        progress: show a progress bar.
        checkpoint: a file from which an interrupted solve continues, and into which it is kept.
            The iterates are those of an uninterrupted solve, except for `Shooting`, whose L-BFGS
            starts with an empty memory again.

    Returns:
        The solution. It is returned, not raised, when the solve did not converge: read its status.

    Raises:
        InputError: for a negative ``max_steps`` or ``tol``, for controls that do not fit, for a box
            that the solver cannot keep, and for a checkpoint of another solver or problem.

    Example:
        ``J(u) = 1/2 (1 + u)^2 + 1/2 u^2`` has its minimum 1/4 at ``u = -1/2``:

        >>> from deltacontrol.theory import ControlProblem, LinearDynamics, MSA, QuadraticCost
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
    if problem.box is not None and not solver.takes_box:
        raise InputError(
            f"{type(solver).__name__} cannot keep the controls in a box; take MSA, Shooting, ILQR "
            "or DDP"
        )
    u = tuple(control.detach().clone() for control in u0)
    if problem.box is not None:
        u = problem.box.project(u)
    with tqdm(total=max_steps, disable=not progress, unit="step") as bar:
        recorder = _Recorder(problem, solver, max_steps, tol, callback, bar)
        if checkpoint is not None:
            recorder.checkpoint = Path(checkpoint)
            u = recorder.restore(u)
            u = u if problem.box is None else problem.box.project(u)
        try:
            with metered() as recorder.meter:
                ending = solver.run(problem, u, recorder, recorder.memory) or Ending()
        finally:
            recorder.keep()
    controls = recorder.best if recorder.best is not None else u
    final = problem.evaluate(controls)
    status = recorder.status(ending)
    return Solution(
        controls=controls,
        states=final.states,
        costates=final.costates,
        objective=float(final.objective),
        residual=problem.residual_of(controls, final.gradient),
        status=status,
        message=recorder.message(status, ending),
        history=recorder.history,
        gains=ending.gains,
    )


@dataclass
class _Recorder:
    """The `Report` that `solve` gives to a solver."""

    problem: ControlProblem
    solver: Solver
    max_steps: int
    tol: float
    callback: Callable[[Iterate], object] | None
    bar: Any
    best: Controls | None = None
    memory: Memory = field(default_factory=dict)
    history: dict[str, list[float]] = field(
        default_factory=lambda: {"objective": [], "residual": [], "step_size": [], "sweeps": []}
    )
    meter: Meter = field(default_factory=Meter)
    sweeps_before: float = 0.0
    checkpoint: Path | None = None
    kept: float = field(default_factory=time.monotonic)
    resumed: bool = False

    def __call__(
        self, controls: Controls, evaluation: Evaluation, memory: Memory | None = None
    ) -> bool:
        value = float(evaluation.objective)
        residual = self.problem.residual_of(controls, evaluation.gradient)
        finite = math.isfinite(value) and math.isfinite(residual.norm)
        known, self.resumed = self.resumed, False
        if known:
            self.check_same_problem(value, evaluation.objective.dtype)
            # This work is in the history already.
            self.sweeps_before -= self.meter.steps / max(self.problem.dynamics.horizon, 1)
        else:
            self.history["objective"].append(value)
            self.history["residual"].append(residual.norm)
            self.history["step_size"].append(_distance(controls, self.best))
            self.history["sweeps"].append(self.sweeps())
        iteration = len(self.history["objective"]) - 1
        if finite:
            self.best, self.memory = controls, dict(memory or {})
        if iteration and not known:
            self.bar.update()
        self.bar.set_postfix_str(f"J={value:.4g} residual={residual.norm:.2e}", refresh=False)
        if self.callback is not None and not known:
            self.callback(Iterate(iteration, controls, value, residual, evaluation))
        if time.monotonic() - self.kept > CHECKPOINT_SECONDS:
            self.keep()
        over = residual.norm <= self.tol or iteration >= self.max_steps
        return over or not finite or self.unbounded()

    def sweeps(self) -> float:
        """Passes through all steps since the solve began."""
        horizon = max(self.problem.dynamics.horizon, 1)
        return self.sweeps_before + self.meter.steps / horizon

    def check_same_problem(self, value: float, dtype: torch.dtype) -> None:
        """Refuse a checkpoint whose controls do not give the objective that it holds."""
        kept = self.history["objective"][-1]
        # Another machine may round differently; another problem gives another number.
        rounding = torch.finfo(dtype).eps ** 0.5
        scale = abs(self.history["objective"][0])
        if not math.isclose(value, kept, rel_tol=rounding, abs_tol=rounding * scale):
            raise InputError(
                f"{self.checkpoint} is a checkpoint of another problem: its controls had J = "
                f"{kept:.6g} and have {value:.6g} here; delete it to start anew, or name another "
                "file"
            )

    def unbounded(self) -> bool:
        """Whether ``J`` fell so far that its first value no longer counts beside it."""
        first, last = self.history["objective"][0], self.history["objective"][-1]
        eps = torch.finfo(torch.float64).eps
        return last < -max(1.0, abs(first)) / eps

    def status(self, ending: Ending) -> Status:
        value, residual = self.history["objective"][-1], self.history["residual"][-1]
        if self.unbounded():
            return Status.UNBOUNDED
        if not (math.isfinite(value) and math.isfinite(residual)):
            return Status.DIVERGED
        if residual <= self.tol:
            return Status.CONVERGED
        if ending.failure is None or len(self.history["objective"]) > self.max_steps:
            return Status.MAX_STEPS
        return ending.failure

    def message(self, status: Status, ending: Ending) -> str:
        steps, residual = len(self.history["objective"]) - 1, self.history["residual"][-1]
        missed = f"residual {residual:.3g} > tol {self.tol:.3g} after"
        if status is Status.CONVERGED:
            return f"residual {residual:.3g} <= tol {self.tol:.3g} after {steps} iterations"
        if status is Status.UNBOUNDED:
            fell = f"J fell to {self.history['objective'][-1]:.3g}, so that it has no minimum"
            return (
                f"{ending.reason or fell}; after {steps} iterations; add or raise the running cost "
                "of the controls (a weight decay), or bound them by a box"
            )
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
                f"{missed} all {steps} iterations; allow more steps, or try another step size or "
                "solver"
            )
        return (
            f"{ending.reason}; {missed} {steps} iterations; the objective may not resolve smaller "
            "gradients in this precision: raise tol, use float64, or rescale the cost"
        )

    def keep(self) -> None:
        """Write the checkpoint: the last finite iterate, the history, the solver's memory."""
        if self.checkpoint is None or self.best is None:
            return
        tensors = {f"control.{t}": u.contiguous() for t, u in enumerate(self.best)}
        tensors |= {f"memory.{name}": v.contiguous() for name, v in self.memory.items()}
        metadata = {"solver": repr(self.solver), "history": json.dumps(self.history)}
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.checkpoint.with_name(self.checkpoint.name + ".tmp")
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(self.checkpoint)
        self.kept = time.monotonic()

    def restore(self, u: Controls) -> Controls:
        """The controls from which to go on: those of the checkpoint if there is one."""
        path = self.checkpoint
        if path is None or not path.exists():
            return u
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            solver, history = metadata["solver"], json.loads(metadata["history"])
            history = {name: [float(value) for value in history[name]] for name in self.history}
            lengths = {len(values) for values in history.values()}
            if len(lengths) != 1 or lengths == {0}:
                raise ValueError("its history is empty or uneven")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is no checkpoint of a solve ({error}); delete it to start anew"
            ) from error
        if solver != repr(self.solver):
            raise InputError(
                f"{path} is a checkpoint of {solver}, not of {self.solver!r}; delete it to start "
                "anew, or name another file"
            )
        kept = [name for name in tensors if name.startswith("control.")]
        names = [f"control.{t}" for t in range(len(kept))]
        found = [tuple(tensors[name].shape) for name in names if name in tensors]
        if len(kept) != len(u) or found != [tuple(control.shape) for control in u]:
            raise InputError(
                f"{path} holds controls of shapes {found}; expected "
                f"{[tuple(control.shape) for control in u]}; delete it to start anew"
            )
        self.history, self.resumed = history, True
        if not math.isfinite(history["objective"][-1] + history["residual"][-1]):
            for values in history.values():  # the checkpoint holds the finite iterate before it
                values.pop()
        self.sweeps_before = history["sweeps"][-1]
        self.bar.update(len(history["objective"]) - 1)
        self.memory = {
            name.removeprefix("memory."): value.to(u[0].device) if u else value
            for name, value in tensors.items()
            if name.startswith("memory.")
        }
        return tuple(
            tensors[name].to(control.device, control.dtype)
            for name, control in zip(names, u, strict=True)
        )


def _distance(new: Controls, old: Controls | None) -> float:
    if old is None:
        return 0.0
    return math.hypot(
        *(float(torch.linalg.vector_norm(a - b)) for a, b in zip(new, old, strict=True))
    )
