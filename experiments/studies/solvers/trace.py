"""Solvers of one fine-tuning side by side, by work and by time.

A delta is trained on fixed examples, in float64 and without dropout, so that

    J(u) = mean cross-entropy + λ/2 Σ_t ‖u_t‖²

is one deterministic optimal-control problem. Every solver starts at the same controls and may spend
the same work, counted in gradients: one gradient is a sweep forward and a sweep backward through
all stages, a Gauss-Newton product another two sweeps, a product with the Hessian three
(`deltacontrol.theory.control.work`). Time is the processor's, on one thread, so that other programs
do not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    from deltacontrol.theory.control.problem import ControlProblem, Controls, Evaluation, Residual
    from deltacontrol.theory.control.work import Meter
    from deltacontrol.theory.solvers import Iterate, Solver

SOLVERS = ("gauss-newton", "newton-cg", "lbfgs", "msa", "adamw")
RATES: Mapping[str, tuple[float, ...]] = {
    "msa": (3.0, 1.0, 0.3, 0.1),
    "adamw": (3e-2, 1e-2, 3e-3, 1e-3),
}


@dataclass(frozen=True)
class SolverTrace(Experiment):
    """Solve one fine-tuning and record objective, residual, work and time of every iterate.

    MSA's step size and AdamW's rate are the largest of `RATES` that last: candidates are tried from
    the largest down, and one is given up when J rises to twice its lowest so far. (A shorter search
    would mislead: curvature grows along the way, and rates that were best for a hundred steps have
    become unstable later.) The failed candidates are recorded and not charged.

    Attributes:
        solver: "gauss-newton", "newton-cg", "lbfgs" (shooting), "msa" (a gradient step on H) or
            "adamw" (no decoupled decay, rate falling linearly to zero over the budget).
        delta: the delta, as a dictionary with its name; the task's head is trained with it.
        model: the model.
        task: a classification task; its first training examples are the fixed set.
        num_examples: how many examples.
        max_length: tokens of an example at most.
        gradients: the budget.
        weight_decay: λ.
        tolerance: on the total residual (Σ_t ‖∇_u H_t‖²)^½.
        seed: seed of the head's and the controls' initial values.
    """

    solver: str = "newton-cg"
    delta: Mapping[str, Any] = field(default_factory=lambda: {"name": "lora"})
    model: str = "minilm-l6"
    task: str = "movie"
    num_examples: int = 4
    max_length: int = 12
    gradients: int = 600
    weight_decay: float = 1e-2
    tolerance: float = 1e-8
    seed: int = 0

    kind: ClassVar[str] = "solver-trace"
    in_full: ClassVar[tuple[str, ...]] = ("delta",)

    def __post_init__(self) -> None:
        """Check the solver and the sizes."""
        if self.solver not in SOLVERS:
            raise unknown("solver", self.solver, SOLVERS)
        if self.num_examples < 1 or self.gradients < 5:
            raise InputError(
                f"num_examples is {self.num_examples} and gradients is {self.gradients}; expected "
                "at least 1 example and 5 gradients"
            )

    @property
    def label(self) -> str:
        """Solver and seed."""
        return f"solver {self.solver} seed {self.seed}"

    @property
    def steps(self) -> int:
        """The budget, by the name that all experiments share."""
        return self.gradients

    def execute(self, workspace: Workspace) -> Outcome:
        """Choose a rate where the solver has one, then solve."""
        import pandas as pd
        import torch

        from deltacontrol.experiments.setting import Setting

        setting = Setting(
            self.model,
            self.task,
            deltas=(self.delta,),
            train_rows=self.num_examples,
            expects="classification",
            max_length=self.max_length,
            dtype="float64",
            seed=self.seed,
        )
        problem = setting.control_problem(weight_decay=self.weight_decay)
        start = problem.dynamics.controls()  # type: ignore[attr-defined]
        trace, rate = None, None
        search: list[dict[str, Any]] = []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for rate in RATES.get(self.solver, (None,)):
                trace = self._trace(problem, start, rate, workspace.progress)
                if rate is not None:
                    reached = {k: trace.rows[-1][k] for k in ("objective", "gradients")}
                    search.append({"rate": rate, "status": trace.status, **reached})
                if trace.status != "unstable":
                    break
        finally:
            torch.set_num_threads(threads)
        assert trace is not None
        last = trace.rows[-1]
        result = {
            "status": trace.status,
            "rate": rate,
            "search": search,
            "num_controls": sum(problem.dynamics.control_sizes),
            "objective": last["objective"],
            "residual": last["residual"],
            "iterations": last["iteration"],
            "gradients": last["gradients"],
            "seconds": last["seconds"],
        }
        message = f"residual {last['residual']:.2e} after {last['gradients']:.0f} gradients"
        return Outcome("completed", result, pd.DataFrame(trace.rows), None, message)

    def _trace(
        self,
        problem: ControlProblem,
        start: Controls,
        rate: float | None,
        progress: bool,
    ) -> _Trace:
        """Solve until the budget is spent, or until a rate has shown to be unstable."""
        from deltacontrol.theory.control.work import metered

        with metered() as meter:
            watched = rate is not None
            trace = _Trace(meter, problem.dynamics.horizon, self.gradients, watched)
            try:
                trace.status = self._solve(problem, start, rate, trace, progress)
            except _Ended as ended:
                trace.status = str(ended)
        return trace

    def _solve(
        self,
        problem: ControlProblem,
        start: Controls,
        rate: float | None,
        trace: _Trace,
        progress: bool,
    ) -> str:
        from deltacontrol.theory.solvers import solve

        def note(iterate: Iterate) -> None:
            trace.note(iterate.iteration, iterate.evaluation, iterate.residual)

        solution = solve(
            problem,
            self._solver(rate),
            start,
            max_steps=10**9,
            tol=self.tolerance,
            callback=note,
            progress=progress,
        )
        return str(solution.status)

    def _solver(self, rate: float | None) -> Solver:
        import torch

        from deltacontrol.theory.solvers import MSA, GaussNewton, NewtonCG, Shooting, TorchOptimiser

        if rate is None:
            made = {"gauss-newton": GaussNewton, "newton-cg": NewtonCG, "lbfgs": Shooting}
            return made[self.solver]()
        if self.solver == "msa":
            return MSA(rate)
        falling = partial(
            torch.optim.lr_scheduler.LinearLR,
            start_factor=1.0,
            end_factor=0.0,
            total_iters=self.gradients,
        )
        return TorchOptimiser("AdamW", lr=rate, weight_decay=0.0, schedule=falling)


class _Ended(Exception):
    """Ends a solve whose budget is spent, or which has become unstable."""


class _Trace:
    """The rows of a curve; ends the solve when it must not go on."""

    def __init__(self, meter: Meter, horizon: int, budget: int, watched: bool) -> None:
        self.meter, self.horizon, self.budget = meter, horizon, budget
        self.watched = watched
        self.rows: list[dict[str, float]] = []
        self.status = "budget"
        self._lowest = math.inf
        self._began = time.process_time()

    def note(self, iteration: int, now: Evaluation, residual: Residual) -> None:
        """Add an iterate; raise `_Ended` once the budget is used up or J has risen too far."""
        gradients, objective = self.meter.steps / self.horizon / 2, float(now.objective)
        self.rows.append(
            {
                "iteration": iteration,
                "objective": objective,
                "residual": residual.norm,
                "gradients": gradients,
                "seconds": time.process_time() - self._began,
            }
        )
        self._lowest = min(self._lowest, objective)
        if self.watched and not objective < 2 * self._lowest:
            raise _Ended("unstable")
        if gradients >= self.budget:
            raise _Ended("budget")
