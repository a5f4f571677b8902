"""Statements of papers, of the form "A beats B by δ", as claims that real fine-tuning decides.

A statement is a TOML file:

    id = 991                        # a number above 900, of your own
    name = "lora-beats-bitfit"      # letters, digits, - and _: it names the file of the result
    title = "LoRA beats BitFit by a point"
    statement = "At equal steps and tuned rates LoRA is at least a point more accurate"
    source = "Authors, venue, year, table"
    first = "lora:rank=8"           # a delta, or several with spaces between; rates are tuned
    second = "bitfit"
    relation = "higher"             # or "equivalent"
    by = 0.01                       # δ, above 0: of the difference, or the margin of equivalence
    tasks = ["movie", "trec6", "rt"]
    seeds = 5
    equal = "steps"                 # or "parameters", or "time"

and, where the defaults are not wanted, ``model``, ``steps``, ``batch_size``, ``max_length``,
``eval_limit``, ``rates``, ``search_seeds``. Rates are tuned for each contestant on each task by a
search on validation rows: among these rates, by default those that the delta's own file names, with
that many trainings of each.

How it is judged. The number is the mean over corpora of the paired difference of test scores, of
each the mean over its tasks, with Student's interval over corpora (over seeds, where there is one):
tasks of one corpus, such as trec6 and trec50, are not independent of each other. "higher": the
whole interval is above δ. "equivalent": it is within ±δ.

Assumptions as code: no chosen rate is at an end of its grid; the differences that give the interval
are not all the same, from which no spread can be told; with ``equal`` the trained parameters,
or the seconds of a training, differ by a quarter at most.

Negative control. "higher": the contestants do not differ, the second one is compared with itself,
by trainings with other seeds; passing case: the first one against guessing. "equivalent": the
second one is trained for a single step; passing case: the second one against itself with other
seeds.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from deltacontrol.experiments.measures.paired import Difference, Scores, paired
from deltacontrol.experiments.tasks import corpus_of
from deltacontrol.theory.claims import Claim, Evidence, Records, Threshold
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    from deltacontrol.experiments.studies.learning_rates.search import RateSearch
    from deltacontrol.experiments.training.finetune import FineTuning

STATEMENTS = Path(__file__).resolve().parent / "statements"
RATES, AT_END = "rates", "rates at an end"  # where a result keeps them
FIRST_NUMBER = 900
ALIKE = 1.25  # factor between parameters, or seconds, that count as equal
METRICS = ("accuracy", "pearson")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
_MANY = 10**9
Relation = Literal["higher", "equivalent"]
Equal = Literal["steps", "parameters", "time"]


@dataclass(frozen=True)
class Statement:
    """What a file states; see the module."""

    id: int
    name: str
    title: str
    statement: str
    source: str
    first: str
    second: str
    relation: Relation
    by: float
    tasks: tuple[str, ...]
    seeds: int = 5
    equal: Equal = "steps"
    model: str = "minilm-l6"
    steps: int = 100
    batch_size: int = 16
    max_length: int = 64
    eval_limit: int = 1000
    rates: tuple[float, ...] = ()
    search_seeds: int = 3

    def __post_init__(self) -> None:
        """Check what can be checked before any training.

        Raises:
            InputError: naming the field.
        """
        for name, options in (("relation", get_args(Relation)), ("equal", get_args(Equal))):
            if getattr(self, name) not in options:
                raise unknown(name, str(getattr(self, name)), options)
        if not isinstance(self.id, int) or isinstance(self.id, bool) or self.id <= FIRST_NUMBER:
            raise InputError(f"id is {self.id!r}; expected a whole number above {FIRST_NUMBER}")
        for name in ("name", "title", "statement", "source", "first", "second", "model"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise InputError(f"{name} is {getattr(self, name)!r}; expected a text")
        if not _NAME.fullmatch(self.name):
            raise InputError(
                f"name is {self.name!r}, which names the file of the result; expected at most 80 "
                "letters a to z, digits, - and _, such as lora-beats-bitfit"
            )
        if self.id >= 10**9:
            raise InputError(f"id is above {10**9}; expected a shorter number")
        for name in ("first", "second"):
            text = getattr(self, name)
            if not text.split() or "@" in text:
                raise InputError(
                    f"{name} is {text!r}; expected deltas such as lora:rank=8, without a learning "
                    "rate: it is tuned"
                )
        if self.first.split() == self.second.split():
            raise InputError(f"first and second are both {self.first!r}; expected different ones")
        tasks = self.tasks
        if (
            not isinstance(tasks, list | tuple)
            or not tasks
            or not all(isinstance(task, str) for task in tasks)
            or len(set(tasks)) < len(tasks)
        ):
            raise InputError(f"tasks is {tasks!r}; expected a list of different tasks")
        object.__setattr__(self, "tasks", tuple(tasks))
        rates = self.rates
        if not isinstance(rates, list | tuple) or not all(
            isinstance(rate, float | int) and not isinstance(rate, bool) and 0 < rate < _MANY
            for rate in rates
        ):
            raise InputError(f"rates is {rates!r}; expected learning rates, such as [1e-3, 1e-2]")
        object.__setattr__(self, "rates", tuple(float(rate) for rate in rates))
        if isinstance(self.by, bool) or not isinstance(self.by, int | float):
            raise InputError(f"by is {self.by!r}; expected a number, such as 0.01")
        if not 0 < self.by < 1:
            raise InputError(
                f"by is {self.by}; expected a number above 0 and below 1, such as 0.01: equal "
                "contestants must lie wholly below it, or the control has no power, and scores do "
                "not differ by more"
            )
        for name, least, most in (("seeds", 2, 1000), ("steps", 2, _MANY),
                                  ("batch_size", 1, _MANY), ("max_length", 1, _MANY),
                                  ("eval_limit", 1, _MANY), ("search_seeds", 1, 1000)):  # fmt: skip
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not least <= value <= most:
                raise InputError(
                    f"{name} is {value!r}; expected a whole number, of at least {least} and at "
                    f"most {most}"
                )

    @classmethod
    def read(cls, path: Path) -> Statement:
        """From a file.

        Raises:
            InputError: there is none, it is no TOML, or a field is missing, unknown or wrong.
        """
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no TOML: {error}") from error
        names = [f.name for f in fields(cls)]
        for name in document:
            if name not in names:
                raise unknown(f"field of {path}", name, names)
        needed = ("id", "name", "title", "statement", "source", "first", "second", "relation",
                  "by", "tasks")  # fmt: skip
        missing = [name for name in needed if name not in document]
        if missing:
            raise InputError(f"{path} lacks {', '.join(missing)}; see `deltacontrol judge --help`")
        try:
            return cls(**document)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    # -- what is trained -------------------------------------------------------------------------

    def search(self, contestant: str, task: str) -> RateSearch:
        """The search of a contestant's rate on a task."""
        from deltacontrol.experiments.studies.learning_rates.search import RateSearch

        return RateSearch(
            model=self.model,
            task=task,
            deltas=tuple(contestant.split()),  # type: ignore[arg-type]
            rates=self.rates,
            seeds=self.search_seeds,
            steps=self.steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            eval_limit=self.eval_limit,
        )

    def searches(self) -> list[RateSearch]:
        """Those of both contestants on every task."""
        return [self.search(c, task) for c in (self.first, self.second) for task in self.tasks]

    def training(
        self, contestant: str, task: str, seed: int, rate: float, *, steps: int | None = None
    ) -> FineTuning:
        """One training, evaluated on test rows."""
        from deltacontrol.experiments.training.finetune import FineTuning

        return FineTuning(
            model=self.model,
            task=task,
            deltas=tuple(contestant.split()),  # type: ignore[arg-type]
            seed=seed,
            learning_rate=rate,
            steps=steps or self.steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            eval_limit=self.eval_limit,
        )

    def judged(self, document: Mapping[str, Any]) -> Claim:
        """The claim as a kept result has it: at the rates that were searched for it.

        Raises:
            InputError: the result is of another statement, or has no such rates.
        """
        try:
            (part,) = document["outcome"]["parts"]
            kept = part["evidence"]["details"]
            both = (self.first, self.second)
            rates = {(c, t): float(kept[RATES][c][t]) for c in both for t in self.tasks}
            return self.claim(rates, kept[AT_END])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"the kept result of {self.name} has not the rates of what the statement compares "
                f"({error}); judge the statement anew"
            ) from error

    def claim(self, rates: Mapping[tuple[str, str], float], at_end: Sequence[str]) -> Claim:
        """The claim, once rates are chosen.

        Args:
            rates: by contestant and task.
            at_end: what has a rate at an end of its grid.
        """
        court = _Court(self, rates, tuple(at_end))
        higher = self.relation == "higher"
        name = "test score of the first less that of the second, mean over corpora"
        bound: Any = self.by if higher else (-self.by, self.by)
        return Claim(
            id=self.id,
            name=self.name,
            title=self.title,
            statement=self.statement,
            source=self.source,
            predict=lambda records: {},
            threshold=Threshold(">" if higher else "within", bound, name),
            measure=lambda prediction, records: court.measured(records),
            negative_control=lambda prediction, records: court.control(records),
            passing_control=lambda prediction, records: court.passing(records),
            on="real fine-tuning",
            runs=court.trainings,
            revised="tasks of one corpus are one unit now, not several independent ones",
        )


