"""Running many experiments at a time.

An executor makes the runs, by default each in a process of its own, so that its memory and its
random numbers are its own; runs that differ in seed and learning rate alone may share one
(`running`). A run that is recorded is not repeated; one that was killed goes on from its
checkpoint. Several sweeps may work on one store, also from several machines: a lock per run keeps
them from computing one run twice (`locks`).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from deltacontrol.experiments import tracking
from deltacontrol.experiments.models.family import told_time
from deltacontrol.experiments.runs import failures
from deltacontrol.experiments.runs.executors.base import (
    Call,
    End,
    Executor,
    Work,
    threads_each,
)
from deltacontrol.experiments.runs.executors.registry import (
    chosen,
    chosen_workers,
    require_workers,
)
from deltacontrol.experiments.runs.interrupts import (
    LIMIT_MINUTES,
    require_minutes,
)
from deltacontrol.experiments.runs.running import (
    MOST,
    advance,
    companies,
    locked,
    run,
)
from deltacontrol.experiments.runs.scheduling import worker
from deltacontrol.experiments.runs.scheduling.forecast import Forecast
from deltacontrol.experiments.runs.scheduling.plan import Clock, Plan, ordered
from deltacontrol.experiments.runs.store import (
    Experiment,
    Record,
    RunStore,
    unwritable,
)
from deltacontrol.theory import plugins
from deltacontrol.theory.errors import InputError

__all__ = [
    "advance_all",
    "default_workers",
    "plan",
    "prepare",
    "require_workers",
    "run",
    "run_all",
    "threads_each",
]

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
SEEN_SECONDS = 90.0  # after which a machine sees what another one wrote, on a network file system
_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


def prepare(executor: Executor | str | None = None) -> None:
    """Say early that an executor will be wanted: what it imports then runs beside the caller's."""
    chosen(executor).prepare(PRELOADED)


def default_workers() -> int:
    """Runs at a time where nobody says how many: what the executor has room for."""
    return chosen_workers() or chosen().places()


def plan(
    experiments: Sequence[Experiment],
    store: RunStore,
    workers: int | None = None,
    executor: Executor | str | None = None,
) -> Plan:
    """What `run_all` would do with these arguments: nothing is run.

    Raises:
        InputError: As `run_all`.
    """
    using = chosen(executor)
    with using.session(workers):
        distinct, pending = _pending(experiments, store)
        forecast = Forecast(store.listed(warn=False))
        seconds = [forecast.seconds(e) for e in ordered(pending, using.order, forecast).values()]
        at_a_time = workers or _room(using, executor)
    return Plan(len(distinct), len(distinct) - len(pending), tuple(seconds), at_a_time)


def _room(using: Executor, given: Executor | str | None) -> int:
    return default_workers() if given is None else using.places()


def _pending(
    experiments: Sequence[Experiment], store: RunStore
) -> tuple[dict[str, Experiment], dict[str, Experiment]]:
    """The different ones by the names of their records, and those that are not recorded."""
    distinct = {store.path(experiment).name: experiment for experiment in experiments}
    return distinct, {name: e for name, e in distinct.items() if store.find(e) is None}


def run_all(
    experiments: Sequence[Experiment],
    store: RunStore,
    workers: int | None = None,
    progress: bool = True,
    *,
    checkpoint_seconds: float = 30.0,
    limit_minutes: float = LIMIT_MINUTES,
    watch: Callable[[int], None] | None = None,
    executor: Executor | str | None = None,
) -> list[Record]:
    """Run all experiments that are not recorded yet.

    Runs that differ in seed and learning rate alone share a process, and a pass where a measurement
    says that it is quicker; their numbers are then those of separate trainings up to rounding.

    Args:
        experiments: What to run; equal ones are run once.
        store: Where the records are kept.
        workers: Runs at a time: by default one per core, or one where there is a GPU; of a cluster
            what it has room for. On the CPU the cores are shared out among them, and a result's
            last digits depend on how many threads a run had.
        progress: Whether to print the plan and draw a bar that names what runs, with the time that
            is left as far as runs like those to come are recorded.
        checkpoint_seconds: Time between checkpoints: what a killed run loses at most.
        limit_minutes: How long one run may take before it is stopped and saved; the time that it
            waits for another sweep which computes it is not counted.
        watch: Draws instead of the progress bar: it is called about once a second, with how many
            runs have ended since the last time.
        executor: Who makes the runs, as an object or a text such as ``ray:gpus=1``; by default that
            of `registry.using`, else processes of this machine.

    Returns:
        The records, in the order of `experiments`; they are the same whoever executes.

    Raises:
        InputError: Some runs failed: all others are finished and recorded by then, and the message
            names each failed run and why, as does `deltacontrol runs --failed`. Also where the
            store cannot be used.
        KeyboardInterrupt: After the workers were stopped; a later call continues.
    """
    require_workers(workers)
    require_minutes(limit_minutes)
    using = chosen(executor)
    distinct, pending = _pending(experiments, store)
    if pending:
        shown = progress and watch is None
        with using.session(workers):
            at_a_time = min(workers or _room(using, executor), len(pending))
            known = store.listed(warn=False) if shown or using.order != "given" else []
            forecast = Forecast(known)
            pending = ordered(pending, using.order, forecast)
            done = len(distinct) - len(pending)
            if shown:
                times = tuple(forecast.seconds(e) for e in pending.values())
                tqdm.write(Plan(len(distinct), done, times, at_a_time).text, file=sys.stderr)
            bar = tqdm(
                total=len(distinct), initial=done, disable=not shown, unit="run", bar_format=_BAR
            )
            with bar:
                limits = checkpoint_seconds, limit_minutes
                clock = Clock(forecast, pending, at_a_time)
                failed = _Sweep(
                    using, store, pending, at_a_time, *limits, bar, clock, watch
                ).finish()
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
    executor: Executor | str | None = None,
) -> list[dict[str, float] | None]:
    """Train experiments up to a step before the last one.

    Args:
        experiments: what to train, and to save there; different ones.
        store: where they are kept on their way.
        step: the step.
        workers: as in `run_all`.
        progress: whether to draw a progress bar.
        limit_minutes: how long one may take.
        executor: as in `run_all`.

    Returns:
        Of each the metrics on validation rows there; None where it is recorded already, or ended
        before that step.

    Raises:
        InputError: Some failed; the message says which and why. The others are saved.
    """
    using = chosen(executor)
    found: dict[int, dict[str, float] | None] = {}
    failed: list[str] = []
    with (
        using.session(workers),
        tqdm(
            total=len(experiments), desc=f"to step {step}", disable=not progress, unit="run"
        ) as bar,
    ):
        at_a_time = min(workers or _room(using, executor), max(1, len(experiments)))
        groups = companies(experiments, min(MOST, math.ceil(len(experiments) / at_a_time)))
        calls = {
            str(number): Call((group, store, step), 60.0 * limit_minutes * len(group))
            for number, group in enumerate(groups)
        }
        for look in using.ends(_work(advance, calls, store), at_a_time):
            for number, end in look.ended.items():
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


