"""Running experiments: one, or many at a time.

Each run has its own process, so that its memory and its random numbers are its own. A run that is
recorded is not repeated; one that was killed goes on from its checkpoint. Several sweeps may work
on one store, also from several machines: a lock per run keeps them from computing one run twice.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from deltacontrol.experiments.runs import failures
from deltacontrol.experiments.runs.experiment import Digests, PausedError, digests_of
from deltacontrol.experiments.runs.interrupts import (
    LIMIT_MINUTES,
    LimitError,
    limited,
    require_minutes,
)
from deltacontrol.experiments.runs.processes import Processes
from deltacontrol.experiments.runs.provenance import usable_cores
from deltacontrol.experiments.runs.store import (
    Experiment,
    Outcome,
    Record,
    RunStore,
    Workspace,
    unwritable,
)
from deltacontrol.theory import plugins
from deltacontrol.theory.errors import InputError

PRELOADED = (
    "torch",
    "transformers",
    "sklearn.metrics",
    "deltacontrol.deltas.registry",
    "deltacontrol.experiments.training.loop",
    "deltacontrol.experiments.training.evaluation",
    "deltacontrol.experiments.tasks.encoding",
    "deltacontrol.experiments.training.finetune",
)
WAIT_SECONDS = 1.0  # until it is looked again whether another sweep is done with a run


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
    with _locked(store, unfinished.name, block) if first else _unlocked() as mine:
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
        _require_unchanged(experiment, digests, unfinished)
        record = store.write(
            experiment,
            outcome.result,
            outcome.curve,
            outcome.controls,
            outcome.earlier_seconds + time.perf_counter() - began,
            time.process_time() - worked,
            status=outcome.status,
            message=outcome.message,
            started=started,
            digests=digests,
        )
        shutil.rmtree(unfinished, ignore_errors=True)
        failures.forget(store.root, record.id)
        return record


def advance(experiment: Experiment, store: RunStore, step: int) -> dict[str, float] | None:
    """Train up to a step before the last one, save, and tell the validation metrics there.

    `run` goes on from there later, and records what an uninterrupted run records.

    Returns:
        None where the run is recorded, or ended before that step.

    Raises:
        InputError: as `run`.
    """
    if store.find(experiment) is not None:
        return None
    unfinished = store.partial(experiment)
    with _locked(store, unfinished.name, block=True):
        if store.find(experiment) is not None:
            return None
        try:
            experiment.execute(Workspace(unfinished, False, store=store.root, pause_after=step))
        except PausedError as paused:
            return paused.metrics
    return None


def forsake(experiment: Experiment, store: RunStore) -> None:
    """Throw the checkpoints of an unfinished run away."""
    with _locked(store, store.partial(experiment).name, block=True):
        shutil.rmtree(store.partial(experiment), ignore_errors=True)


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
        try:
            failures.keep(store.root, store.path(experiment).name, experiment, error.reason)
        except OSError as unkept:
            raise unwritable(store.root, unkept) from unkept
        raise InputError(f"{experiment.label}: {error.reason}") from error


def _require_unchanged(experiment: Experiment, before: Digests, unfinished: Path) -> None:
    """Refuse to record a run under what it may not have read; its checkpoints are worth nothing."""
    after = digests_of(experiment)
    names = {"model": "its model", "data": "its data", "code": "the code of your classes"}
    changed = [text for n, text in names.items() if getattr(before, n) != getattr(after, n)]
    if changed:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise InputError(
            f"the files of {' and '.join(changed)} changed while {experiment.label} ran, so that "
            "nothing tells which of their contents it read; it is not recorded: run it again and "
            "leave the files as they are meanwhile"
        )


def run_all(
    experiments: Sequence[Experiment],
    store: RunStore,
    workers: int | None = None,
    progress: bool = True,
    *,
    checkpoint_seconds: float = 30.0,
    limit_minutes: float = LIMIT_MINUTES,
) -> list[Record]:
    """Run all experiments that are not recorded yet, one process each.

    Args:
        experiments: What to run; equal ones are run once.
        store: Where the records are kept.
        workers: Processes at a time: by default one per core, or one where there is a GPU. On the
            CPU the cores are shared out among them, and a result's last digits depend on how many
            threads a run had.
        progress: Whether to draw a progress bar that names what runs.
        checkpoint_seconds: Time between checkpoints: what a killed run loses at most.
        limit_minutes: How long one run may take before it is stopped and saved; the time that it
            waits for another sweep which computes it is not counted.

    Returns:
        The records, in the order of `experiments`.

    Raises:
        InputError: Some runs failed: all others are finished and recorded by then, and the message
            names each failed run and why, as does `deltacontrol runs --failed`. Also where the
            store cannot be used.
        KeyboardInterrupt: After the workers were stopped; a later call continues.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}; expected a whole number >= 1")
    require_minutes(limit_minutes)
    names = [store.path(experiment).name for experiment in experiments]
    distinct = dict(zip(names, experiments, strict=True))
    pending = {name: e for name, e in distinct.items() if store.find(e) is None}
    if pending:
        workers = min(workers or default_workers(), len(pending))
        threads = threads_each(workers)
        with tqdm(total=len(distinct), disable=not progress, unit="run") as bar:
            bar.update(len(distinct) - len(pending))
            sweep = _Sweep(store, pending, workers, threads, checkpoint_seconds, limit_minutes, bar)
            failed = sweep.finish()
        if failed:
            lines = "\n".join(f"  {pending[n].label} ({n}): {why}" for n, why in failed.items())
            raise InputError(
                f"{len(failed)} of {len(distinct)} runs failed; the others are recorded:\n{lines}"
            )
    records = [store.find(experiment) for experiment in experiments]
    return [record for record in records if record is not None]


