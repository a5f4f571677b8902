"""``deltacontrol compare``: are two settings different, equivalent, or is that not told yet?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from deltacontrol.experiments import tasks as known_tasks
from deltacontrol.experiments.measures.paired import Difference, paired, require_margin
from deltacontrol.experiments.runs.executors.registry import DEFAULT, using
from deltacontrol.experiments.runs.interrupts import LIMIT_MINUTES, require_minutes
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from deltacontrol.experiments.runs.record import Record
    from deltacontrol.experiments.training.finetune import FineTuning

METRICS = ("accuracy", "pearson")  # of which more is better, by the kind of task


@dataclass(frozen=True)
class Contestant:
    """Deltas that are trained together, and their learning rate where it is given."""

    text: str
    deltas: tuple[str, ...]
    rate: float | None

    @classmethod
    def parse(cls, text: str) -> Contestant:
        """From ``"lora:rank=8 houlsby@1e-3"``.

        Raises:
            InputError: there is no delta, or the rate is no number.
        """
        body, at, rate = text.rpartition("@") if "@" in text else (text, "", "")
        try:
            value = float(rate) if at else None
        except ValueError:
            raise InputError(
                f"{text!r}: {rate!r} is no learning rate; expected one such as lora@1e-3"
            ) from None
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{text!r}: the learning rate is {rate}; expected a positive number")
        deltas = tuple(body.split())
        if not deltas:
            raise InputError(f"{text!r} names no delta; expected one such as lora:rank=8")
        return cls(text, deltas, value)


@dataclass(frozen=True)
class Compare:
    """Compare deltas, paired over tasks and seeds: difference, interval, equivalence.

    Every contestant is fine-tuned on every task with every seed; trainings that are recorded are
    not repeated, and what is missing runs in as many processes as there are cores. Differences are
    paired by task and seed, with a 95 % interval over tasks, or over corpora where tasks share one,
    or over seeds where there is one. Where it is told neither that one is higher nor that both are
    equivalent within the margin, the command says about how many units in all would do. Every pair
    is told by itself, without a correction for the number of pairs.

    A contestant is one argument: a delta, or several in quotes, with a learning rate behind @ if
    it is to have another one than the recorded or default one.

    With --measure dimension it is the dimension of a random subspace of each delta's parameters
    that reaches 90 % of that delta's own score, as `deltacontrol dimension --baseline delta`
    searches it; ratios are compared over the draws of these searches, and the margin is that of
    log10 d. A search takes two to five seeds.

    For example

        deltacontrol compare lora bitfit --tasks movie trec6 --seeds 5
        deltacontrol compare lora:rank=2 lora:rank=16 --tasks movie --margin 0.01 --csv ranks.csv
        deltacontrol compare "houlsby bitfit" houlsby@3e-3 --model minilm-l3 --tune
        deltacontrol compare layer-norm lora --measure dimension --tasks trec6

    Attributes:
        contestants: Two or more.
        tasks: Names of packaged tasks, or files.
        seeds: Trainings of each contestant on each task, with seeds 0, 1, ...
        model: A packaged model's name, a local folder, or an id on the hub.
        steps: Updates of a training.
        batch_size: Examples of an update.
        max_length: Longest text in tokens.
        eval_limit: Evaluate on at most so many rows; None takes all.
        margin: Within which both count as equal: of the score, or of log10 d.
        measure: The score on test rows, or the dimension.
        tune: Choose the learning rate of each contestant on each task by a search on validation
            rows, as `deltacontrol tune` does.
        budget: With --measure dimension, trainings of a search at most.
        runs: Your folder of runs.
        workers: Runs at a time; by default one a core, or what the cluster has room for.
        executor: Who makes the runs: in-process, processes, ray or slurm, with options behind the
            name, such as ray:gpus=1.
        limit_minutes: How long one run may take.
        csv: Write one row a pair of contestants to this file.
        latex: Write the same as a LaTeX table.
    """

    contestants: tyro.conf.Positional[tuple[str, ...]]
    tasks: tuple[str, ...] = ("movie", "trec6")
    seeds: int = 5
    model: str = "minilm-l6"
    steps: int = 100
    batch_size: int = 16
    max_length: int = 64
    eval_limit: int | None = 1000
    margin: float = 0.02
    measure: Literal["score", "dimension"] = "score"
    tune: bool = False
    budget: int = 20
    runs: Path = Path("runs")
    workers: int | None = None
    executor: str = DEFAULT
    limit_minutes: float = LIMIT_MINUTES
    csv: Path | None = None
    latex: Path | None = None

    def run(self) -> int:
        """Train what is missing, compare, print; exit code 1 where some pair cannot be told.

        Raises:
            InputError: fewer than two different contestants, or a training fails.
        """
        from deltacontrol.experiments.runs.sweep import require_workers

        require_minutes(self.limit_minutes)
        require_workers(self.workers)
        if len(set(self.contestants)) < max(2, len(self.contestants)):
            raise InputError(
                f"{len(self.contestants)} contestants, {len(set(self.contestants))} of them "
                "different; expected at least two different ones, such as lora bitfit"
            )
        if self.seeds < 1 or not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise InputError(
                f"seeds is {self.seeds} and tasks {self.tasks}; expected at least one seed, and "
                "different tasks"
            )
        require_margin(self.margin)
        if self.measure == "score" and self.seeds < 2 and len(set(self._corpora.values())) < 2:
            raise InputError(
                "one seed of one task has no interval, nor one of several tasks of one corpus "
                f"({', '.join(self._corpora)}); take two seeds, or tasks of two corpora"
            )
        if self.measure == "dimension" and not 2 <= self.seeds <= 5:
            raise InputError(
                f"seeds is {self.seeds}; a search for a dimension takes two to five, so give "
                "--seeds 5 or fewer"
            )
        chosen = [Contestant.parse(text) for text in self.contestants]
        for c in chosen if self.measure == "dimension" else ():
            if len(c.deltas) != 1 or c.rate is not None or self.tune:
                raise InputError(
                    f"{c.text!r}: a dimension is searched for one delta, with rates of its own; "
                    "leave out further deltas, @ and --tune"
                )
        with using(self.executor, self.workers):
            if self.measure == "dimension":
                differences = self._dimensions(chosen)
            else:
                differences = self._scores(chosen)
        table = rows(differences)
        for line in lines(differences):
            print(line)
        if len(differences) > 1:
            print(
                f"{len(differences)} pairs, each told at 95 %: of pairs that do not differ, up to "
                f"{0.05 * len(differences):.2g} are expected to be told apart by chance"
            )
        for path, text in ((self.csv, table.to_csv(index=False)),
                           (self.latex, table.to_latex(index=False, float_format="%.3g",
                                                       escape=True))):  # fmt: skip
            if path is not None:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text, encoding="utf-8")
                except OSError as error:
                    raise InputError(f"cannot write {path}: {error.strerror}") from error
                print(f"wrote {path}")
        return int(any(d.verdict == "cannot be told" for d in differences))

    def _scores(self, chosen: Sequence[Contestant]) -> list[Difference]:
        from deltacontrol.experiments.runs.sweep import prepare, run_all

        prepare(self.executor)
        store = RunStore(self.runs)
        rates = {c.text: {t: self._rate(c, t, store) for t in self.tasks} for c in chosen}
        cells = [(c, t, s) for c in chosen for t in self.tasks for s in range(self.seeds)]
        wanted = [self._training(c, t, s, rates[c.text][t]) for c, t, s in cells]
        there = sum(record is not None for record in store.lookup(wanted))
        print(
            f"{len(wanted)} trainings: {len(chosen)} contestants × {len(self.tasks)} tasks × "
            f"{self.seeds} seeds, {there} of them recorded"
        )
        records = run_all(wanted, store, self.workers, limit_minutes=self.limit_minutes)
        found: dict[str, dict[tuple[str, int], float]] = {c.text: {} for c in chosen}
        metrics = set()
        for (c, task, seed), training, record in zip(cells, wanted, records, strict=True):
            metric, value = score(record, training)
            metrics.add(metric)
            found[c.text][task, seed] = value
        for c in chosen:
            told = [self._told(t, found[c.text], rates[c.text][t]) for t in self.tasks]
            print(f"  {c.text}: {', '.join(told)}")
        return self._pairs(chosen, found, " and ".join(sorted(metrics)))

    def _told(self, task: str, found: dict[tuple[str, int], float], rate: float | None) -> str:
        values = [value for (name, _), value in found.items() if name == task]
        known = "" if rate is None else f" (rate {rate:.3g})"
        return f"{task} {sum(values) / len(values):.3f}{known}"

    @property
    def _corpora(self) -> dict[str, str]:
        return {task: known_tasks.corpus_of(task) for task in self.tasks}

    def _pairs(
        self, chosen: Sequence[Contestant], found: dict[str, Any], quantity: str
    ) -> list[Difference]:
        given: dict[str, Any] = {"margin": self.margin, "quantity": quantity}
        given["corpora"] = self._corpora
        pairs = combinations([c.text for c in chosen], 2)
        return [paired((a, b), found[a], found[b], **given) for a, b in pairs]

    def _training(self, c: Contestant, task: str, seed: int, rate: float | None) -> FineTuning:
        from deltacontrol.experiments.training.finetune import FineTuning

        return FineTuning(
            model=self.model,
            task=task,
            deltas=c.deltas,  # type: ignore[arg-type]
            seed=seed,
            learning_rate=rate,
            steps=self.steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            eval_limit=self.eval_limit,
        )

    def _rate(self, c: Contestant, task: str, store: RunStore) -> float | None:
        """The rate that is given, tuned, or recorded."""
        if c.rate is not None or not self.tune:
            return c.rate or self._training(c, task, 0, None).learning_rate
        from deltacontrol.experiments.runs.running import run
        from deltacontrol.experiments.studies.learning_rates.search import RateSearch

        search = RateSearch(
            model=self.model,
            task=task,
            deltas=c.deltas,  # type: ignore[arg-type]
            steps=self.steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            eval_limit=self.eval_limit,
        )
        record = run(search, store, limit_minutes=self.limit_minutes)
        assert record is not None  # a search refuses to run in several processes of one launch
        return float(record.result["rate"])

    def _dimensions(self, chosen: Sequence[Contestant]) -> list[Difference]:
        """One search a contestant and task; log10 d, paired by task, its draws being the search's.

        The unit is the draw of a search: they differ in trainings and seeds that were drawn again.
        """
        import numpy as np

        from deltacontrol.experiments.runs.running import run
        from deltacontrol.experiments.studies.d90.fine_tuning import FineTuningDimension
        from deltacontrol.theory.evidence import Evidence

        store, logs = RunStore(self.runs), {}
        for c in chosen:
            for task in self.tasks:
                search = FineTuningDimension(
                    model=self.model, task=task, method="did", delta=c.deltas[0],
                    baseline="delta", steps=self.steps, batch_size=self.batch_size,
                    max_length=self.max_length, eval_limit=self.eval_limit, budget=self.budget,
                    seeds=self.seeds,
                )  # fmt: skip
                record = run(search, store, limit_minutes=self.limit_minutes)
                assert record is not None
                result = record.result
                print(f"  {c.text} on {task}: {result['text']} ({result['verdict']})")
                if not result["num_runs"]:
                    raise InputError(
                        f"no dimension of {c.text} on {task} was tried, for {result['reason']}; "
                        "give more --steps, another task, or another model"
                    )
                logs[c.text, task] = np.log10(np.maximum(draws(record), 1.0))
        found = []
        for a, b in combinations([c.text for c in chosen], 2):
            with np.errstate(
                invalid="ignore"
            ):  # beyond the searched range on both sides: no number
                both = [logs[a, t] - logs[b, t] for t in self.tasks]
            size = min(map(len, both))
            mean = np.mean([d[:size] for d in both], axis=0)
            open_draws = int(np.isnan(mean).sum())  # each could be anything: at both ends
            ends = np.repeat([-np.inf, np.inf], open_draws)
            evidence = Evidence.of_draws(
                float(np.nanmedian(mean)) if open_draws < size else math.nan,
                np.concatenate([mean[~np.isnan(mean)], ends]),
                "draw",
                size,
                details={"tasks": list(self.tasks)},
            )
            found.append(Difference(a, b, evidence, self.margin, "log10 of the dimension"))
        return found


def score(record: Record, training: FineTuning) -> tuple[str, float]:
    """The metric of a recorded run of which more is better, and its value.

    After a divergence it is that of guessing, or zero.

    Raises:
        InputError: the task has no such metric.
    """
    found = next((m for m in METRICS if m in record.result), None)
    if found is None:
        raise InputError(
            f"{training.task} has none of {', '.join(METRICS)}, in which scores are compared; "
            "choose a classification or a regression"
        )
    value = record.result[found]
    return found, float(value if value is not None else record.result.get("majority_share") or 0.0)


def draws(record: Record) -> Any:
    """Bootstrap draws of a recorded search's dimension; infinite beyond its largest, 0 below."""
    import numpy as np

    from deltacontrol.experiments.studies.d90.dimension import estimate_from
    from deltacontrol.theory.dimension.estimate import Baseline

    result = record.result
    found = estimate_from(
        record.curve(),
        Baseline(tuple(result["baseline"]), record.config["share"]),
        chance=result["chance"],
        seed=int(record.id, 16) % 2**32,  # draws of two searches are independent
    )
    return np.array(found.draws or (found.dimension,))


