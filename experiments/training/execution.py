"""What a fine-tuning does: train on small batches, or solve the control problem of all rows.

An optimiser is a solver of the same problem: both start from one `Setting`, move the controls of
its `DeltaModel`, and leave it trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch import Tensor

from deltacontrol.deltas import DeltaModel
from deltacontrol.experiments.heads import head_controls
from deltacontrol.experiments.runs.experiment import Outcome, Workspace
from deltacontrol.experiments.runs.interrupts import deferred
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.training import loop as training
from deltacontrol.experiments.training import sequential as stages
from deltacontrol.experiments.training.devices import PeakMemory, autocast, cast_once
from deltacontrol.experiments.training.evaluation import MONITORED, evaluate
from deltacontrol.experiments.training.results import TrainingResult
from deltacontrol.experiments.training.settings import METRICS, Options, Settings
from deltacontrol.theory.control.problem import ControlProblem, Residual
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers import Iterate, Solution, Solver, Status, solve
from deltacontrol.theory.solvers.footprint import Footprint, obstacle

if TYPE_CHECKING:
    from deltacontrol.experiments.tasks.encoding import Encoded
    from deltacontrol.experiments.tracking import Trackers

__all__ = ["Solved", "fine_tune", "full_batch", "sizes"]

CHECKPOINT = "solve.safetensors"


def fine_tune(
    setting: Setting,
    options: Options,
    workspace: Workspace,
    *,
    batch_size: int,
    evaluate_on: str,
    sequential: bool,
    trackers: Trackers,
) -> Outcome:
    """Train the controls of a setting, and evaluate; the model stays trained.

    Args:
        setting: model, deltas and rows.
        options: how to train; their optimiser decides between small batches and a solver.
        workspace: for checkpoints.
        batch_size: examples of an update, and of a batch of the evaluation.
        evaluate_on: the rows of the result's metrics.
        sequential: train the deltas one after another.
        trackers: are told how it goes, and how it ended.

    Raises:
        InputError: as `deltacontrol.experiments.training.finetune.FineTuning.execute`.
    """
    task, encoded, model = setting.data, setting.encoded, setting.controlled
    in_half = setting.dtype == "bfloat16"
    if in_half:  # steps smaller than a rounding of bfloat16 are not lost
        model.controls.float()
    solver = options.solver()
    if solver is not None:
        trained = _by_solver(setting, solver, options, workspace)
        for row in trained.curve.to_dict("records"):
            trackers.row({str(name): value for name, value in row.items()})
    else:
        paused = {} if sequential else {"pause_after": workspace.pause_after}
        train: Any = stages.train_in_turn if sequential else training.train
        trained = train(
            model,
            TrainingBatches(encoded, options.seed, batch_size),
            training_settings(options, task.kind, workspace.checkpoint_seconds),
            evaluate=trackers.evaluated(partial(metrics_on, setting, "validation", batch_size)),
            checkpoint_dir=workspace.folder,
            progress=workspace.progress,
            tell=trackers.row,
            **paused,
        )
    if in_half:
        model.controls.bfloat16()
    precision = trained.measures["precision"]
    with autocast(precision, trained.measures["device"]), cast_once(model.model, precision):
        outcome = outcome_of(
            setting,
            trained,
            evaluate_on,
            model,
            lambda split: metrics_on(setting, split, batch_size, model),
        )
    trackers.end(outcome.result)
    return outcome


def training_settings(options: Options, kind: str, checkpoint_seconds: float) -> Settings:
    """The settings of the loop for a task of that kind."""
    monitor, larger_is_better = MONITORED[kind]
    return Settings.of(
        options,
        kind=kind,
        monitor=monitor,
        larger_is_better=larger_is_better,
        checkpoint_seconds=checkpoint_seconds,
    )


def metrics_on(setting: Setting, split: str, batch_size: int, module: Any) -> dict[str, float]:
    """Metrics of a model on a split of a setting's rows."""
    return evaluate(module, setting.encoded.eval_batches(split, batch_size), setting.data.kind)


