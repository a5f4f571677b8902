"""The plan of a sweep before it starts, and the time that is left while it goes on."""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltacontrol.experiments.models.family import told_time
from deltacontrol.experiments.runs.experiment import Experiment
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.scheduling.forecast import Forecast


@dataclass(frozen=True)
class Plan:
    """What a sweep will do.

    Attributes:
        runs: How many runs are wanted.
        recorded: How many of them are recorded.
        seconds: Of each of the others, by the forecast; None where nothing like it is recorded.
        workers: Runs at a time.
    """

    runs: int
    recorded: int
    seconds: tuple[float | None, ...]
    workers: int

    @property
    def time_left(self) -> float:
        """Seconds until the runs are done of which the time is known."""
        return makespan([s for s in self.seconds if s is not None], self.workers)

    @property
    def text(self) -> str:
        """A sentence."""
        left, unknown = len(self.seconds), self.seconds.count(None)
        told = f"{_runs(self.runs)}, {self.recorded} recorded"
        if not left:
            return f"{told}: nothing to do"
        told += f": {left} to do, {min(self.workers, left)} at a time"
        if unknown == left:
            return f"{told}; no run like them is recorded that would tell how long it takes"
        told += f", about {told_time(self.time_left)} by recorded runs like them"
        if unknown:
            told += f", and {_runs(unknown)} more of which none like it is recorded"
        return told


def _runs(number: int) -> str:
    return f"{number} run{'s' * (number != 1)}"


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last of these is done, each begun by the worker that is free first.

    Example:
        >>> makespan([3.0, 1.0, 1.0, 2.0], 2)
        4.0
    """
    free = [0.0] * max(1, workers)
    for one in seconds:
        heapq.heapreplace(free, free[0] + one)
    return max(free)


def ordered(
    pending: Mapping[str, Experiment], order: str, forecast: Forecast
) -> dict[str, Experiment]:
    """The runs in the order in which they are to begin.

    With "longest" those come first of which nothing is known, with "shortest" last.
    """
    if order == "given":
        return dict(pending)
    last = float("inf")
    times = {n: s if (s := forecast.seconds(e)) is not None else last for n, e in pending.items()}
    return dict(sorted(pending.items(), key=lambda p: times[p[0]], reverse=order == "longest"))


class Clock:
    """The time that is left of a sweep.

    The forecast is corrected by the pace so far: the time from the beginning of a run to its end as
    the sweep sees it, the start of its process with it, over what was foretold of the run. Nothing
    is told while nothing is known of some run.

    Args:
        forecast: Of the times of runs.
        pending: The runs by name.
        workers: Runs at a time.
    """

    def __init__(self, forecast: Forecast, pending: Mapping[str, Experiment], workers: int) -> None:
        self._forecast, self._pending, self._workers = forecast, dict(pending), workers
        self._foretold = {name: forecast.seconds(e) for name, e in pending.items()}
        self._took, self._expected = 0.0, 0.0
        self._groups: dict[str, Sequence[str]] = {}  # of runs that are made in one place
        self._since: dict[str, float] = {}

    def running(self, groups: Sequence[Sequence[str]]) -> None:
        """These are being made now, each group in one place."""
        now = time.monotonic()
        self._groups = {group[0]: group for group in groups}
        self._since = {first: self._since.get(first, now) for first in self._groups}

    def done(self, name: str, record: Record | None) -> None:
        """A run ended, with a record or without one."""
        experiment = self._pending.pop(name, None)
        if record is None or experiment is None:
            return
        self._forecast.learn(record)
        expected = self._expected_of(name, experiment)
        first = next((f for f, group in self._groups.items() if name in group), None)
        if expected and first is not None:
            self._took += (time.monotonic() - self._since[first]) / len(self._groups[first])
            self._expected += expected

    @property
    def left(self) -> float | None:
        """Seconds, about; None where that is not known."""
        pace = self._took / self._expected if self._expected else 1.0
        times = {}
        for name, experiment in self._pending.items():
            seconds = self._expected_of(name, experiment)
            if seconds is None:
                return None
            times[name] = pace * seconds
        now, under_way = time.monotonic(), []
        for first, since in self._since.items():
            whole = sum(times.pop(name, 0.0) for name in self._groups[first])
            under_way.append(max(0.0, whole - (now - since)))
        return makespan([*under_way, *times.values()], self._workers)

    def _expected_of(self, name: str, experiment: Experiment) -> float | None:
        """Seconds of a run, kept once they are known, so that the pace is over one forecast."""
        if self._foretold[name] is None:
            self._foretold[name] = self._forecast.seconds(experiment)
        return self._foretold[name]
