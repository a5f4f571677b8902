"""What a notebook calls: one call, one result, recorded like the command line's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltacontrol.experiments import tracking
from deltacontrol.experiments.runs.interrupts import LIMIT_MINUTES
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame

    from deltacontrol.deltas import Delta
    from deltacontrol.experiments.runs.record import Record
    from deltacontrol.theory.judging import Outcome

__all__ = ["claims", "estimate_dimension", "finetune"]

RUNS = Path("runs")


@typed
def finetune(
    model: str = "minilm-l6",
    task: str = "movie",
    deltas: str | Delta | Sequence[str | Delta] = "lora",
    *,
    runs: str | Path = RUNS,
    progress: bool = True,
    limit_minutes: float = LIMIT_MINUTES,
    track: str | Sequence[str] = (),
    **options: Any,
) -> Record:
    """Train deltas on a frozen model for a task and evaluate them; recorded runs are not repeated.

    Args:
        model: a packaged model's name, a local folder, or an id on the hub.
        task: a packaged task's name, or the path of a task file.
        deltas: one or more, as texts such as ``lora:rank=16`` or objects such as ``LoRA(rank=16)``.
        runs: the folder of the record.
        progress: whether to say where the learning rate is from, and to draw a progress bar.
        limit_minutes: how long it may take; at the limit it is saved, and the same call with a
            larger one goes on.
        track: trackers that follow the run, such as "tensorboard"
            (`deltacontrol.experiments.tracking`).
        options: further fields of `deltacontrol.experiments.training.finetune.FineTuning`, such as
            ``steps``, ``seed`` and ``learning_rate``.

    Returns:
        The record: ``record.result`` has the scores, ``record.curve()`` the training curve.

    Raises:
    InputError: from the configuration, from loading the model or the task, from attaching, or
            at the limit.
    """
    from deltacontrol.experiments.runs.running import run
    from deltacontrol.experiments.training.finetune import FineTuning
    from deltacontrol.experiments.training.rates import default_rate

    made = deltas if isinstance(deltas, list | tuple) else (deltas,)
    experiment = FineTuning(model=model, task=task, deltas=tuple(made), **options)
    if progress and options.get("learning_rate") is None and experiment.learning_rate is not None:
        print(default_rate(experiment.model, experiment.task, experiment.deltas))
    store = RunStore(Path(runs))
    with tracking.using(track):
        record = run(experiment, store, progress=progress, limit_minutes=limit_minutes)
    assert record is not None  # it waits for another process that computes the same run
    return record


@typed
def estimate_dimension(
    model: str = "minilm-l6",
    task: str = "movie",
    *,
    runs: str | Path = RUNS,
    progress: bool = True,
    limit_minutes: float = LIMIT_MINUTES,
    **options: Any,
) -> Record:
    """How many random directions of parameter space a task needs, with an interval.

    Args:
        model: as in `finetune`.
        task: as in `finetune`.
        runs: the folder of the record, and of the trainings behind it.
        progress: whether to draw a progress bar.
        limit_minutes: how long it may take; at the limit it is saved, and the same call with a
            larger one goes on.
        options: further fields of
            `deltacontrol.experiments.studies.d90.fine_tuning.FineTuningDimension`, such as
            ``method``, ``budget`` and ``steps``.

    Returns:
        The record: ``record.result["text"]`` is the estimate, ``record.curve()`` the trainings.

    Raises:
        InputError: from the configuration, from a training, or at the limit.
    """
    from deltacontrol.experiments.runs.running import run
    from deltacontrol.experiments.studies.d90.fine_tuning import FineTuningDimension

    experiment = FineTuningDimension(model=model, task=task, **options)
    record = run(experiment, RunStore(Path(runs)), progress=progress, limit_minutes=limit_minutes)
    assert record is not None
    return record


@typed
def claims(number: int | None = None, *, runs: str | Path = RUNS) -> DataFrame | Outcome:
    """The scoreboard, one row a part of a claim; or one judged claim with its evidence.

    Args:
        number: of a claim; None gives the whole board.
        runs: your folder of runs, whose own results are shown beside the committed ones.

    Raises:
        InputError: there is no such claim, or it was not judged.
    """
    import pandas as pd

    from deltacontrol.experiments.claims import board, scoreboard
    from deltacontrol.experiments.runs.store import CLAIMS

    if number is None:
        return pd.DataFrame(board.rows(Path(runs) / CLAIMS)).set_index("#")
    claim = scoreboard.find(number)
    outcome = scoreboard.stored(claim, Path(runs) / CLAIMS) or scoreboard.stored(claim)
    if outcome is None:
        raise InputError(
            f"claim {number} was not judged; `deltacontrol claims run {number}` measures it"
        )
    return outcome
