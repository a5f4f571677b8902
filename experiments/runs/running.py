"""Running one experiment, or several of one company in one pass, here and now.

Records, identities, locks and checkpoints stay those of each run: what a pass of several leaves
unfinished goes on alone, or with others.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from deltacontrol.experiments import tracking
from deltacontrol.experiments.runs import failures, locks
from deltacontrol.experiments.runs.experiment import (
    Digests,
    Experiment,
    Outcome,
    PausedError,
    SeparatelyError,
    Workspace,
    canonical_json,
    digests_of,
)
from deltacontrol.experiments.runs.interrupts import (
    LIMIT_MINUTES,
    LimitError,
    limited,
    require_minutes,
)
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore, unwritable
from deltacontrol.theory.errors import InputError

MOST = 16  # of one pass; more of them save hardly more, and lose more where one is interrupted


class OverLimitError(InputError):
    """Runs that share a pass reached their limit; they are saved, and kept as failures."""


def run(
    experiment: Experiment,
    store: RunStore,
    *,
    progress: bool = True,
    block: bool = True,
    checkpoint_seconds: float = 30.0,
    limit_minutes: float = LIMIT_MINUTES,
) -> Record | None:
    """Run one experiment in this process, unless it is recorded, and return its record.

    Under `accelerate launch` every process calls this, and the first one writes.

    Args:
        experiment: What to run.
        store: Where its record is kept.
        progress: Whether to draw a progress bar.
        block: Wait for another process that computes the same run; otherwise return None.
        checkpoint_seconds: Time between checkpoints.
        limit_minutes: How long it may take, the time that it waits for another process not counted.

    Raises:
        InputError: From the experiment, because the store cannot be used, because the files of
            the model, the data or users' code changed during the run, or because it reached its
            limit: it is saved, the reason is kept with the failures of the store, and the same call
            with a larger limit goes on.
    """
    require_minutes(limit_minutes)
    found = store.find(experiment)
    if found is not None:
        return found
    digests = digests_of(experiment)
    unfinished = store.partial(experiment)
    first = int(os.environ.get("RANK", "0")) == 0
    with locked(store, unfinished.name, block) if first else _unlocked() as mine:
        if not mine:
            return None
        found = store.find(experiment) if first else None
        if found is not None:
            return found
        began, worked, started = time.perf_counter(), time.process_time(), datetime.now(UTC)
        workspace = Workspace(unfinished, progress, checkpoint_seconds, store.root)
        outcome = _executed(experiment, workspace, limit_minutes, store)
        if not first:
            return None
        _require_unchanged([experiment], [digests], [unfinished])
        spent = time.perf_counter() - began, time.process_time() - worked
        return _written(experiment, outcome, store, unfinished, digests, started, *spent)


def _written(
    experiment: Experiment,
    outcome: Outcome,
    store: RunStore,
    unfinished: Path,
    digests: Digests,
    started: datetime,
    seconds: float,
    processor_seconds: float,
) -> Record:
    """Record what a run handed back, and let its checkpoints and its failure go.

    ``unfinished`` is the folder that it had.

    Raises:
        InputError: the store cannot be written.
    """
    record = store.write(
        experiment,
        outcome.result,
        outcome.curve,
        outcome.controls,
        outcome.earlier_seconds + seconds,
        processor_seconds,
        status=outcome.status,
        message=outcome.message,
        started=started,
        digests=digests,
    )
    shutil.rmtree(unfinished, ignore_errors=True)
    failures.forget(store.root, record.id)
    return record


def _executed(
    experiment: Experiment, workspace: Workspace, limit_minutes: float, store: RunStore
) -> Outcome:
    """What the experiment hands back; a limit that it reaches is its failure."""
    limit = None
    try:
        with limited(limit_minutes) as limit:
            return experiment.execute(workspace)
    except LimitError as error:
        if error.limit is not limit:
            raise  # the limit of the run of which this one is a part
        _keep_failure(experiment, store, error.reason)
        raise InputError(f"{experiment.label}: {error.reason}") from error


def _keep_failure(experiment: Experiment, store: RunStore, reason: str) -> None:
    try:
        failures.keep(store.root, store.path(experiment).name, experiment, reason)
    except OSError as error:
        raise unwritable(store.root, error) from error


def _require_unchanged(
    experiments: Sequence[Experiment], before: Sequence[Digests], unfinished: Sequence[Path]
) -> None:
    """Refuse to record runs under what they may not have read; checkpoints are worth nothing then.

    The folders are those that they had: with other files, they would have others now.
    """
    names = {"model": "its model", "data": "its data", "code": "the code of your classes"}
    told = ""
    for experiment, read, folder in zip(experiments, before, unfinished, strict=True):
        now = digests_of(experiment)
        changed = [text for n, text in names.items() if getattr(read, n) != getattr(now, n)]
        if changed:
            shutil.rmtree(folder, ignore_errors=True)
            told = told or f"the files of {' and '.join(changed)} changed while {experiment.label}"
    if told:
        raise InputError(
            f"{told} ran, so that nothing tells which of their contents it read; it is not "
            "recorded: run it again and leave the files as they are meanwhile"
        )


def companies(experiments: Sequence[Experiment], most: int = MOST) -> list[list[Experiment]]:
    """The experiments in groups that may share a pass, of ``most`` at most; in their order.

    One that trackers follow shares none: they follow one run of a process at a time.
    """
    groups: dict[str, list[list[Experiment]]] = {}
    found: list[list[Experiment]] = []
    for experiment in experiments:
        shared = None if tracking.used() else experiment.company()
        key = "" if shared is None else canonical_json([experiment.kind, shared])
        open_groups = groups.setdefault(key, [])
        if not key or not open_groups or len(open_groups[-1]) >= most:
            open_groups.append([])
            found.append(open_groups[-1])
        open_groups[-1].append(experiment)
    return found


def run_together(
    experiments: Sequence[Experiment],
    store: RunStore,
    *,
    progress: bool = True,
    block: bool = True,
    checkpoint_seconds: float = 30.0,
    limit_minutes: float = LIMIT_MINUTES,
) -> list[Record | None]:
    """Run experiments in one pass where they can share one; what is recorded is not repeated.

    Args:
        experiments: what to run; of one company they share a pass.
        store: where the records are kept.
        progress: whether to draw progress bars.
        block: wait for another process that computes one of them; otherwise its record is None.
        checkpoint_seconds: time between checkpoints.
        limit_minutes: how long one may take; a pass of several has the sum.

    Returns:
        The records.

    Raises:
        InputError: as `run`; `OverLimitError` where a pass reached its limit.
    """
    require_minutes(limit_minutes)
    for group in companies(experiments):
        if len(group) > 1:
            _record(group, store, progress, checkpoint_seconds, limit_minutes)
    return [
        run(
            experiment,
            store,
            progress=progress,
            block=block,
            checkpoint_seconds=checkpoint_seconds,
            limit_minutes=limit_minutes,
        )
        for experiment in experiments
    ]


def _record(
    group: Sequence[Experiment],
    store: RunStore,
    progress: bool,
    checkpoint_seconds: float,
    limit_minutes: float,
) -> None:
    """Run those of a group that nobody else runs or has run; what cannot be, is left to `run`."""
    with ExitStack() as locks:
        mine = _free(group, store, locks)
        if len(mine) < 2:
            return
        digests = [digests_of(experiment) for experiment in mine]
        began, worked, started = time.perf_counter(), time.process_time(), datetime.now(UTC)
        spaces = [
            Workspace(store.partial(e), progress, checkpoint_seconds, store.root) for e in mine
        ]
        limit = None
        try:
            with limited(limit_minutes * len(mine)) as limit:
                ends = type(mine[0]).execute_together(mine, spaces)
        except SeparatelyError:
            return
        except LimitError as error:
            if error.limit is not limit:
                raise
            for experiment in mine:
                _keep_failure(experiment, store, error.reason)
            others = f"{mine[0].label} and {len(mine) - 1} more"
            raise OverLimitError(f"{others}: {error.reason}") from error
        share = (time.perf_counter() - began) / len(mine)
        worked = (time.process_time() - worked) / len(mine)
        folders = [space.folder for space in spaces]
        _require_unchanged(mine, digests, folders)
        for experiment, folder, read, end in zip(mine, folders, digests, ends, strict=True):
            assert isinstance(end, Outcome)
            _written(experiment, end, store, folder, read, started, share, worked)


def _free(group: Sequence[Experiment], store: RunStore, locks: ExitStack) -> list[Experiment]:
    """Those without a record of which a lock can be had, locked."""
    mine = []
    for experiment in group:
        if store.find(experiment) is None:
            name = store.partial(experiment).name
            if locks.enter_context(locked(store, name, block=False)):
                if store.find(experiment) is None:
                    mine.append(experiment)
    return mine


def advance(
    experiments: Sequence[Experiment], store: RunStore, step: int, *, progress: bool = False
) -> list[dict[str, float] | None]:
    """Train up to a step before the last one, save, and tell the validation metrics there.

    `run` or `run_together` go on from there later, and record what an uninterrupted run
    records.

    Returns:
        Of each the metrics; None where the run is recorded, or ended before that step.

    Raises:
        InputError: as `run`.
    """
    found: dict[str, dict[str, float] | None] = {}
    names = [store.path(experiment).name for experiment in experiments]
    for group in companies(experiments):
        with ExitStack() as locks:
            mine = _free(group, store, locks)
            spaces = [
                Workspace(store.partial(e), progress, store=store.root, pause_after=step)
                for e in mine
            ]
            if len(mine) > 1:
                try:
                    ends = type(mine[0]).execute_together(mine, spaces)
                except SeparatelyError:
                    pass
                else:
                    found |= {
                        store.path(e).name: end.metrics if isinstance(end, PausedError) else None
                        for e, end in zip(mine, ends, strict=True)
                    }
    for name, experiment in zip(names, experiments, strict=True):
        if name not in found:
            found[name] = _advance_alone(experiment, store, step)
    return [found[name] for name in names]


def _advance_alone(experiment: Experiment, store: RunStore, step: int) -> dict[str, float] | None:
    unfinished = store.partial(experiment)
    if store.find(experiment) is not None:
        return None
    with locked(store, unfinished.name, block=True):
        if store.find(experiment) is not None:
            return None
        try:
            experiment.execute(Workspace(unfinished, False, store=store.root, pause_after=step))
        except PausedError as paused:
            return paused.metrics
    return None


def forsake(experiment: Experiment, store: RunStore) -> None:
    """Throw the checkpoints of an unfinished run away."""
    with locked(store, store.partial(experiment).name, block=True):
        shutil.rmtree(store.partial(experiment), ignore_errors=True)


@contextmanager
def locked(store: RunStore, name: str, block: bool) -> Iterator[bool]:
    """Hold the lock of a run inside; whether it could be had, which is certain with ``block``.

    Raises:
        InputError: the store cannot be written.
    """
    with ExitStack() as stack:
        try:
            mine = stack.enter_context(locks.locked(store.root, name, block=block))
        except OSError as error:
            raise unwritable(store.root, error) from error
        yield mine


@contextmanager
def _unlocked() -> Iterator[bool]:
    yield True
