"""The trainings of a search: several at a time where they are certain to come, and one line.

What is handed over ahead is trained as in a sweep, in as many processes as there are cores, and in
one pass where copies can share one; what is asked for after that is found in the store. So neither
the order in which a search asks nor what it makes of the answers changes.
"""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from deltacontrol.experiments.runs.experiment import Experiment
    from deltacontrol.experiments.runs.record import Record
    from deltacontrol.experiments.runs.store import RunStore

COLUMNS = 80
LONGEST_LABEL = 24


class Trainings:
    """Trainings in parts of a search, each recorded, or found among the records.

    Args:
        store: where they are recorded.
        line: tells how many are done.
    """

    def __init__(self, store: RunStore, line: Line) -> None:
        self.store, self.line = store, line

    def ahead(self, part: str, trainings: Sequence[Experiment]) -> None:
        """Do trainings that will be asked for whatever the others of them give.

        One that fails is left to `one`, which tries it alone, and says why where it fails again.
        """
        from deltacontrol.experiments.runs.running import companies, run_together
        from deltacontrol.experiments.runs.sweep import run_all

        distinct = {self.store.path(training).name: training for training in trainings}
        missing = {n: one for n, one in distinct.items() if self.store.find(one) is None}
        workers = min(_processes(), len(missing))
        # One at a time, only what shares a pass gains.
        groups = [[*missing.values()]] if workers > 1 else companies([*missing.values()])
        for group in groups:
            if len(group) < 2:
                continue
            try:
                with self.line.timed(part, len(group), workers):
                    if workers > 1:
                        run_all(group, self.store, workers, watch=self.line.ended)
                    else:
                        run_together(group, self.store, progress=False)
            except InputError:
                pass
            for training in group:
                if self.store.find(training) is not None:
                    self.line.count(part, self.store.path(training).name)

    def one(self, part: str, training: Experiment) -> Record:
        """The record of a training.

        Raises:
            InputError: from the training.
        """
        from deltacontrol.experiments.runs.sweep import run

        record = self.store.find(training)
        if record is None:
            with self.line.timed(part, 1):
                record = run(training, self.store, progress=False)
        assert record is not None
        self.line.count(part, record.id)
        return record


def _processes() -> int:
    """How many at a time; one where this process is itself one of several of a sweep."""
    from deltacontrol.experiments.runs.sweep import default_workers

    return default_workers() if multiprocessing.parent_process() is None else 1


class Line:
    """One line: trainings that are done, how many there are at most, and the time.

    The time that is left is that of one training after another up to the most that there may be.
    It is not told before a training of each part that is to come was timed: those of one part say
    nothing of those of another.

    Args:
        label: of the search; cut where it is long.
        most: trainings at most, of each part.
        shown: whether it is drawn.
    """

    def __init__(self, label: str, most: Mapping[str, int], shown: bool) -> None:
        from tqdm import tqdm

        self.most = dict(most)
        self.done: dict[str, set[str]] = {part: set() for part in most}
        self._timed: dict[str, list[float]] = {part: [] for part in most}
        self._under_way = 0  # of those that `ended` told of
        short = label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"
        columns = min(COLUMNS, shutil.get_terminal_size().columns) - 1
        self._bar = tqdm(desc=short, total=1, ncols=columns, disable=not shown, bar_format="{desc}")
        self.draw()

    @property
    def text(self) -> str:
        """How many are done, and of how many at most."""
        done = sum(map(len, self.done.values())) + self._under_way
        return f"{done} of at most {sum(self.most.values())}"

    @property
    def seconds_left(self) -> float | None:
        """At most, if trainings take as long as they did so far; None where that is not known."""
        total = 0.0
        for part, most in self.most.items():
            left, timed = most - len(self.done[part]), self._timed[part]
            if left > 0 and not timed:
                return None
            if left > 0:
                total += left * sum(timed) / len(timed)
        return total

    def count(self, part: str, name: str) -> None:
        """A training of a part is recorded."""
        self.done[part].add(name)
        self.draw()

    def ended(self, number: int) -> None:
        """So many more of several at a time ended, which will be counted when all have."""
        self._under_way += number
        self.draw()

    def finish(self, part: str) -> None:
        """No more trainings of a part will come."""
        self.most[part] = len(self.done[part])
        self.draw()

    @contextmanager
    def timed(self, part: str, number: int, at_a_time: int = 1) -> Iterator[None]:
        """Take the time of ``number`` trainings of a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._under_way = 0
        each = (time.perf_counter() - began) * at_a_time / number
        self._timed[part] += [each] * number

    def draw(self) -> None:
        """Draw the line with what is known now."""
        from tqdm import tqdm

        left = self.seconds_left
        told = "" if left is None else f", at most {tqdm.format_interval(round(left))} left"
        self._bar.total = max(1, sum(self.most.values()))
        self._bar.n = sum(map(len, self.done.values())) + self._under_way
        self._bar.bar_format = f"{{desc}}: |{{bar}}| {self.text} [{{elapsed}}{told}]"
        self._bar.refresh()

    def close(self) -> None:
        """Leave the line as it is."""
        self._bar.close()
