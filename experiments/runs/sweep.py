"""Running many experiments at a time.

A run has its own process, so that its memory and its random numbers are its own; runs that differ
in seed and learning rate alone may share one (`running`). A run that is recorded is not repeated;
one that was killed goes on from its checkpoint. Several sweeps may work on one store, also from
several machines: a lock per run keeps them from computing one run twice.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tqdm.auto import tqdm

from deltacontrol.experiments.runs import failures
from deltacontrol.experiments.runs.interrupts import (
    LIMIT_MINUTES,
    require_minutes,
)
from deltacontrol.experiments.runs.processes import Processes, prestart
from deltacontrol.experiments.runs.provenance import usable_cores
from deltacontrol.experiments.runs.running import (
    MOST,
    OverLimitError,
    advance,
    companies,
    locked,
    run,
    run_together,
)
from deltacontrol.experiments.runs.store import (
    Experiment,
    Record,
    RunStore,
    unwritable,
)
from deltacontrol.theory import plugins
from deltacontrol.theory.errors import InputError

__all__ = ["advance_all", "default_workers", "prepare", "require_workers", "run", "run_all",
           "threads_each"]  # fmt: skip

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


def prepare() -> None:
    """Say early that processes will be wanted: their imports then run beside the caller's own."""
    prestart(PRELOADED)


def run_all(
    experiments: Sequence[Experiment],
    store: RunStore,
    workers: int | None = None,
    progress: bool = True,
    *,
    checkpoint_seconds: float = 30.0,
    limit_minutes: float = LIMIT_MINUTES,
    watch: Callable[[int], None] | None = None,
) -> list[Record]:
    """Run all experiments that are not recorded yet, in processes of their own.

    Runs that differ in seed and learning rate alone share a process, and a pass where a measurement
    says that it is quicker; their numbers are then those of separate trainings up to rounding.

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
        watch: Draws instead of the progress bar: it is called about once a second, with how many
            runs have ended since the last time.

    Returns:
        The records, in the order of `experiments`.

    Raises:
        InputError: Some runs failed: all others are finished and recorded by then, and the message
            names each failed run and why, as does `deltacontrol runs --failed`. Also where the
            store cannot be used.
        KeyboardInterrupt: After the workers were stopped; a later call continues.
    """
    require_workers(workers)
    require_minutes(limit_minutes)
    names = [store.path(experiment).name for experiment in experiments]
    distinct = dict(zip(names, experiments, strict=True))
    pending = {name: e for name, e in distinct.items() if store.find(e) is None}
    if pending:
        workers = min(workers or default_workers(), len(pending))
        threads = threads_each(workers)
        shown = progress and watch is None
        with tqdm(total=len(distinct), disable=not shown, unit="run") as bar:
            bar.update(len(distinct) - len(pending))
            limits = checkpoint_seconds, limit_minutes
            failed = _Sweep(store, pending, workers, threads, *limits, bar, watch).finish()
        if failed:
            lines = "\n".join(f"  {pending[n].label} ({n}): {why}" for n, why in failed.items())
            raise InputError(
                f"{len(failed)} of {len(distinct)} runs failed; the others are recorded:\n{lines}"
            )
    records = [store.find(experiment) for experiment in experiments]
    return [record for record in records if record is not None]


def advance_all(
    experiments: Sequence[Experiment],
    store: RunStore,
    step: int,
    workers: int | None = None,
    *,
    progress: bool = True,
    limit_minutes: float = LIMIT_MINUTES,
) -> list[dict[str, float] | None]:
    """Train experiments up to a step before the last one, in processes of their own.

    Args:
        experiments: what to train, and to save there; different ones.
        store: where they are kept on their way.
        step: the step.
        workers: as in `run_all`.
        progress: whether to draw a progress bar.
        limit_minutes: how long one may take.

    Returns:
        Of each the metrics on validation rows there; None where it is recorded already, or ended
        before that step.

    Raises:
        InputError: Some failed; the message says which and why. The others are saved.
    """
    workers = min(workers or default_workers(), max(1, len(experiments)))
    groups = companies(experiments, min(MOST, math.ceil(len(experiments) / workers)))
    processes = Processes(
        _advance,
        partial(_begin_worker, threads_each(workers), plugins.sources()),
        workers=workers,
        seconds=60.0 * limit_minutes,
        preload=PRELOADED,
    )
    found: dict[int, dict[str, float] | None] = {}
    failed: list[str] = []
    tasks = {str(number): (group, store, step) for number, group in enumerate(groups)}
    described = f"to step {step}"
    with tqdm(total=len(experiments), desc=described, disable=not progress, unit="run") as bar:
        for ended in processes.ends(tasks, {n: len(task[0]) for n, task in tasks.items()}):
            for number, end in ended.items():
                group = groups[int(number)]
                bar.update(len(group))
                if end.failure is not None:
                    failed += [f"  {one.label}: {end.failure}" for one in group]
                    continue
                found |= {id(one): metrics for one, metrics in zip(group, end.value, strict=True)}
    if failed:
        raise InputError(
            f"{len(failed)} of {len(experiments)} trainings failed:\n" + "\n".join(failed)
        )
    return [found[id(experiment)] for experiment in experiments]