def rows(differences: Sequence[Difference]) -> pd.DataFrame:
    """One row a pair."""
    import pandas as pd

    table = []
    for d in differences:
        low, high = d.sides
        unit = d.evidence.interval
        table.append(
            {
                "first": d.first,
                "second": d.second,
                "quantity": d.quantity,
                "difference": d.evidence.value,
                "low": low,
                "high": high,
                "unit": unit.unit if unit else "",
                "units": unit.count if unit else 1,
                "margin": d.margin,
                "verdict": d.verdict,
                "needed": d.needed,
            }
        )
    return pd.DataFrame(table)


def lines(differences: Sequence[Difference]) -> list[str]:
    """A paragraph a pair, in plain words."""
    found = []
    for d in differences:
        low, high = d.sides
        sign = "difference of" if not d.quantity.startswith("log10") else "ratio, as"
        found.append(f"{d.first} against {d.second}")
        found.append(f"  {sign} {d.quantity}: {d.evidence.value:+.4f} [{low:+.4f}, {high:+.4f}]")
        if d.quantity.startswith("log10") and math.isfinite(d.evidence.value):
            found.append(f"  that is {10**d.evidence.value:.3g} times the dimension")
        found.append(f"  {d.verdict}" + (f"; {d.needed}" if d.needed else ""))
    return found


COMMAND = Compare
