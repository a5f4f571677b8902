"""Making one call in a process of its own.

A call is sent as bytes, which a process reads after `Work.begin`: what its arguments hold may be of
a user's file, which has to be loaded first. The bytes were made by the sweep that wants the call.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

from deltacontrol.experiments.runs.executors.base import End, Work
from deltacontrol.theory.errors import InputError


class UnsendableError(Exception):
    """What is to be called cannot be sent to another process; the text says why."""


def packed(work: Work, name: str) -> bytes:
    """Function and arguments of a call.

    Raises:
        UnsendableError: They cannot be sent.
    """
    return as_bytes((work.function, work.calls[name].arguments))


def as_bytes(value: Any) -> bytes:
    """A value for another process.

    Raises:
        UnsendableError: It cannot be sent.
    """
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


def over_limit(seconds: float) -> str:
    """The reason of a call that was killed at its limit."""
    return (
        f"it was stopped at its limit of {seconds / 60:g} minutes; if it was not hanging, give it "
        "a larger --limit-minutes: it goes on from its checkpoint"
    )
