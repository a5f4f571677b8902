"""A process of this machine for each run: its memory is its own, and so is its end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, ClassVar

from deltacontrol.experiments.runs.executors import calls
from deltacontrol.experiments.runs.executors.base import (
    GRACE_SECONDS,
    SAVING_SECONDS,
    End,
    Executor,
    Look,
    Work,
    default_workers,
    threads_each,
)

_ATTEMPTS = 3  # to start a process, whose server may have died meanwhile


@dataclass
class _Running:
    process: Any
    pipe: Connection
    seconds: float
    ends: float
    late: bool = False


@dataclass(frozen=True)
class Processes(Executor):
    """A process of this machine for each run: the default."""

    name: ClassVar[str] = "processes"

    def prepare(self, preload: Sequence[str]) -> None:
        """Begin to import the modules of later processes now, beside what this process does."""
        _context(preload)
        forkserver.ensure_running()

    def places(self) -> int:
        """One process a core, or one where there is a GPU."""
        return default_workers()

    def threads(self, workers: int) -> int:
        """Its share of the cores."""
        return threads_each(workers)

    def ends(self, work: Work, workers: int, threads: int | None = None) -> Iterator[Look]:
        """Make each call in a process that is forked from a server with the modules."""
        return _Sweep(work, workers, threads or self.threads(workers)).ends()


def _context(preload: Sequence[str]) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


class _Sweep:
    """The processes of one piece of work."""

    def __init__(self, work: Work, workers: int, threads: int) -> None:
        self._work, self._workers = work, workers
        self._begin = partial(work.begin, threads)
        self._context = _context(work.preload)
        self._running: dict[str, _Running] = {}

    def ends(self) -> Iterator[Look]:
        """Make all calls; about once a second, how those ended that have ended since."""
        waiting = list(self._work.calls)
        # The processes wait on this pipe's end: it closes when this process stops or dies.
        alive, hold = self._context.Pipe(duplex=False)
        try:
            while waiting or self._running:
                ended: dict[str, End] = {}
                while waiting and len(self._running) < self._workers:
                    name = waiting.pop(0)
                    failure = self._start(name, alive)
                    if failure is not None:
                        ended[name] = End(failure=failure)
                ended |= self._collect()
                yield Look(ended, list(self._running))
        finally:
            hold.close()
            alive.close()
            for running in self._running.values():
                running.process.join(SAVING_SECONDS)
                running.process.kill()
                running.pipe.close()
            self._running.clear()

    def _start(self, name: str, alive: Connection) -> str | None:
        """Start a process; the reason where that is not possible."""
        try:
            call = calls.packed(self._work, name)
        except calls.UnsendableError as error:
            return str(error)
        seconds = self._work.calls[name].seconds
        for attempt in range(_ATTEMPTS):
            receive, send = self._context.Pipe(duplex=False)
            process = self._context.Process(target=_child, args=(send, alive, self._begin, call))
            try:
                process.start()
            except (EOFError, OSError) as error:
                receive.close()
                reason = f"no process could be started for it: {error or type(error).__name__}"
                time.sleep(0.2 * attempt)
                continue
            finally:
                send.close()
            self._running[name] = _Running(
                process, receive, seconds, time.monotonic() + seconds + GRACE_SECONDS
            )
            return None
        return reason

    def _collect(self) -> dict[str, End]:
        """Wait for a second at most; what ended."""
        ended = {}
        # A process is over when it says so or is gone: its own children may hold the pipe open.
        signs = [s for r in self._running.values() for s in (r.pipe, r.process.sentinel)]
        ready = wait(signs, timeout=1.0)
        for name, running in list(self._running.items()):
            if running.pipe in ready or running.process.sentinel in ready:
                ended[name] = self._end(running)
                running.pipe.close()
                del self._running[name]
            elif time.monotonic() > running.ends and not running.late:
                running.late = True
                running.process.kill()
        return ended

    def _end(self, running: _Running) -> End:
        try:
            end = running.pipe.recv() if running.pipe.poll() else None
        except (EOFError, OSError):
            end = None
        running.process.join(1.0)
        if running.process.is_alive():  # a thread of it goes on, and what is wanted is here
            running.process.kill()
            running.process.join(1.0)
        if end is not None:
            return end
        if running.late:
            return End(failure=calls.over_limit(running.seconds))
        return End(
            failure=f"its process died without a message ({_code(running.process.exitcode)}), "
            "perhaps for lack of memory; try fewer workers, a smaller batch_size or more "
            "grad_accumulation",
            died=True,
        )


def _code(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}"
    return f"exit code {'unknown' if code is None else code}"


def _child(
    send: Connection,
    alive: Connection,
    begin: Callable[[], None],
    call: bytes,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    end = calls.made(begin, partial(calls.unpacked, call))
    with suppress(BrokenPipeError):  # a parent that is gone is told nothing; the run is saved
        send.send(end)
    send.close()


def _end_with_parent(alive: Connection) -> None:
    try:
        alive.recv()
    except (EOFError, OSError):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # a training saves where it is
    time.sleep(SAVING_SECONDS)
    os._exit(1)
