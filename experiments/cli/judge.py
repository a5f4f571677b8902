"""``deltacontrol judge``: a paper's statement, decided by real fine-tuning."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from deltacontrol.experiments import tasks
from deltacontrol.experiments.claims import board, scoreboard
from deltacontrol.experiments.claims.code_digest import code_digest
from deltacontrol.experiments.claims.court import METRICS, STATEMENTS, Statement
from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.runs.executors.registry import DEFAULT, using
from deltacontrol.experiments.runs.interrupts import LIMIT_MINUTES, require_minutes
from deltacontrol.experiments.runs.publishing import publish as publish_records
from deltacontrol.experiments.runs.store import RunStore, both_homes, configuration
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.judging import judge


@dataclass(frozen=True)
class Judge:
    """Judge a statement of the form "A beats B by so much on these tasks", read from a file.

    The file says who is compared, on what, by how much, and what is to be equal:

        id = 991
        name = "lora-beats-bitfit"      # letters, digits, - and _
        title = "LoRA beats BitFit by a point"
        statement = "At equal steps and tuned rates LoRA is at least a point more accurate"
        source = "Authors, venue, year, table"
        first = "lora:rank=8"
        second = "bitfit"
        relation = "higher"             # or "equivalent"
        by = 0.01                       # what it is to exceed, or the margin; above 0
        tasks = ["movie", "trec6", "rt"]
        seeds = 5
        equal = "steps"                 # or "parameters", or "time"

    and, if it wants others than by default, model, steps, batch_size, max_length, eval_limit,
    rates (to search among) and search_seeds.
    Rates are tuned on validation rows for each contestant and task, trainings are paired by task
    and seed, an interval over tasks decides, with a control that must fail and a case in which it
    must pass. Keep the file under version control before you run it: the result names the commit.

    For example

        deltacontrol judge my_paper.toml
        deltacontrol judge --plan my_paper.toml

    Attributes:
        file: The statement.
        plan: Only say what would be trained.
        runs: Your folder of runs; the result is kept in its folder claims.
        workers: Runs at a time; by default one a core, or what the cluster has room for.
        executor: Who makes the runs: in-process, processes, ray or slurm, with options behind the
            name, such as ray:gpus=1.
        limit_minutes: How long one run may take.
        publish: For a statement of this project, from a clean checkout only: put the result and the
            records behind it among the committed ones, and its row on the scoreboard.
    """

    file: tyro.conf.Positional[Path]
    plan: bool = False
    runs: Path = Path("runs")
    workers: int | None = None
    executor: str = DEFAULT
    limit_minutes: float = LIMIT_MINUTES
    publish: bool = False

    def run(self) -> int:
        """Tune, train, judge, print; exit code 1 where it does not hold.

        Raises:
            InputError: the file is no statement, or a training fails.
        """
        from deltacontrol.experiments.runs.sweep import require_workers

        require_minutes(self.limit_minutes)
        require_workers(self.workers)
        statement = Statement.read(self.file)
        for other in scoreboard.available().values():
            if scoreboard.source(other) == self.file.resolve():
                continue  # the statement itself, which was judged before
            if statement.id == other.id:
                raise InputError(f"id {other.id} is that of another claim; choose another number")
            if statement.name == other.name:
                raise InputError(f"name {other.name} is that of another claim; choose another one")
        if self.publish:
            if self.file.resolve().parent != STATEMENTS:
                raise InputError(
                    f"{self.file} is a statement of your own, and only those of this project are "
                    "published with it; leave out --publish: its result is kept beside your runs"
                )
            provenance.require_clean()
        for task in statement.tasks:
            _require_scores(task)  # what cannot be compared is told before the first training
        store, searches = both_homes(self.runs), statement.searches()
        there = sum(record is not None for record in store.lookup(searches))
        cells = len(statement.tasks) * statement.seeds
        count = cells * (3 if statement.relation == "higher" else 4)
        print(
            f"{statement.title}: {len(searches)} searches of a rate ({there} recorded), then "
            f"{count} trainings of {statement.steps} steps"
        )
        if self.plan:
            return 0
        with using(self.executor, self.workers):
            return self._judge(statement, store)

    def _judge(self, statement: Statement, store: RunStore) -> int:
        from deltacontrol.experiments.runs.running import run
        from deltacontrol.experiments.runs.sweep import run_all

        searches = statement.searches()
        began, worked = time.perf_counter(), time.process_time()
        rates, at_end = {}, []
        both = (statement.first, statement.second)
        names = [contestant for contestant in both for _ in statement.tasks]
        for contestant, search in zip(names, searches, strict=True):
            record = run(search, store, limit_minutes=self.limit_minutes)
            assert record is not None  # a search refuses to run in several processes of one launch
            rates[contestant, search.task] = float(record.result["rate"])
            if record.result["at_end"]:
                at_end.append(f"{contestant} on {search.task}: {record.result['rate']:g}")
        claim = statement.claim(rates, at_end)
        trainings = claim.runs() if claim.runs is not None else []
        found = run_all(trainings, store, self.workers, limit_minutes=self.limit_minutes)
        records = {configuration(t): r for t, r in zip(trainings, found, strict=True)}
        outcome = replace(
            judge(claim, lambda experiment: records[configuration(experiment)]),
            code=code_digest(self.file),
            runs=tuple(dict.fromkeys(record.id for record in found)),
        )
        judged = scoreboard.Judged(
            outcome,
            {
                "wall_seconds": time.perf_counter() - began,
                "processor_seconds": time.process_time() - worked,
                "packages": provenance.package_versions(),
                "project": provenance.project_commit(),
                "protocol": provenance.last_change(self.file),
                "hardware": provenance.hardware(),
            },
        )
        folder = self.runs / scoreboard.CLAIMS
        path = scoreboard.keep(claim, judged, folder)
        print(board.page_of(claim, folder))
        if judged.provenance["protocol"] is None:
            print("the file is under no version control: nothing shows that it was written first")
        print(f"kept {path}")
        if self.publish:
            scoreboard.publish(claim, judged, store)
            publish_records([r for r in store.lookup(searches) if r], scoreboard.RUNS)
            scoreboard.forget_statements()
            if board.update_readme():
                print("the scoreboard in README.md is up to date")
        return 0 if outcome.holds else 1


def _require_scores(task: str) -> None:
    """Refuse a task that is not there, or whose results hold no score that more of is better."""
    from deltacontrol.experiments.training import settings

    kind = tasks.load(task).kind
    if not set(METRICS) & set(settings.METRICS[kind]):
        raise InputError(
            f"{task} is a {kind} task, and the scores that are compared are "
            f"{' and '.join(METRICS)}; give tasks of classes or of numbers"
        )


COMMAND = Judge
