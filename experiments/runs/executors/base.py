"""An executor: calls of one function, each made somewhere, each ended with a value or a reason.

Whatever becomes of a call, it ends: with the function's value, or with why there is none (an
exception, a call of sys.exit, a death without a word, a time limit). No other call is touched by
it. What is called says nothing of where it is called, and its numbers do not depend on that: a
sweep has the same records whoever executes it.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from deltacontrol.experiments.runs.provenance import usable_cores
from deltacontrol.theory.errors import InputError

GRACE_SECONDS = 120.0  # beyond its limit, for a call that keeps the limit by itself and saves
SAVING_SECONDS = 10.0  # that a call has to save its work when it is told to stop


@dataclass(frozen=True)
class End:
    """How a call ended: with the function's value, or with the reason of its failure.

    Attributes:
        value: What the function returned.
        failure: Why it did not.
        died: Whether its process was lost, so that another try may go well.
    """

    value: Any = None
    failure: str | None = None
    died: bool = False


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        arguments: Of the function.
        seconds: How long it may take; it keeps this limit by itself, and is killed where it does
            not and can be.
    """

    arguments: tuple[Any, ...]
    seconds: float


@dataclass(frozen=True)
class Work:
    """Calls of one function.

    Attributes:
        function: What to call; like its arguments it is named in a module that can be imported.
        calls: By name, in the order in which they are to begin.
        begin: Called first in each process, before the arguments are read, with the number of
            threads that are to be used there.
        preload: Modules that every process needs.
        folder: For files of the executor; of the store, where every worker sees it.
    """

    function: Callable[..., Any]
    calls: Mapping[str, Call]
    begin: Callable[[int], None]
    preload: Sequence[str] = ()
    folder: Path = field(default_factory=Path)


@dataclass(frozen=True)
class Look:
    """What a look at the calls found.

    Attributes:
        ended: How those ended that have since the last look, by name.
        running: Names of those that are being made.
    """

    ended: dict[str, End]
    running: list[str]


@dataclass(frozen=True)
class Executor(ABC):
    """Makes calls; its fields are its options, as in ``ray:cpus=2,order=longest``.

    Attributes:
        name: Of the executor.
        shares_files: Whether its workers may be on other machines, which see the store later.
        order: In which runs begin: as given, or those first that take longest, or shortest, by
            what is recorded of runs like them.
    """

    name: ClassVar[str]
    shares_files: ClassVar[bool] = False

    order: Literal["given", "longest", "shortest"] = "given"

    def session(self, workers: int | None) -> AbstractContextManager[None]:
        """What has to be there while calls are made; it may be entered twice.

        Raises:
            InputError: A package or a cluster is missing.
        """
        return nullcontext()

    def prepare(self, preload: Sequence[str]) -> None:
        """Begin what takes a while beside what this process does."""
        return None

    @abstractmethod
    def places(self) -> int:
        """Calls at a time where nobody says how many."""

    @abstractmethod
    def threads(self, workers: int) -> int:
        """Threads of each of so many calls at a time."""

    @abstractmethod
    def ends(self, work: Work, workers: int) -> Iterator[Look]:
        """Make all calls, so many at a time; about once a second, how it stands.

        Closing the iterator stops those that are being made; they may save first.
        """


def default_workers() -> int:
    """One process on a GPU, which they would have to share, else one per core.

    A worker of a cluster has its share of a machine for one process.
    """
    import torch

    return 1 if torch.cuda.is_available() or _SHARE is not None else usable_cores()


def threads_each(workers: int) -> int:
    """Threads of each of `workers` processes: its share of the cores, at most OMP_NUM_THREADS."""
    share = max(1, (_SHARE or usable_cores()) // workers)
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(chosen)) if chosen.isdigit() and int(chosen) else share


_SHARE: int | None = None  # cores of this process, where it is a worker of a cluster


def be_worker(cores: int) -> None:
    """Say that this process is a worker of a cluster, and how many cores are its own."""
    global _SHARE
    _SHARE = cores


def require_positive(executor: Executor, **least: float) -> None:
    """Refuse numbers below their least value.

    Raises:
        InputError: With the field's name.
    """
    for f in fields(executor):
        value = getattr(executor, f.name)
        if f.name in least and value is not None and not least[f.name] <= value < math.inf:
            raise InputError(
                f"{executor.name}: {f.name} is {value:g}; expected a number from "
                f"{least[f.name]:g} on"
            )
