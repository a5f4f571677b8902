"""A process for each task: its memory is its own, and so is its end.

Whatever becomes of a process, its task ends with a value or with a reason: an exception, a call of
sys.exit, a death without a word, a time limit. No other task is touched by it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

from deltacontrol.theory.errors import InputError

_SAVING_SECONDS = 10.0  # that a process has to save its work when its parent ends
_GRACE_SECONDS = 120.0  # beyond its limit, for one that keeps the limit by itself and saves
_ATTEMPTS = 3  # to start a process, whose server may have died meanwhile


@dataclass(frozen=True)
class End:
    """How a task ended: with the function's value, or with the reason of its failure."""

    value: Any = None
    failure: str | None = None


@dataclass
class _Running:
    process: Any
    pipe: Connection
    seconds: float
    ends: float
    late: bool = False


def prestart(preload: Sequence[str]) -> None:
    """Begin to import the modules of later processes now, beside what this process does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    forkserver.ensure_running()


class Processes:
    """Calls of one function, each in a process of its own, `workers` at a time.

    Args:
        function: What to call; like its arguments it is named in a module that can be imported.
        begin: Called first in each process.
        workers: Processes at a time.
        seconds: How long one call may take; it keeps this limit by itself, and is killed where it
            does not.
        preload: Modules that are imported once, for all processes.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        begin: Callable[[], None],
        *,
        workers: int,
        seconds: float,
        preload: Sequence[str] = (),
    ) -> None:
        self._function, self._begin = function, begin
        self._workers, self._seconds = workers, seconds
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        self._running: dict[str, _Running] = {}

    @property
    def running(self) -> list[str]:
        """Names of the tasks that are being done."""
        return list(self._running)

    def ends(
        self, tasks: Mapping[str, tuple[Any, ...]], shares: Mapping[str, int] | None = None
    ) -> Iterator[dict[str, End]]:
        """Do all tasks; about once a second, how those ended that have ended since.

        Args:
            tasks: The function's arguments, by the name of the task.
            shares: How many times `seconds` a task may take, by its name; once by default.
        """
        waiting = list(tasks)
        # The processes wait on this pipe's end: it closes when this process stops or dies.
        alive, hold = self._context.Pipe(duplex=False)
        try:
            while waiting or self._running:
                ended: dict[str, End] = {}
                while waiting and len(self._running) < self._workers:
                    name = waiting.pop(0)
                    seconds = self._seconds * (shares or {}).get(name, 1)
                    failure = self._start(name, tasks[name], alive, seconds)
                    if failure is not None:
                        ended[name] = End(failure=failure)
                yield ended | self._collect()
        finally:
            hold.close()
            alive.close()
            for running in self._running.values():
                running.process.join(_SAVING_SECONDS)
                running.process.kill()
                running.pipe.close()
            self._running.clear()

    def _start(
        self, name: str, arguments: tuple[Any, ...], alive: Connection, seconds: float
    ) -> str | None:
        """Start a process; the reason where that is not possible."""
        try:
            # As bytes: what they hold may be of a user's file, which `begin` loads first.
            call = bytes(ForkingPickler.dumps((self._function, arguments)))
        except Exception as error:
            return f"it cannot be sent to a process of its own: {type(error).__name__}: {error}"
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
                process, receive, seconds, time.monotonic() + seconds + _GRACE_SECONDS
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
            minutes = running.seconds / 60
            return End(
                failure=f"it was stopped at its limit of {minutes:g} minutes; if it was not "
                "hanging, give it a larger --limit-minutes: it goes on from its checkpoint"
            )
        return End(
            failure=f"its process died without a message ({_code(running.process.exitcode)}), "
            "perhaps for lack of memory; try fewer workers, a smaller batch_size or more "
            "grad_accumulation"
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
    try:
        begin()
        function, arguments = pickle.loads(call)  # made by this process's parent
        end = End(function(*arguments))
    except InputError as error:
        end = End(failure=str(error))
    except SystemExit as error:
        end = End(failure=f"it called sys.exit({'' if error.code is None else error.code!r})")
    except KeyboardInterrupt:
        end = End(failure="it was interrupted; it goes on from its checkpoint")
    except BaseException as error:
        traceback.print_exc()
        end = End(failure=f"{type(error).__name__}: {error}")
    with suppress(BrokenPipeError):  # a parent that is gone is told nothing; the run is saved
        send.send(end)
    send.close()


def _end_with_parent(alive: Connection) -> None:
    try:
        alive.recv()
    except (EOFError, OSError):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # a training saves where it is
    time.sleep(_SAVING_SECONDS)
    os._exit(1)
