"""What all solvers share: the stopping rule, an honest status, the record of a solve.

A solver never says that it converged. It reports iterates; `solve` computes the residual
``(sum_t ||grad_u H_t||^2)^(1/2)`` of each (with a box, that of the projected gradient), stops when
it is at most ``tol``, and derives the status from the residual that was reached.

A solve can be interrupted and resumed. With ``checkpoint=path`` the controls, the history and the
solver's own memory are kept in one file (`deltacontrol.theory.solvers.checkpoint`), written at most
every few seconds and on the way out, whatever ends the solve; the same call continues from there.
"""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.problem import ControlProblem, Controls, Evaluation
from deltacontrol.theory.control.work import Meter, metered
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.curvature import Curvature
from deltacontrol.theory.linear.minimum import falling_curvature
from deltacontrol.theory.solvers.checkpoint import Checkpoint
from deltacontrol.theory.solvers.solution import HISTORY, Iterate, Memory, Solution, Status

__all__ = ["Ending", "Iterate", "Memory", "Report", "Solution", "Solver", "Status", "solve"]

CHECKPOINT_SECONDS = 5.0


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
        convex: whether the second-order model there was found to be positive definite, whole.
    """

    failure: Status | None = None
    reason: str = ""
    gains: tuple[Tensor, ...] | None = None
    convex: bool = False


class Solver(ABC):
    """A method that improves controls step by step.

    Attributes:
        takes_box: whether the method keeps the controls inside `ControlProblem.box`.
        default_steps: how many iterations `solve` allows where it is not told.
        linear_quadratic: whether it is for linear dynamics with a quadratic cost alone.
        descends: whether it accepts no iterate that raises ``J``, and ends where none lowers it.
        curvature: the second derivatives that it sees, by which `solve` tells a minimum from
            another stationary point; None where it sees none.
    """

    takes_box: ClassVar[bool] = False
    default_steps: ClassVar[int] = 200
    linear_quadratic: ClassVar[bool] = False
    descends: ClassVar[bool] = True
    curvature: ClassVar[type[Curvature] | None] = None

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


@typed
def solve(
    problem: ControlProblem,
    solver: Solver,
    u0: Controls | None = None,
    *,
    max_steps: int | None = None,
    tol: float | None = None,
    callback: Callable[[Iterate], object] | None = None,
    progress: bool = False,
    checkpoint: Path | str | None = None,
) -> Solution:
    """Run a solver from ``u0`` until the residual is at most ``tol`` or the steps run out.

    Args:
        problem: the problem to solve.
        solver: the method.
        u0: initial controls; their dtype, device and shapes are those of the solution. By default
            `ControlProblem.initial_controls`: zeros, or a model's present controls.
        max_steps: the largest number of iterations; 0 only evaluates ``u0``. By default the
            solver's ``default_steps``.
        tol: absolute bound on the total residual norm ``r = (sum_t ||grad_u H_t||^2)^(1/2)``. By
            default ``eps^(1/3) r(u0)``, with ``eps`` the precision of the controls (of the coarsest
            where they differ): ``6e-6 r(u0)`` in float64, ``5e-3 r(u0)`` in float32. A method that
            compares values of ``J`` reaches about ``(eps |J| lambda)^(1/2)``, ``lambda`` the
            curvature of ``J``, and ``r(u0)^2 <= 2 lambda (J(u0) - min J)`` where ``J`` is convex,
            so that the default leaves it room. As it is relative to the start, one that is solved
            already needs a ``tol`` of its own.
        callback: called with each new `Iterate`. An exception in it, like an interrupt from the
            keyboard, ends the solve and reaches the caller; a checkpoint is written first.
        progress: show a progress bar.
        checkpoint: a file from which an interrupted solve continues, and into which it is kept.
            The iterates are those of an uninterrupted solve, except for `Shooting`, whose L-BFGS
            starts with an empty memory again. Where the file cannot be written (a full disk), the
            solve goes on, warns, and says so in the solution's message.

    Returns:
        The solution. It is returned, not raised, when the solve did not converge: read its status.

    Raises:
        InputError: for a negative ``max_steps`` or ``tol``, for controls that do not fit, for a box
            that does not fit them or that the solver cannot keep, and for a checkpoint of another
            solver or problem, or in a folder that cannot be made.

    Example:
        ``J(u) = 1/2 (1 + u)^2 + 1/2 u^2`` has its minimum 1/4 at ``u = -1/2``:

        >>> from deltacontrol.theory import ControlProblem, LinearDynamics, MSA, QuadraticCost
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> cost = QuadraticCost.constant(1, Q=0 * one, R=one, Qf=one)
        >>> problem = ControlProblem(LinearDynamics.constant(1, one, one), cost, x0=one[0])
        >>> solve(problem, MSA(0.5))
        Solution
          status      converged
          J           0.25
          residual    0
          iterations  1
          message     residual 0 <= tol 6.06e-06 after 1 iterations
    """
    if not isinstance(solver, Solver):
        raise InputError(
            f"the solver is {solver!r}; expected an object such as NewtonCG(), which "
            "deltacontrol.theory.solvers.registry.parse makes of a text"
        )
    max_steps = solver.default_steps if max_steps is None else max_steps
    if max_steps < 0 or not (tol is None or tol >= 0):
        raise InputError(f"max_steps = {max_steps} and tol = {tol} must not be negative")
    u0 = problem.initial_controls() if u0 is None else u0
    problem.check_controls(u0)
    if problem.box is not None and not solver.takes_box:
        raise InputError(
            f"{type(solver).__name__} cannot keep the controls in a box; take MSA, Shooting, ILQR "
            "or DDP"
        )
    u = tuple(control.detach().clone() for control in u0)
    if problem.box is not None:
        problem.box.check(u)
        u = problem.box.project(u)
    with tqdm(total=max_steps, disable=not progress, unit="step") as bar:
        recorder = _Recorder(problem, solver, max_steps, tol, callback, bar)
        if checkpoint is not None:
            u = recorder.restore(Path(checkpoint), u)
            u = u if problem.box is None else problem.box.project(u)
        try:
            with metered() as recorder.meter:
                ending = solver.run(problem, u, recorder, recorder.memory) or Ending()
        finally:
            recorder.keep()
    controls = recorder.best if recorder.best is not None else u
    final = problem.evaluate(controls)
    status, falls = recorder.status(ending), None
    unsure = status is Status.CONVERGED and not (ending.convex and problem.box is None)
    if unsure and solver.curvature is not None:
        seen = solver.curvature(problem, controls, final, keep=getattr(solver, "keep", False))
        falls = falling_curvature(seen, problem.box and problem.box.inside(controls))
        status = status if falls is None else Status.STATIONARY
    import pandas as pd

    return Solution(
        controls=controls,
        states=final.states,
        costates=final.costates,
        objective=float(final.objective),
        residual=problem.residual_of(controls, final.gradient),
        status=status,
        message=recorder.message(status, ending, falls) + recorder.not_kept,
        history=pd.DataFrame(recorder.history).rename_axis(index="iteration"),
        gains=ending.gains,
    )


def _default_tolerance(residual: float, controls: Controls) -> float:
    """``eps^(1/3) r(u0)``."""
    eps = max((torch.finfo(u.dtype).eps for u in controls), default=0.0)
    return eps ** (1 / 3) * residual


@dataclass
class _Recorder:
    """The `Report` that `solve` gives to a solver."""

    problem: ControlProblem
    solver: Solver
    max_steps: int
    tol: float | None
    callback: Callable[[Iterate], object] | None
    bar: Any
    best: Controls | None = None
    memory: Memory = field(default_factory=dict)
    history: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in HISTORY})
    meter: Meter = field(default_factory=Meter)
    sweeps_before: float = 0.0
    checkpoint: Path | None = None
    kept: float = field(default_factory=time.monotonic)
    not_kept: str = ""
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
        if self.tol is None:
            self.tol = _default_tolerance(self.history["residual"][0], controls)
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
        if self.tol is not None and residual <= self.tol:
            return Status.CONVERGED
        if ending.failure is None or len(self.history["objective"]) > self.max_steps:
            return Status.MAX_STEPS
        return ending.failure

    def message(self, status: Status, ending: Ending, falls: float | None) -> str:
        steps, residual = len(self.history["objective"]) - 1, self.history["residual"][-1]
        tol = f"tol {self.tol:.3g}"
        missed = f"residual {residual:.3g} > {tol} after"
        if status is Status.CONVERGED:
            return f"residual {residual:.3g} <= {tol} after {steps} iterations"
        if status is Status.STATIONARY:
            return (
                f"residual {residual:.3g} <= {tol} after {steps} iterations, at a saddle or a "
                f"maximum: J has the curvature {falls:.3g} along a direction; start elsewhere, "
                "such as at small random controls, or add a running cost of the controls"
            )
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
        """Write the checkpoint; a failure to write is no failure of the solve."""
        if self.checkpoint is None or self.best is None:
            return
        self.kept = time.monotonic()
        try:
            Checkpoint(self.best, self.memory, self.history).write(
                self.checkpoint, repr(self.solver)
            )
        except OSError as error:
            warned = bool(self.not_kept)
            self.not_kept = (
                f"; the checkpoint {self.checkpoint} could not be written ({error}): save the "
                "solution elsewhere, or make room"
            )
            if not warned:
                warnings.warn(self.not_kept.removeprefix("; "), RuntimeWarning, stacklevel=3)
        else:
            self.not_kept = ""

    def restore(self, path: Path, u: Controls) -> Controls:
        """Keep checkpoints there; the controls from which to go on."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            there = path.exists()
        except (OSError, ValueError) as error:
            raise InputError(
                f"the folder of the checkpoint {path} cannot be made ({error}); name another file"
            ) from error
        self.checkpoint = path
        if not there:
            return u
        found = Checkpoint.read(path, repr(self.solver), u)
        self.history, self.memory, self.resumed = found.history, found.memory, True
        self.sweeps_before = found.history["sweeps"][-1]
        self.bar.update(len(found.history["objective"]) - 1)
        return found.controls


def _distance(new: Controls, old: Controls | None) -> float:
    if old is None:
        return 0.0
    return math.hypot(
        *(float(torch.linalg.vector_norm(a - b)) for a, b in zip(new, old, strict=True))
    )
