"""Errors that a user can act on.

Every mistake in an argument raises `InputError` with one message: what was wrong, what was
expected, what to try. The command line prints it without a traceback and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

__all__ = ["InputError", "unknown"]


class InputError(ValueError):
    """An argument, a file or a name that cannot be used; the message says what to try."""


def unknown(kind: str, name: object, options: Iterable[str]) -> InputError:
    """The error for a name that is not among `options`, naming the nearest ones.

    Args:
        kind: what the name stands for, such as ``"task"``.
        name: the name that was given; what is no text is shown as it is.
        options: every name that would have been accepted.

    Returns:
        An `InputError`, to be raised by the caller.

    Example:
        >>> print(unknown("task", "moive", ["movie", "rt", "sms"]))
        unknown task 'moive'; nearest: movie; known: movie, rt, sms
    """
    known = sorted(set(options))
    nearest = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    parts = [f"unknown {kind} {name!r}"]
    if nearest:
        parts.append("nearest: " + ", ".join(nearest))
    parts.append("known: " + (", ".join(known) if known else "none"))
    return InputError("; ".join(parts))


def raised_in(error: BaseException, packages: Collection[str]) -> bool:
    """Whether an error was raised in the code of these packages, not in that of a user.

    Lack of memory and what is not implemented do not count: they are no fault of an argument.
    """
    if isinstance(error, NotImplementedError | RecursionError | UnicodeError | MemoryError):
        return False
    if type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] in packages


def first_lines(error: BaseException, number: int) -> str:
    """The first lines of a library's error as one, without a full stop; its class without any.

    Example:
        >>> first_lines(OSError("no such file."), 1), first_lines(OSError(), 1)
        ('no such file', 'OSError')
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:number]).rstrip(".") or type(error).__name__
