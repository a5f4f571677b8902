"""Two contestants, paired over tasks and seeds: difference, interval, equivalence, what is missing.

With scores a_{ts} and b_{ts} of task t and seed s the difference of a task is the mean of
a_{ts} - b_{ts} over the seeds that both have, and that of a corpus the mean over its tasks, which
are not independent of each other. The unit of replication is the corpus where there are two or more
(the task, where each has a corpus of its own), else the seed; the interval is Student's over it.
Two contestants are *equivalent* within a margin where the 90 % interval lies inside ±margin, which
is the pair of one-sided tests at 5 % (Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics
15, 1987).

Scores on few rows take few values, so that all differences can be the same by chance. Nothing is
then known of their spread: the interval is a point, and no verdict follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.evidence import CONFIDENCE, Evidence, units

Scores = Mapping[tuple[str, int], float]  # by task and seed
FARTHEST = 1e6  # half widths of an interval, beyond which no number of units is named
EQUIVALENCE = 0.9  # of the interval that two one-sided tests at 5 % amount to


@dataclass(frozen=True)
class Difference:
    """What tells two contestants apart.

    Attributes:
        first: name of the one whose value is larger where the difference is positive.
        second: name of the other one.
        evidence: the mean difference with its interval.
        margin: within which both count as equal.
        quantity: what the difference is of, such as ``"accuracy"``.
    """

    first: str
    second: str
    evidence: Evidence
    margin: float
    quantity: str

    @property
    def sides(self) -> tuple[float, float]:
        """The ends of the 95 % interval."""
        return self.evidence.bounds(CONFIDENCE)

    @property
    def flat(self) -> bool:
        """Whether the differences of all units are the same, so that their spread is not known."""
        interval = self.evidence.interval
        return interval is not None and interval.method == "t" and len(set(interval.data)) == 1

    @property
    def equivalent(self) -> bool:
        """Whether the 90 % interval lies within the margin."""
        low, high = self.evidence.bounds(EQUIVALENCE)
        return -self.margin <= low and high <= self.margin

    @property
    def verdict(self) -> str:
        """Who is ahead, whether both are equivalent, or that it cannot be told."""
        if self.flat:
            return "cannot be told"
        low, high = self.sides
        ahead = self.first if low > 0 else self.second if high < 0 else ""
        equal = f"equivalent within {self.margin:g}" if self.equivalent else ""
        told = [f"{ahead} is higher" if ahead else "", equal]
        return ", ".join(t for t in told if t) or "cannot be told"

    @property
    def needed(self) -> str:
        """How many units would tell, if mean and spread stayed as they are; empty where it does."""
        if self.verdict != "cannot be told" or self.evidence.interval is None:
            return ""
        if self.flat:
            return "all differences are the same: take more rows, tasks or seeds"
        if self.evidence.interval.method != "t":  # draws, which no further training adds to
            return ""
        center, unit = self.evidence.value, self.evidence.interval
        found = {}
        half = (self.sides[1] - self.sides[0]) / 2
        if half < FARTHEST * abs(center):
            found["tell them apart"] = math.ceil(unit.count * (half / abs(center)) ** 2)
        room = self.margin - abs(center)
        low, high = self.evidence.bounds(EQUIVALENCE)
        if (high - low) / 2 < FARTHEST * room:
            count = math.ceil(unit.count * ((high - low) / 2 / room) ** 2)
            found["show that they are equivalent"] = count
        if not found:
            return ""
        goal = min(found, key=lambda name: found[name])
        return f"about {units(found[goal], unit.unit)} would {goal}"


def paired(
    names: tuple[str, str],
    first: Scores,
    second: Scores,
    *,
    margin: float,
    quantity: str,
    corpora: Mapping[str, str] | None = None,
) -> Difference:
    """The difference of two contestants over the pairs of task and seed that both have.

    Args:
        names: of both.
        first: scores of the first one.
        second: scores of the second one.
        margin: within which both count as equal, a positive number.
        quantity: what the scores are.
        corpora: whose texts each task has; a task that is not there has texts of its own.

    Raises:
        InputError: fewer than two units are shared, or the margin is not positive.
    """
    require_margin(margin)
    by_task: dict[str, dict[int, float]] = {}
    for task, seed in sorted(first.keys() & second.keys()):
        by_task.setdefault(task, {})[seed] = first[task, seed] - second[task, seed]
    tasks = {task: _mean(values.values()) for task, values in by_task.items()}
    by_corpus: dict[str, list[float]] = {}
    for task, value in tasks.items():
        by_corpus.setdefault((corpora or {}).get(task, task), []).append(value)
    means = {corpus: _mean(values) for corpus, values in by_corpus.items()}
    details: dict[str, Any] = {"by task": tasks}
    if len(means) > 1:
        shared = len(means) < len(tasks)
        data, unit = list(means.values()), "corpus" if shared else "task"
        details |= {"by corpus": means} if shared else {}
    else:
        seeds = sorted(set.intersection(*(set(v) for v in by_task.values()))) if by_task else []
        data, unit = [_mean(v[seed] for v in by_task.values()) for seed in seeds], "seed"
    if len(data) < 2:
        raise InputError(
            f"{names[0]} and {names[1]} share {len(data)} pairs of task and seed; a difference "
            "with an interval needs tasks of two corpora, or two seeds of one"
        )
    details["seeds of a task"] = min(map(len, by_task.values()))
    evidence = Evidence.mean(data, unit, details=details)
    return Difference(*names, evidence, margin, quantity)


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept)


def require_margin(margin: float) -> None:
    """Refuse a margin that is no positive number.

    Raises:
        InputError: it is not.
    """
    if not margin > 0 or not math.isfinite(margin):
        raise InputError(f"margin is {margin}; expected a positive number, such as 0.02")
