"""Pontryagin's conditions along a real fine-tuning.

A delta is trained on a fixed set of examples, in float64 and without dropout, so that

    J(u) = mean cross-entropy + λ/2 Σ_t ‖u_t‖²

is one deterministic optimal-control problem. At every iteration the costates give the gradient of
each stage, ∇_u H_t(x_t, u_t, p_{t+1}); at an optimum all of them vanish.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    from deltacontrol.theory.control.problem import ControlProblem
    from deltacontrol.theory.solvers import Iterate, Solver

OPTIMISERS = ("lbfgs", "adamw")


@dataclass(frozen=True)
class PontryaginTrace(Experiment):
    """Train a delta on fixed examples and record the stationarity residual of every stage.

    Attributes:
        delta: the delta, as a dictionary with its name; the task's head is trained with it.
        model: the model.
        task: a classification task; its first training examples are the fixed set.
        optimiser: "lbfgs" (shooting on J until ``tolerance``) or "adamw" (full-batch AdamW without
            decoupled decay, linearly decaying rate: fine-tuning as it is usually done).
        num_examples: how many examples.
        max_length: tokens of an example at most.
        steps: largest number of iterations.
        learning_rate: peak rate of AdamW.
        weight_decay: λ.
        tolerance: on the total residual (Σ_t ‖∇_u H_t‖²)^½.
        seed: seed of the head's and the controls' initial values.
    """

    delta: Mapping[str, Any] = field(default_factory=lambda: {"name": "lora"})
    model: str = "minilm-l6"
    task: str = "movie"
    optimiser: str = "lbfgs"
    num_examples: int = 32
    max_length: int = 32
    steps: int = 400
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    tolerance: float = 1e-6
    seed: int = 0

    kind: ClassVar[str] = "pontryagin"
    in_full: ClassVar[tuple[str, ...]] = ("delta",)

    def __post_init__(self) -> None:
        """Check the optimiser and the sizes."""
        if self.optimiser not in OPTIMISERS:
            raise unknown("optimiser", self.optimiser, OPTIMISERS)
        if self.num_examples < 1 or self.steps < 1:
            raise InputError(
                f"num_examples is {self.num_examples} and steps is {self.steps}; expected at least "
                "1 of each."
            )

    @property
    def label(self) -> str:
        """Delta and optimiser."""
        return f"pontryagin {self.delta['name']} {self.optimiser} seed {self.seed}"

    def execute(self, workspace: Workspace) -> Outcome:
        """Train, recording residuals and costates; compare with autograd at both ends."""
        import pandas as pd

        from deltacontrol.experiments.measures.identities import identity_difference
        from deltacontrol.experiments.setting import Setting
        from deltacontrol.theory.solvers import solve

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
        dynamics: Any = problem.dynamics
        start = dynamics.controls()
        rows: list[dict[str, float]] = []
        first = identity_difference(problem, start)

        def note(iterate: Iterate) -> None:
            rows.append({"iteration": iterate.iteration, **_row(problem, iterate)})

        solution = solve(
            problem,
            _solver(self),
            start,
            max_steps=self.steps,
            tol=self.tolerance,
            callback=note,
            progress=workspace.progress,
        )
        last = identity_difference(problem, solution.controls)
        result = {
            "status": str(solution.status),
            "stages": list(dynamics.stage_names),
            "num_controls": list(dynamics.control_sizes),
            "objective": rows[-1]["objective"],
            "residual": rows[-1]["residual"],
            "iterations": len(rows) - 1,
            "identity_relative_difference": max(first, last),
            "replay_error": dynamics.replay_error,
        }
        controls = setting.controlled.state()
        return Outcome("completed", result, pd.DataFrame(rows), controls, solution.message)


def _row(problem: ControlProblem, at: Iterate) -> dict[str, float]:
    names = problem.dynamics.stage_names  # type: ignore[attr-defined]
    row = {"objective": at.objective, "residual": at.residual.norm}
    row |= {f"residual_{n}": value for n, value in zip(names, at.residual.per_step, strict=True)}
    # p_{t+1} is the costate behind stage t
    costates = at.evaluation.costates[1:]
    row |= {f"costate_{n}": float(p.norm()) for n, p in zip(names, costates, strict=True)}
    return row


def _solver(trace: PontryaginTrace) -> Solver:
    import torch

    from deltacontrol.theory.solvers import Shooting, TorchOptimiser

    if trace.optimiser == "lbfgs":
        return Shooting()
    falling = partial(
        torch.optim.lr_scheduler.LinearLR,
        start_factor=1.0,
        end_factor=0.0,
        total_iters=trace.steps,
    )
    return TorchOptimiser("AdamW", lr=trace.learning_rate, weight_decay=0.0, schedule=falling)
