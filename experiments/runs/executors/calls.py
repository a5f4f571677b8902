"""Making one call in a process of its own, here or on another machine.

A call is sent as bytes, which a process reads after `Work.begin`: what its arguments hold may be of
a user's file, which has to be loaded first. The bytes were made by the sweep that wants the call.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

from deltacontrol.experiments.runs.executors.base import GRACE_SECONDS, End, Work, be_worker
from deltacontrol.theory.errors import InputError


class UnsendableError(Exception):
    """What is to be called cannot be sent to another process; the text says why."""


def packed(work: Work, name: str) -> bytes:
    """Function and arguments of a call.

    Raises:
        UnsendableError: They cannot be sent.
    """
    return _bytes((work.function, work.calls[name].arguments))


def _bytes(value: Any) -> bytes:
    try:
        return bytes(ForkingPickler.dumps(value))
    except Exception as error:
        raise UnsendableError(
            f"it cannot be sent to a process of its own: {type(error).__name__}: {error}"
        ) from error


def made(begin: Callable[[], None], function: Callable[[], Any], *, apart: bool = True) -> End:
    """How a call ends, whatever it raises; where it is not apart, Ctrl-C is the caller's."""
    try:
        begin()
        return End(function())
    except InputError as error:
        return End(failure=str(error))
    except SystemExit as error:
        return End(failure=f"it called sys.exit({'' if error.code is None else error.code!r})")
    except KeyboardInterrupt:
        if not apart:
            raise
        return End(failure="it was interrupted; it goes on from its checkpoint")
    except BaseException as error:
        traceback.print_exc()
        return End(failure=f"{type(error).__name__}: {error}")


def unpacked(call: bytes) -> Any:
    """Make a call that was `packed`."""
    function, arguments = pickle.loads(call)
    return function(*arguments)


def sent(work: Work, name: str, threads: int) -> Callable[[], End]:
    """The whole call as a function for a worker that may know nothing of this project yet.

    It is a closure over plain values, so that it is sent by its text and needs no module to be
    read. The worker gets this process's folder and search path, which a shared file system has in
    the same place.

    Raises:
        UnsendableError: It cannot be sent.
    """
    paths = [os.path.abspath(path) for path in sys.path]
    folder = os.getcwd()
    call, begin = packed(work, name), _bytes(work.begin)
    seconds = work.calls[name].seconds

    def serve() -> Any:
        import importlib
        import os
        import sys

        os.chdir(folder)
        sys.path[:] = list(dict.fromkeys([*filter(os.path.exists, paths), *sys.path]))
        importlib.invalidate_caches()
        calls = importlib.import_module("deltacontrol.experiments.runs.executors.calls")
        return calls.served(begin, call, seconds, threads)

    return serve


def served(begin: bytes, call: bytes, seconds: float, threads: int) -> End:
    """Make a call as a worker of a cluster, which ends itself where its limit is not kept.

    A thread of the system does so, which needs neither the interpreter nor the sweep.
    """
    be_worker(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True, file=sys.__stderr__)
    try:
        return made(lambda: pickle.loads(begin)(threads), lambda: unpacked(call))
    finally:
        faulthandler.cancel_dump_traceback_later()


def over_limit(seconds: float) -> str:
    """The reason of a call that was killed at its limit."""
    return (
        f"it was stopped at its limit of {seconds / 60:g} minutes; if it was not hanging, give it "
        "a larger --limit-minutes: it goes on from its checkpoint"
    )
