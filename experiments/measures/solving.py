"""A solve: a solver of the theory on the control problem of a model and a few rows of its task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from deltacontrol.experiments.runs.experiment import Outcome, Workspace
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.training.finetune import Subject
from deltacontrol.experiments.training.settings import check_count, check_number

__all__ = ["Solve"]


@dataclass(frozen=True)
class Solve(Subject):
    """Solve the control problem of a delta on a few rows, in float64.

    J(u) = mean loss of the rows + weight_decay/2 Σ_t ‖u_t‖². The curve of the record is the
    solution's history: objective, residual, step_size and sweeps of every iterate, the start first.
    """

    kind: ClassVar[str] = "solve"

    solver: str = "newton-cg"
    """A solver and its options, such as ddp, newton-cg:radius=2, msa:rate=0.1 or adamw:lr=0.01."""
    rows: int = 8
    """The first so many training rows."""
    steps: int | None = None
    """Iterations at most; by default the solver's own number."""
    tol: float | None = None
    """The residual to reach; by default that of the start times eps^(1/3)."""
    weight_decay: float = 0.0
    """λ of the running cost λ/2 ‖u‖² of the controls."""

    def __post_init__(self) -> None:
        """Check the fields, and write the solver with all of its options."""
        from deltacontrol.theory import plugins
        from deltacontrol.theory.solvers import Solver, registry

        super().__post_init__()
        check_count(self, "rows", least=1)
        check_count(self, "steps", least=1)
        check_number(self, "tol", least=0.0)
        check_number(self, "weight_decay", least=0.0)
        solver: Any = self.solver
        if isinstance(solver, Solver):
            plugins.adopt(type(solver))
        else:
            solver = registry.parse(solver)
        object.__setattr__(self, "solver", registry.text_of(solver))

    @property
    def label(self) -> str:
        """Solver, model, task, deltas and seed."""
        return f"{self.solver} {super().label}"

    def setting(self, **rows: Any) -> Setting:
        """The model with its deltas in float64, and the rows; made anew at every call."""
        given = {"train_rows": self.rows, "strict_rows": True, "dtype": "float64"}
        return super().setting(**(given | rows))

    @classmethod
    def setting_of(cls, config: Mapping[str, Any], result: Mapping[str, Any]) -> Setting:
        """The setting of a recorded solve, its controls at their start."""
        made: Any = {name: result[name] for name in ("model_kind", "num_labels")}
        return replace(cls.from_config(config).setting(), **made)

    def execute(self, workspace: Workspace) -> Outcome:
        """Solve.

        The result holds ``initial_objective``, ``objective``, ``initial_residual`` and
        ``residual``, of each of ``stages`` the ``residuals`` before and after, num_controls a
        stage, iterations, sweeps, seconds, and what the model is. The status is the solver's.

        Raises:
            InputError: from the model, the task or the deltas, or because the solver cannot serve:
                the message names one that can.
        """
        from deltacontrol.experiments.training.execution import full_batch, sizes
        from deltacontrol.theory.solvers import registry

        setting = self.setting()
        solved = full_batch(
            setting,
            registry.parse(self.solver),
            steps=self.steps,
            tol=self.tol,
            weight_decay=self.weight_decay,
            folder=workspace.folder,
            progress=workspace.progress,
        )
        solution = solved.solution
        return Outcome(
            status=str(solution.status),
            result={
                "initial_objective": solved.objective,
                "objective": solution.objective,
                "initial_residual": solved.residual.norm,
                "residual": solution.residual.norm,
                "iterations": solution.iterations,
                "sweeps": float(solution.history["sweeps"].iloc[-1]),
                "seconds": solved.seconds,
                "stages": list(solved.stage_names),
                "residuals": {
                    "before": list(solved.residual.per_step),
                    "after": list(solution.residual.per_step),
                },
                "num_controls": [u.numel() for u in solution.controls],
                "model_kind": setting.kind,
                "num_labels": setting.classes,
                **sizes(setting.controlled),
            },
            curve=solution.history.reset_index(),
            controls=setting.controlled.state(),
            message=solution.message,
        )