def default_workers() -> int:
    """One process on a GPU, which they would have to share, else one per core."""
    import torch

    return 1 if torch.cuda.is_available() else usable_cores()


def threads_each(workers: int) -> int:
    """Threads of each of `workers` processes: its share of the cores, at most OMP_NUM_THREADS."""
    share = max(1, usable_cores() // workers)
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(chosen)) if chosen.isdigit() and int(chosen) else share


@dataclass
class _Sweep:
    """The runs that are still to be done, and what became of them."""

    store: RunStore
    pending: dict[str, Experiment]
    workers: int
    threads: int
    checkpoint_seconds: float
    limit_minutes: float
    bar: tqdm
    failures: dict[str, str] = field(default_factory=dict)

    def finish(self) -> dict[str, str]:
        """Do all runs; returns the failed ones with their messages."""
        busy = self._do(list(self.pending))
        while busy:
            self._describe([])
            free = [name for name in busy if self._is_free(name)]
            if not free:
                time.sleep(WAIT_SECONDS)
                continue
            busy = [name for name in busy if name not in free] + self._do(free)
        return self.failures

    def _is_free(self, name: str) -> bool:
        """Whether no other sweep computes a run now: it is recorded, or was given up."""
        with _locked(self.store, name, block=False) as mine:
            return mine

    def _do(self, names: list[str]) -> list[str]:
        """Do `names`; returns those that another sweep is computing."""
        busy: list[str] = []
        processes = Processes(
            _work,
            partial(_begin_worker, self.threads, plugins.sources()),
            workers=self.workers,
            seconds=60.0 * self.limit_minutes,
            preload=PRELOADED,
        )
        more = self.store, self.checkpoint_seconds, self.limit_minutes
        for ended in processes.ends({name: (self.pending[name], *more) for name in names}):
            for name, end in ended.items():
                if end.failure is None and not end.value:
                    busy.append(name)
                else:
                    self._done(name, end.failure)
            self._describe(processes.running)
        return busy

    def _describe(self, running: list[str]) -> None:
        shown = [self.pending[name].label for name in running[: self.workers]]
        self.bar.set_description(", ".join(shown) or "waiting")

    def _done(self, name: str, failure: str | None = None) -> None:
        if failure is not None:
            self.failures[name] = failure
            try:
                failures.keep(self.store.root, name, self.pending[name], failure)
            except OSError as error:
                raise unwritable(self.store.root, error) from error
            self.bar.write(f"failed: {self.pending[name].label}: {failure}", file=sys.stderr)
        self.bar.update()


def _begin_worker(threads: int, sources: tuple[str, ...]) -> None:
    import torch

    plugins.load_sources(sources)
    torch.set_num_threads(threads)


def _work(
    experiment: Experiment, store: RunStore, checkpoint_seconds: float, limit_minutes: float
) -> bool:
    """Whether the run is recorded; else another process computes it."""
    record = run(
        experiment,
        store,
        progress=False,
        block=False,
        checkpoint_seconds=checkpoint_seconds,
        limit_minutes=limit_minutes,
    )
    return record is not None


@contextmanager
def _locked(store: RunStore, name: str, block: bool) -> Iterator[bool]:
    folder = store.root / ".locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock", timeout=-1 if block else 0)
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError as error:
        raise unwritable(store.root, error) from error
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def _unlocked() -> Iterator[bool]:
    yield True
