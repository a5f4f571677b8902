"""What executors on a cluster have in common: calls that are handed over, looked after and retried.

Workers see the store through a shared file system. A call whose worker died is handed over again,
and its run goes on from its checkpoint; one that failed by itself is not, nor is one that had its
time.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

from deltacontrol.experiments.runs.executors import calls, hosting
from deltacontrol.experiments.runs.executors.base import (
    SAVING_SECONDS,
    End,
    Executor,
    Look,
    Work,
    require_positive,
)

Handle = TypeVar("Handle")


@dataclass(frozen=True)
class Remote(Executor, Generic[Handle]):
    """Hands calls over to a cluster.

    Attributes:
        cpus: Cores of a run, which computes in as many threads.
        gpus: GPUs of a run.
        memory: Memory of a run in GiB.
        retries: How often a run is handed over again whose worker died.
    """

    shares_files: ClassVar[bool] = True

    cpus: int = 1
    gpus: float = 0.0
    memory: float | None = None
    retries: int = 2

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: One is too small.
        """
        require_positive(self, cpus=1, gpus=0, memory=0, retries=0)

    def threads(self, workers: int) -> int:
        """As many as a run has cores."""
        return self.cpus

    @abstractmethod
    def hand_over(
        self, work: Work, served: Mapping[str, Callable[[], End]], workers: int
    ) -> dict[str, Handle]:
        """Hand calls over, those first that stand first."""

    @abstractmethod
    def over(self, handles: Mapping[str, Handle], seconds: float) -> list[str]:
        """Names of the calls that are over, when the first one is, or after so many seconds."""

    @abstractmethod
    def end(self, handle: Handle) -> End:
        """How a call ended that is over."""

    @abstractmethod
    def stop(self, handle: Handle, *, at_once: bool) -> None:
        """Ask a call to stop, or stop it."""

    def room(self, workers: int) -> int:
        """How many calls may be handed over at a time."""
        return workers

    def ends(self, work: Work, workers: int) -> Iterator[Look]:
        """Hand over, look, and hand those over again whose worker died."""
        waiting, tries = list(work.calls), Counter[str]()
        running: dict[str, Handle] = {}
        try:
            while waiting or running:
                room = max(0, self.room(workers) - len(running))
                ended = self._begin(work, waiting[:room], workers, running)
                del waiting[:room]
                for name in self.over(running, 1.0) if running else []:
                    end = self.end(running.pop(name))
                    tries[name] += 1
                    if end.died and tries[name] <= self.retries:
                        waiting.insert(0, name)
                    elif end.died and self.retries:
                        told = f"{end.failure} (tried {tries[name]} times)"
                        ended[name] = replace(end, failure=told)
                    else:
                        ended[name] = end
                yield Look(ended, list(running)[:workers])
        finally:
            self._stop(running)

    def _begin(
        self, work: Work, names: list[str], workers: int, running: dict[str, Handle]
    ) -> dict[str, End]:
        """Hand these over; the ends of those that cannot be."""
        ended, served = {}, {}
        for name in names:
            try:
                served[name] = hosting.sent(work, name, self.threads(workers))
            except calls.UnsendableError as error:
                ended[name] = End(failure=str(error))
        if served:
            running |= self.hand_over(work, served, workers)
        return ended

    def _stop(self, handles: dict[str, Handle]) -> None:
        for handle in handles.values():
            self.stop(handle, at_once=False)
        until = time.monotonic() + 2 * SAVING_SECONDS
        while handles and (left := until - time.monotonic()) > 0:
            for name in self.over(handles, left):
                del handles[name]
        for handle in handles.values():
            self.stop(handle, at_once=True)


def missing(executor: str, package: str) -> str:
    """The message where a package is not installed."""
    return (
        f"the executor {executor} needs the package {package}, which is not installed: "
        'pip install "deltacontrol[cluster]"'
    )


def last_line(error: BaseException | Any) -> str:
    """What an error of another machine says at its end, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
