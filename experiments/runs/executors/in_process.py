"""The runs in this process: for debugging, and where no other process may be started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from deltacontrol.experiments.runs.executors import calls
from deltacontrol.experiments.runs.executors.base import (
    Executor,
    Look,
    Work,
    threads_each,
)


@dataclass(frozen=True)
class InProcess(Executor):
    """One run after another, in this process.

    A run that kills its process, or hangs outside of Python, takes the sweep with it; the same
    command goes on.
    """

    name: ClassVar[str] = "in-process"

    def places(self) -> int:
        """One."""
        return 1

    def threads(self, workers: int) -> int:
        """Those of all cores."""
        return threads_each(1)

    def ends(self, work: Work, workers: int) -> Iterator[Look]:
        """Make one call between two looks."""
        import torch

        before = torch.get_num_threads()
        for name, call in work.calls.items():
            yield Look({}, [name])
            try:
                end = calls.made(
                    lambda: work.begin(self.threads(1)),
                    lambda call=call: work.function(*call.arguments),
                    apart=False,
                )
            finally:
                torch.set_num_threads(before)
            yield Look({name: end}, [])
