"""``deltacontrol judge``: a paper's statement, decided by real fine-tuning."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from deltacontrol.experiments import tasks
from deltacontrol.experiments.claims import board, scoreboard
from deltacontrol.experiments.claims.court import Statement
from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.runs.interrupts import LIMIT_MINUTES, require_minutes
from deltacontrol.experiments.runs.store import both_homes, configuration
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.judging import judge


@dataclass(frozen=True)
class Judge:
    """Judge a statement of the form "A beats B by so much on these tasks", read from a file.

    The file says who is compared, on what, by how much, and what is to be equal:

        id = 951
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

    and, if it wants others than by default, model, steps, batch_size, max_length and eval_limit.
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
        workers: Processes at a time; by default one a core.
        limit_minutes: How long one run may take.
    """

    file: tyro.conf.Positional[Path]
    plan: bool = False
    runs: Path = Path("runs")
    workers: int | None = None
    limit_minutes: float = LIMIT_MINUTES

    def run(self) -> int:
        """Tune, train, judge, print; exit code 1 where it does not hold.

        Raises:
            InputError: the file is no statement, or a training fails.
        """
        from deltacontrol.experiments.runs.running import run
        from deltacontrol.experiments.runs.sweep import run_all

        require_minutes(self.limit_minutes)
        statement = Statement.read(self.file)
        if statement.id in scoreboard.available():
            raise InputError(f"id {statement.id} is that of another claim; choose another number")
        if statement.name in {claim.name for claim in scoreboard.available().values()}:
            raise InputError(f"name {statement.name} is that of another claim; choose another one")
        for task in statement.tasks:
            tasks.load(task)  # a missing one is told before the first training
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
        text = self.file.read_bytes()
        outcome = replace(
            judge(claim, lambda experiment: records[configuration(experiment)]),
            code=hashlib.sha256(text).hexdigest(),
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
        return 0 if outcome.holds else 1


COMMAND = Judge
