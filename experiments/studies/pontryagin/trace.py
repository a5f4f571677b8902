"""Pontryagin's conditions along a real fine-tuning.

A delta is trained on a fixed set of examples, in float64 and without dropout, so that

    J(u) = mean cross-entropy + λ/2 Σ_t ‖u_t‖²

is one deterministic optimal-control problem. At every iteration the costates give the gradient of
each stage, ∇_u H_t(x_t, u_t, p_{t+1}); at an optimum all of them vanish.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from deltacontrol.experiments import models, tasks
from deltacontrol.experiments.runs.experiment import Digests, Experiment, Outcome, Workspace
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.theory.control.problem import ControlProblem, Controls, Residual

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

    def __post_init__(self) -> None:
        """Check the optimiser and the sizes."""
        if self.optimiser not in OPTIMISERS:
            raise unknown("optimiser", self.optimiser, OPTIMISERS)
        if self.num_examples < 1 or self.steps < 1:
            raise InputError(
                f"num_examples is {self.num_examples} and steps is {self.steps}; expected at least "
                "1 of each."
            )

    def to_config(self) -> dict[str, Any]:
        """The fields, with the delta's defaults filled in."""
        from deltacontrol.deltas.registry import from_dict

        return {**asdict(self), "delta": from_dict(self.delta).to_dict()}

    def digests(self) -> Digests:
        """Digests of model and task."""
        return Digests(models.digest(self.model), tasks.digest(self.task))

    @property
    def label(self) -> str:
        """Delta and optimiser."""
        return f"pontryagin {self.delta['name']} {self.optimiser} seed {self.seed}"

    def execute(self, workspace: Workspace) -> Outcome:
        """Train, recording residuals and costates; compare with autograd at both ends."""
        import pandas as pd

        from deltacontrol.experiments.measures.identities import identity_difference
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
        dynamics: Any = problem.dynamics
        start = dynamics.controls()
        rows: list[dict[str, float]] = []
        first = identity_difference(problem, start)
        train = _with_lbfgs if self.optimiser == "lbfgs" else _with_adamw
        final, status, message = train(self, problem, start, rows, workspace.progress)
        last = identity_difference(problem, final)
        result = {
            "status": status,
            "stages": list(dynamics.stage_names),
            "num_controls": list(dynamics.control_sizes),
            "objective": rows[-1]["objective"],
            "residual": rows[-1]["residual"],
            "iterations": len(rows) - 1,
            "identity_relative_difference": max(first, last),
            "replay_error": dynamics.replay_error,
        }
        controls = setting.controlled.state()
        return Outcome("completed", result, pd.DataFrame(rows), controls, message)


def _row(
    problem: ControlProblem, objective: float, residual: Residual, costates: list[Tensor]
) -> dict[str, float]:
    names = problem.dynamics.stage_names  # type: ignore[attr-defined]
    row = {"objective": objective, "residual": residual.norm}
    row |= {f"residual_{n}": value for n, value in zip(names, residual.per_step, strict=True)}
    # p_{t+1} is the costate behind stage t
    row |= {f"costate_{n}": float(p.norm()) for n, p in zip(names, costates[1:], strict=True)}
    return row


def _with_lbfgs(
    trace: PontryaginTrace,
    problem: ControlProblem,
    start: Controls,
    rows: list[dict[str, float]],
    progress: bool,
) -> tuple[Controls, str, str]:
    from deltacontrol.theory.solvers import Shooting, solve

    def note(iterate: Any) -> None:
        costates = iterate.evaluation.costates
        row = _row(problem, iterate.objective, iterate.residual, costates)
        rows.append({"iteration": iterate.iteration, **row})

    solution = solve(
        problem,
        Shooting(),
        start,
        max_steps=trace.steps,
        tol=trace.tolerance,
        callback=note,
        progress=progress,
    )
    return solution.controls, str(solution.status), solution.message


def _with_adamw(
    trace: PontryaginTrace,
    problem: ControlProblem,
    start: Controls,
    rows: list[dict[str, float]],
    progress: bool,
) -> tuple[Controls, str, str]:
    import torch
    from tqdm.auto import tqdm

    from deltacontrol.theory.control.problem import Residual

    controls = tuple(torch.nn.Parameter(u.clone()) for u in start)
    optimiser = torch.optim.AdamW(controls, lr=trace.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=trace.steps)
    for iteration in tqdm(range(trace.steps + 1), disable=not progress, unit="step"):
        now = problem.evaluate(tuple(u.detach() for u in controls))
        residual = Residual.of(now.gradient)
        row = _row(problem, float(now.objective), residual, now.costates)
        rows.append({"iteration": iteration, **row})
        if not torch.isfinite(now.objective):
            return tuple(u.detach() for u in controls), "diverged", "J is not finite"
        if residual.norm <= trace.tolerance or iteration == trace.steps:
            break
        for control, gradient in zip(controls, now.gradient, strict=True):
            control.grad = gradient
        optimiser.step()
        schedule.step()
    status = "converged" if residual.norm <= trace.tolerance else "max_steps"
    message = f"residual {residual.norm:.2e} after {len(rows) - 1} steps of AdamW"
    return tuple(u.detach() for u in controls), status, message
