"""Running experiments: one, or many at a time.

Each run has its own process, so that its memory and its random numbers are its own. A run that is
recorded is not repeated; one that was killed goes on from its checkpoint. Several sweeps may work
on one store, also from several machines: a lock per run keeps them from computing one run twice.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from deltacontrol.experiments.runs.experiment import Digests, digests_of
from deltacontrol.experiments.runs.provenance import usable_cores
from deltacontrol.experiments.runs.store import Experiment, Record, RunStore, Workspace, unwritable
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


def run(
    experiment: Experiment,
    store: RunStore,
    *,
    progress: bool = True,
    block: bool = True,
    checkpoint_seconds: float = 30.0,
) -> Record | None:
    """Run one experiment in this process, unless it is recorded, and return its record.

    Under `accelerate launch` every process calls this, and the first one writes.

    Args:
        experiment: What to run.
        store: Where its record is kept.
        progress: Whether to draw a progress bar.
        block: Wait for another process that computes the same run; otherwise return None.
        checkpoint_seconds: Time between checkpoints.

    Raises:
        InputError: From the experiment, because the store cannot be used, or because the files of
            the model, the data or users' code changed during the run.
    """
    found = store.find(experiment)
    if found is not None:
        return found
    digests = digests_of(experiment)
    partial = store.partial(experiment)
    first = int(os.environ.get("RANK", "0")) == 0
    with _locked(store, partial.name, block) if first else _unlocked() as mine:
        if not mine:
            return None
        found = store.find(experiment) if first else None
        if found is not None:
            return found
        began, worked, started = time.perf_counter(), time.process_time(), datetime.now(UTC)
        workspace = Workspace(partial, progress, checkpoint_seconds, store.root)
        outcome = experiment.execute(workspace)
        if not first:
            return None
        _require_unchanged(experiment, digests, partial)
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
        shutil.rmtree(partial, ignore_errors=True)
        return record


def _require_unchanged(experiment: Experiment, before: Digests, partial: Path) -> None:
    """Refuse to record a run under what it may not have read; its checkpoints are worth nothing."""
    after = digests_of(experiment)
    names = {"model": "its model", "data": "its data", "code": "the code of your classes"}
    changed = [text for n, text in names.items() if getattr(before, n) != getattr(after, n)]
    if changed:
        shutil.rmtree(partial, ignore_errors=True)
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

    Returns:
        The records, in the order of `experiments`.

    Raises:
        InputError: Some runs failed: all others are finished and recorded by then, and the message
            names each failed run and why. Also where the store cannot be used.
        KeyboardInterrupt: After the workers were stopped; a later call continues.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}; expected a whole number >= 1")
    names = [store.path(experiment).name for experiment in experiments]
    distinct = dict(zip(names, experiments, strict=True))
    pending = {name: e for name, e in distinct.items() if store.find(e) is None}
    if pending:
        workers = min(workers or default_workers(), len(pending))
        threads = threads_each(workers)
        with tqdm(total=len(distinct), disable=not progress, unit="run") as bar:
            bar.update(len(distinct) - len(pending))
            failures = _Sweep(store, pending, workers, threads, checkpoint_seconds, bar).finish()
        if failures:
            lines = "\n".join(f"  {pending[n].label} ({n}): {why}" for n, why in failures.items())
            raise InputError(
                f"{len(failures)} of {len(distinct)} runs failed; the others are recorded:\n{lines}"
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
    bar: tqdm
    failures: dict[str, str] = field(default_factory=dict)

    def finish(self) -> dict[str, str]:
        """Do all runs; returns the failed ones with their messages."""
        busy = self._survive(list(self.pending), block=False)
        self._survive(busy, block=True)
        return self.failures

    def _survive(self, names: list[str], block: bool) -> list[str]:
        """Do `names`; a process that dies takes down its pool, but no run except its own."""
        busy: list[str] = []
        while names:
            lost = self._pool(names, self.workers, block, busy)
            if not lost:
                break
            # Whoever died is among those that were running: try them alone to know which.
            suspects, names = lost[: self.workers + 1], lost[self.workers + 1 :]
            for name in suspects:
                if self._pool([name], 1, block, busy):
                    self._done(
                        name,
                        "its process died without a message, perhaps for lack of memory; "
                        "try fewer workers, a smaller batch_size or more grad_accumulation",
                    )
        return busy

    def _pool(self, names: list[str], workers: int, block: bool, busy: list[str]) -> list[str]:
        """Do `names` in one pool; returns those that were lost with it, in order."""
        lost: list[str] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        # The workers wait on this pipe's end: it closes when this process stops or dies.
        alive, hold = context.Pipe(duplex=False)
        pool = ProcessPoolExecutor(
            workers,
            mp_context=context,
            initializer=_begin_worker,
            initargs=(self.threads, alive, plugins.sources()),
            max_tasks_per_child=1,
        )
        try:
            futures: dict[Future, str] = {
                pool.submit(
                    _work, self.pending[name], self.store, block, self.checkpoint_seconds
                ): name
                for name in names
            }
            waiting = set(futures)
            while waiting:
                self._describe([futures[f] for f in futures if f in waiting and f.running()])
                done, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    name = futures[future]
                    try:
                        finished, failure = future.result()
                    except BrokenProcessPool:
                        lost.append(name)
                        continue
                    if finished:
                        self._done(name, failure)
                    else:
                        busy.append(name)
        except BaseException:
            hold.close()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            hold.close()
            alive.close()
        return [name for name in names if name in lost]

    def _describe(self, running: list[str]) -> None:
        shown = [self.pending[name].label for name in running[: self.workers]]
        self.bar.set_description(", ".join(shown) or "waiting")

    def _done(self, name: str, failure: str | None = None) -> None:
        if failure is not None:
            self.failures[name] = failure
            self.bar.write(f"failed: {self.pending[name].label}: {failure}", file=sys.stderr)
        self.bar.update()


def _begin_worker(threads: int, alive: Connection, sources: tuple[str, ...]) -> None:
    import torch

    plugins.load_sources(sources)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()


def _end_with_parent(alive: Connection) -> None:
    try:
        alive.recv()
    except (EOFError, OSError):
        pass
    os._exit(1)


def _work(
    experiment: Experiment, store: RunStore, block: bool, checkpoint_seconds: float
) -> tuple[bool, str | None]:
    """(finished, message of the failure): not every exception survives the way to the parent."""
    try:
        record = run(
            experiment,
            store,
            progress=False,
            block=block,
            checkpoint_seconds=checkpoint_seconds,
        )
        return record is not None, None
    except InputError as error:
        return True, str(error)
    except Exception as error:
        traceback.print_exc()
        return True, f"{type(error).__name__}: {error}"


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