def _work(function: Callable[..., Any], calls: dict[str, Call], store: RunStore) -> Work:
    begin = partial(worker.begin, plugins.sources(), tracking.used())
    return Work(function, calls, begin, PRELOADED, store.root)


@dataclass
class _Sweep:
    """The runs that are still to be done, and what became of them."""

    executor: Executor
    store: RunStore
    pending: dict[str, Experiment]
    workers: int
    checkpoint_seconds: float
    limit_minutes: float
    bar: tqdm
    clock: Clock
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
        busy, again = self._make(groups)
        more, _ = self._make([[name] for name in again])
        return busy + more

    def _make(self, groups: list[list[str]]) -> tuple[list[str], list[str]]:
        """Make each group in one place; the runs of another sweep, and those to be tried alone."""
        busy: list[str] = []
        again: list[str] = []
        if not groups:
            return busy, again
        members = {group[0]: group for group in groups}
        calls = {}
        for first, group in members.items():
            wanted = [self.pending[name] for name in group]
            arguments = wanted, group, self.store, self.checkpoint_seconds, self.limit_minutes
            calls[first] = Call(arguments, 60.0 * self.limit_minutes * len(group))
        work = _work(worker.record, calls, self.store)
        for look in self.executor.ends(work, self.workers):
            for first, end in look.ended.items():
                group = members[first]
                if end.failure is not None and len(group) > 1:
                    again += group
                    continue
                for name, recorded in zip(group, _told(end, len(group)), strict=True):
                    if recorded is False:
                        busy.append(name)
                    else:
                        self._done(name, None if recorded is True else recorded)
            self.clock.running([members[first] for first in look.running])
            self._describe(look.running)
        return busy, again

    def _describe(self, running: list[str]) -> None:
        shown = [self.pending[name].label for name in running[: self.workers]]
        self.bar.set_description(", ".join(shown) or "waiting", refresh=False)
        if not self.bar.disable:
            left = self.clock.left
            told = "" if left is None else f"about {told_time(left)} left"
            self.bar.set_postfix_str(told)
        if self.watch is not None:
            self.watch(self.ended)
            self.ended = 0

    def _done(self, name: str, failure: str | None) -> None:
        """Count a run that ended; one with a record did not fail, whatever its worker says."""
        record, wrong = self._recorded(name, patient=failure is None)
        self.clock.done(name, record)
        if record is None:
            self._failed(name, failure or wrong)
        self.ended += 1
        self.bar.update()

    def _recorded(self, name: str, patient: bool) -> tuple[Record | None, str]:
        """The record of a run; else why there is none that its worker told of."""
        until = time.monotonic() + SEEN_SECONDS * (patient and self.executor.shares_files)
        while True:
            try:
                record = self.store.find(self.pending[name])
            except InputError as error:
                return None, str(error)
            if record is not None or time.monotonic() >= until:
                break
            time.sleep(WAIT_SECONDS)
            os.listdir(self.store.root)  # which asks the server anew
        return record, (
            f"its run ended and its record is not in {self.store.root}, which must be one folder "
            "for this machine and for the workers, on a file system that they share"
        )

    def _failed(self, name: str, failure: str) -> None:
        self.failures[name] = failure
        try:
            failures.keep(self.store.root, name, self.pending[name], failure)
        except OSError as error:
            raise unwritable(self.store.root, error) from error
        if self.watch is None:
            self.bar.write(f"failed: {self.pending[name].label}: {failure}", file=sys.stderr)


def _told(end: End, number: int) -> list[bool | str]:
    """Of each run of a call whether it is recorded, or why it failed."""
    return [end.failure] * number if end.failure is not None else list(end.value)