def _advance(
    experiments: list[Experiment], store: RunStore, step: int
) -> list[dict[str, float] | None]:
    return advance(experiments, store, step)


def require_workers(workers: int | None) -> None:
    """Refuse a number of processes that cannot be; raises `InputError`."""
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}; expected a whole number >= 1")


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
    watch: Callable[[int], None] | None = None
    failures: dict[str, str] = field(default_factory=dict)
    ended: int = 0  # since `watch` was told

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
        with locked(self.store, name, block=False) as mine:
            return mine

    def _do(self, names: list[str]) -> list[str]:
        """Do `names`; returns those that another sweep is computing.

        Runs that differ in little share a process and a pass. Where that fails, each is tried by
        itself, so that only those that cannot be done are given up.
        """
        wanted = [self.pending[name] for name in names]
        own = {id(self.pending[name]): name for name in names}
        most = min(MOST, math.ceil(len(wanted) / self.workers))
        groups = [[own[id(e)] for e in group] for group in companies(wanted, most)]
        busy, again = self._processes(groups)
        more, _ = self._processes([[name] for name in again])
        return busy + more

    def _processes(self, groups: list[list[str]]) -> tuple[list[str], list[str]]:
        """A process for each group; the runs of another sweep, and those to be tried alone."""
        busy: list[str] = []
        again: list[str] = []
        processes = Processes(
            _work,
            partial(_begin_worker, self.threads, plugins.sources()),
            workers=self.workers,
            seconds=60.0 * self.limit_minutes,
            preload=PRELOADED,
        )
        more = self.store, self.checkpoint_seconds, self.limit_minutes
        members = {group[0]: group for group in groups}
        tasks = {n: ([self.pending[m] for m in group], *more) for n, group in members.items()}
        for ended in processes.ends(tasks, {n: len(group) for n, group in members.items()}):
            for first, end in ended.items():
                group = members[first]
                if end.failure is not None and len(group) > 1:
                    again += group
                    continue
                for name, recorded in zip(group, end.value or [False] * len(group), strict=True):
                    failure = recorded if isinstance(recorded, str) else end.failure
                    if failure is None and not recorded:
                        busy.append(name)
                    else:
                        self._done(name, failure)
            self._describe(processes.running)
        return busy, again

    def _describe(self, running: list[str]) -> None:
        shown = [self.pending[name].label for name in running[: self.workers]]
        self.bar.set_description(", ".join(shown) or "waiting")
        if self.watch is not None:
            self.watch(self.ended)
            self.ended = 0

    def _done(self, name: str, failure: str | None = None) -> None:
        if failure is not None:
            self.failures[name] = failure
            try:
                failures.keep(self.store.root, name, self.pending[name], failure)
            except OSError as error:
                raise unwritable(self.store.root, error) from error
            if self.watch is None:
                self.bar.write(f"failed: {self.pending[name].label}: {failure}", file=sys.stderr)
        self.ended += 1
        self.bar.update()


def _begin_worker(threads: int, sources: tuple[str, ...]) -> None:
    import torch

    plugins.load_sources(sources)
    torch.set_num_threads(threads)


def _work(
    experiments: list[Experiment], store: RunStore, checkpoint_seconds: float, limit_minutes: float
) -> list[bool | str]:
    """Whether each run is recorded, or why it was stopped; else another process computes it."""
    try:
        records = run_together(
            experiments,
            store,
            progress=False,
            block=False,
            checkpoint_seconds=checkpoint_seconds,
            limit_minutes=limit_minutes,
        )
    except OverLimitError as error:  # not tried again by themselves: that would be more time
        return [store.find(one) is not None or str(error) for one in experiments]
    return [record is not None for record in records]