def outcome_of(
    setting: Setting,
    trained: TrainingResult,
    evaluate_on: str,
    model: DeltaModel,
    metrics: Callable[[str], dict[str, float]],
) -> Outcome:
    """What a training hands back, its metrics on ``evaluate_on`` among it; none if it diverged."""
    task, measures, diverged = setting.data, trained.measures, trained.status == "diverged"
    final = dict.fromkeys(METRICS[task.kind]) if diverged else metrics(evaluate_on)
    best = {}
    if trained.best is not None:
        best[f"best_validation_{MONITORED[task.kind][0]}"] = trained.best["value"]
        best["best_validation_step"] = int(trained.best["step"])
    evaluated = setting.split(evaluate_on)
    return Outcome(
        status=trained.status,
        result={
            **final,
            "majority_share": evaluated.majority_share if task.labels else None,
            "num_evaluated": len(evaluated),
            "num_labels": len(task.labels),
            **sizes(model),
            **best,
            "num_steps": len(trained.curve),
            **measures,
        },
        curve=trained.curve,
        controls=trained.controls,
        message=trained.message,
        earlier_seconds=trained.earlier_seconds,
    )


@dataclass(frozen=True, eq=False)
class Solved:
    """A control problem and its solution, which is in the model.

    Attributes:
        problem: of the setting's training rows.
        solution: what the solver reached.
        objective: J before.
        residual: per stage before.
        seconds: of the solve.
    """

    problem: ControlProblem
    solution: Solution
    objective: float
    residual: Residual
    seconds: float

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Of the steps, the blocks of the model among them."""
        return self.problem.dynamics.stage_names  # type: ignore[attr-defined]


def full_batch(
    setting: Setting,
    solver: Solver,
    *,
    steps: int | None,
    tol: float | None = None,
    weight_decay: float = 0.0,
    folder: Path | None = None,
    progress: bool = False,
) -> Solved:
    """Solve the control problem of all training rows of a setting, and put the controls in place.

    It is deterministic: no dropout, one batch.

    Args:
        setting: model, deltas and rows.
        solver: the method.
        steps: the most iterations; by default the solver's.
        tol: on the residual, as in `deltacontrol.theory.solvers.solving`.
        weight_decay: λ of the running cost λ/2 ‖u‖².
        folder: where an interrupted solve leaves its checkpoint, and goes on from it.
        progress: whether to draw a progress bar.

    Raises:
        InputError: the solver is for linear-quadratic problems, a delta asks for more than the
            problem has, the memory would not do, or as in `Setting.control_problem`.
    """
    _check_solver(setting, solver)
    _check_memory(setting, solver)
    problem = setting.control_problem(weight_decay=weight_decay)
    start = problem.initial_controls()
    before = problem.evaluate(start)
    objective, residual = float(before.objective), problem.residual_of(start, before.gradient)
    del before
    began = time.perf_counter()
    with deferred() if folder is not None else nullcontext() as interrupts:

        def look(now: Iterate) -> None:
            if interrupts is not None and interrupts.asked:  # `solve` saves before it ends
                interrupts.stop(f"iteration {now.iteration} is saved")

        solution = solve(
            problem,
            solver,
            start,
            max_steps=steps,
            tol=tol,
            callback=look,
            progress=progress,
            checkpoint=None if folder is None else folder / CHECKPOINT,
        )
        if interrupts is not None and interrupts.asked:
            interrupts.stop("the solution is saved")
    seconds = time.perf_counter() - began
    problem.dynamics.load_controls(solution.controls)  # type: ignore[attr-defined]
    return Solved(problem, solution, objective, residual, seconds)


def _check_solver(setting: Setting, solver: Solver) -> None:
    name = type(solver).__name__
    if solver.linear_quadratic:
        raise InputError(
            f"{name} solves linear dynamics with a quadratic cost, and a Transformer is neither; "
            "take newton-cg, gauss-newton, shooting, lbfgs, or ddp on a few examples"
        )
    model = setting.controlled
    asked = {
        "a penalty on the loss": model.is_penalised,
        "a look at the data before training": model.needs_data,
        "changes between the updates": bool(model.host.requests.after_step),
        "dropout": any(getattr(delta, "dropout", 0) for delta in model.deltas),
    }
    wanted = [what for what, there in asked.items() if there]
    if wanted:
        names = ", ".join(delta.name for delta in model.deltas)
        raise InputError(
            f"the deltas {names} ask for {' and '.join(wanted)}, which the control problem of "
            f"{name} has not; train them with an optimiser such as adamw, or take lora"
        )


def _check_memory(setting: Setting, solver: Solver) -> None:
    """Measure the problem of the one and of the two longest rows, and go on to all of them."""
    lengths = setting.split("train").lengths
    longest = np.argsort(-lengths, kind="stable")[:2].tolist()
    footprint = Footprint.of(setting.control_problem(longest[:1]))
    if len(longest) > 1:
        two = Footprint.of(setting.control_problem(longest))
        footprint = footprint.extended(two, len(lengths))
    why = obstacle(solver, footprint, psutil.virtual_memory().available)
    if why:
        raise InputError(f"{len(lengths)} training rows are too many: {why}")


def _by_solver(
    setting: Setting, solver: Solver, options: Options, workspace: Workspace
) -> TrainingResult:
    """The training of a solver, as the loop would tell it."""
    memory = PeakMemory("cpu")
    solved = full_batch(
        setting,
        solver,
        steps=options.steps,
        weight_decay=options.weight_decay,
        folder=workspace.folder,
        progress=workspace.progress,
    )
    solution = solved.solution
    diverged = solution.status in (Status.DIVERGED, Status.UNBOUNDED)
    squares = sum(float(u.square().sum()) for u in solution.controls)
    iterations = solution.iterations
    return TrainingResult(
        status="diverged" if diverged else "completed",
        message=solution.message,
        curve=solution.history.iloc[1:].reset_index(names="step"),
        controls=setting.controlled.state(),
        best=None,
        measures={
            "solver_status": str(solution.status),
            "objective": solution.objective,
            "residual": solution.residual.norm,
            "initial_objective": solved.objective,
            "initial_residual": solved.residual.norm,
            "final_train_loss": solution.objective - options.weight_decay / 2 * squares,
            "seconds_per_step": solved.seconds / max(iterations, 1),
            "peak_memory_bytes": memory.peak(),
            "baseline_memory_bytes": memory.baseline,
            "memory_method": memory.method,
            "precision": "fp64" if setting.dtype == "float64" else "fp32",
            "device": "cpu",
        },
    )


@dataclass(frozen=True)
class TrainingBatches:
    """The batches of a run: a function of its seed and the step."""

    encoded: Encoded
    seed: int
    batch_size: int

    def batch(self, step: int) -> dict[str, Any]:
        """The batch of a step."""
        return self.encoded.training_batch(step, seed=self.seed, batch_size=self.batch_size)

    def examples(self, step: int) -> Tensor:
        """The numbers of its rows."""
        rows = self.encoded.training_rows(step, seed=self.seed, batch_size=self.batch_size)
        return torch.from_numpy(rows)


def sizes(model: DeltaModel) -> dict[str, Any]:
    """Numbers of parameters; a control belongs to the head where it replaces one of its own."""
    trained = model.trainable()
    head = sum(trained[name].numel() for name in head_controls(model))
    trainable, total = model.num_trainable, model.num_total
    return {
        "num_trainable": trainable,
        "num_total": total,
        "num_head": head,
        "trainable_share": (trainable - head) / total,
        "trainable_share_with_head": trainable / total,
    }
