"""Executors by name: found in this folder, written as ``ray:gpus=1,retries=3``.

Users' own executors are found as `deltacontrol.theory.plugins` says. `using` says which one sweeps
take that are not told, also those inside of a search.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from deltacontrol.experiments.runs import executors
from deltacontrol.experiments.runs.executors.base import Executor
from deltacontrol.theory import parsing, plugins
from deltacontrol.theory.errors import InputError

__all__ = [
    "DEFAULT",
    "available",
    "chosen",
    "chosen_workers",
    "executor_of",
    "require_workers",
    "using",
]

DEFAULT = "processes"
_CHOSEN: ContextVar[tuple[Executor, int | None] | None] = ContextVar("executor", default=None)


def available() -> dict[str, type[Executor]]:
    """All executors by name, in alphabetical order; users' own among them."""
    added = ((kind.name, kind) for kind in plugins.members(Executor))
    return plugins.merged("executor", _own(), added)


@cache
def _own() -> dict[str, type[Executor]]:
    return {kind.name: kind for kind in plugins.defined(executors, Executor)}


def executor_of(given: Executor | str) -> Executor:
    """The executor of a text, or itself.

    Raises:
        InputError: An unknown name or option, or a value that is refused.

    Example:
        >>> executor_of("processes:order=longest")
        Processes(order='longest')
    """
    if isinstance(given, Executor):
        return given
    return parsing.built("executor", given, available())


def chosen(given: Executor | str | None = None, otherwise: str = DEFAULT) -> Executor:
    """The given executor, else that of `using`, else the one that is named otherwise."""
    if given is not None:
        return executor_of(given)
    known = _CHOSEN.get()
    return executor_of(otherwise) if known is None else known[0]


def chosen_workers() -> int | None:
    """Runs at a time by `using`; None where it does not say."""
    known = _CHOSEN.get()
    return None if known is None else known[1]


def require_workers(workers: int | None) -> None:
    """Refuse a number of runs at a time that cannot be; raises `InputError`."""
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}; expected a whole number >= 1")


@contextmanager
def using(given: Executor | str, workers: int | None = None) -> Iterator[Executor]:
    """Let sweeps inside that are not told otherwise take this executor, ready to be used.

    Args:
        given: The executor.
        workers: Runs at a time.

    Raises:
        InputError: As `executor_of`, or what the executor needs is not there.
    """
    require_workers(workers)
    executor = executor_of(given)
    with executor.session(workers):
        token = _CHOSEN.set((executor, workers))
        try:
            yield executor
        finally:
            _CHOSEN.reset(token)