@dataclass(frozen=True)
class _Court:
    """A statement with its rates: what is trained for it, and what the records say."""

    statement: Statement
    rates: Mapping[tuple[str, str], float]
    at_end: tuple[str, ...]

    def trainings(self) -> list[FineTuning]:
        """Of both contestants, and of the control: the second one with other seeds, or a step."""
        s = self.statement
        found = [self._one(c, t, seed) for c in (s.first, s.second) for t, seed in self._cells()]
        found += [self._one(s.second, t, seed + s.seeds) for t, seed in self._cells()]
        if s.relation == "equivalent":
            found += [self._one(s.second, t, seed, steps=1) for t, seed in self._cells()]
        return found

    def measured(self, records: Records) -> Evidence:
        """The first one less the second one."""
        s = self.statement
        first, second = (self._scores(records, c) for c in (s.first, s.second))
        more, sizes = self._alike(records)
        pairs = self._paired(first, second)
        spread = {"the differences are not all the same": not pairs.flat}
        rates_inside = {"no chosen rate is at an end of its grid": not self.at_end}
        return self._evidence(
            first,
            second,
            assumptions=rates_inside | sizes | spread,
            details=more | {AT_END: list(self.at_end), RATES: self._chosen()},
            note=f"{s.model}, {s.steps} steps, rates tuned on validation rows",
        )

    def control(self, records: Records) -> Evidence:
        """Contestants that do not differ; of an equivalence, ones that do."""
        s = self.statement
        second = self._scores(records, s.second)
        if s.relation == "higher":
            other = self._scores(records, s.second, shift=s.seeds)
            return self._evidence(other, second, note=f"{s.second} against itself, other seeds")
        short = self._scores(records, s.second, steps=1)
        return self._evidence(second, short, note=f"{s.second} against itself after one step")

    def passing(self, records: Records) -> Evidence:
        """A case in which the check passes."""
        s = self.statement
        if s.relation == "higher":
            first = self._scores(records, s.first)
            guessing = self._scores(records, s.first, of=_guessing)
            return self._evidence(first, guessing, note=f"{s.first} against guessing")
        second, other = (self._scores(records, s.second, shift=x) for x in (0, s.seeds))
        return self._evidence(other, second, note=f"{s.second} against itself, other seeds")

    def _chosen(self) -> dict[str, dict[str, float]]:
        both = (self.statement.first, self.statement.second)
        return {c: {t: self.rates[c, t] for t in self.statement.tasks} for c in both}

    def _cells(self) -> list[tuple[str, int]]:
        s = self.statement
        return [(task, seed) for task in s.tasks for seed in range(s.seeds)]

    def _one(self, contestant: str, task: str, seed: int, steps: int | None = None) -> FineTuning:
        rate = self.rates[contestant, task]
        return self.statement.training(contestant, task, seed, rate, steps=steps)

    def _scores(
        self,
        records: Records,
        contestant: str,
        *,
        shift: int = 0,
        steps: int | None = None,
        of: Callable[[Mapping[str, Any]], float] | None = None,
    ) -> Scores:
        """By task and seed; the seeds of other trainings count as 0, 1, ... too."""
        read = of or _score
        return {
            (task, seed): read(records(self._one(contestant, task, seed + shift, steps)).result)
            for task, seed in self._cells()
        }

    def _evidence(self, first: Scores, second: Scores, **more: Any) -> Evidence:
        found = self._paired(first, second).evidence
        details = dict(found.details) | dict(more.pop("details", {}))
        return Evidence(found.value, found.interval, details=details, **more)

    def _paired(self, first: Scores, second: Scores) -> Difference:
        corpora = {task: corpus_of(task) for task in self.statement.tasks}
        names = ("first", "second")
        return paired(names, first, second, margin=1.0, quantity="score", corpora=corpora)

    def _alike(self, records: Records) -> tuple[dict[str, Any], dict[str, bool]]:
        """Parameters and seconds of both, and whether what is to be equal is."""
        s = self.statement
        sums = {}
        for name, key in (("parameters", "num_trainable"), ("time", "seconds_per_step")):
            both = [
                sum(float(records(self._one(c, t, 0)).result.get(key) or 0.0) for t in s.tasks)
                for c in (s.first, s.second)
            ]
            sums[name] = both
        told = {f"{name} of first over second": a / b for name, (a, b) in sums.items() if b}
        if s.equal == "steps":
            return told, {}
        ratio = told.get(f"{s.equal} of first over second", float("inf"))
        words = f"equal {s.equal}, up to a factor of {ALIKE:g}"
        return told, {words: 1 / ALIKE <= ratio <= ALIKE}


def _score(result: Mapping[str, Any]) -> float:
    """The metric of which more is better; that of guessing after a divergence."""
    metric = next((m for m in METRICS if m in result), None)
    if metric is None:
        raise InputError(f"the task has none of {', '.join(METRICS)}, in which scores are compared")
    value = result[metric]
    return _guessing(result) if value is None else float(value)


def _guessing(result: Mapping[str, Any]) -> float:
    return float(cast(Any, result.get("majority_share")) or 0.0)
