"""``deltacontrol tune``: which learning rate."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from deltacontrol.experiments import tasks, tracking
from deltacontrol.experiments.runs.executors.registry import DEFAULT, using
from deltacontrol.experiments.runs.interrupts import LIMIT_MINUTES, require_minutes
from deltacontrol.experiments.runs.store import Record, RunStore
from deltacontrol.experiments.studies.learning_rates.search import RateSearch


@dataclass(frozen=True)
class Tune(RateSearch):
    """Find a learning rate on validation rows, giving hopeless ones up early.

    Every rate is trained with several seeds up to a first look; the best few go on to the end. Each
    training that goes on is recorded, and so is the search, with what was given up. The same
    command again computes nothing; a killed one goes on.

    For example

        deltacontrol tune --model minilm-l6 --task trec6 --delta lora
        deltacontrol tune --task movie --delta houlsby --rates 3e-4 1e-3 3e-3 1e-2 --look 1
        deltacontrol tune --task reviews.csv --delta bitfit --steps 300 --seeds 5
    """

    runs: Path = Path("runs")
    """Folder in which everything is recorded."""
    executor: str = DEFAULT
    """Who makes the runs: in-process, processes, ray or slurm, with options behind the name, such
    as ray:gpus=1."""
    track: tuple[str, ...] = ()
    """Trackers that follow every training, as in `deltacontrol finetune`."""
    limit_minutes: float = LIMIT_MINUTES
    """How long the search may take, the time that it waits for another process not counted. At the
    limit it is saved, and the same command with a larger one goes on."""

    def __post_init__(self) -> None:
        """Check nothing yet: `run` makes the experiment, whose errors are messages of their own."""

    def run(self) -> int:
        """Search, record, print."""
        from deltacontrol.experiments.runs.running import run
        from deltacontrol.experiments.runs.sweep import prepare

        prepare(self.executor)
        require_minutes(self.limit_minutes)
        experiment = RateSearch(**{f.name: getattr(self, f.name) for f in fields(RateSearch)})
        store = RunStore(self.runs)
        known = store.find(experiment) is not None
        if not known and (told := tasks.reading_of(experiment)):
            print(told)
        if not known:
            count = len(experiment.rates) * experiment.seeds
            rates = ", ".join(f"{rate:g}" for rate in experiment.rates)
            print(f"{count} trainings, at the rates {rates}")
        with using(self.executor), tracking.using(self.track):
            record = run(experiment, store, limit_minutes=self.limit_minutes)
        if record is None:  # another process of the launch writes and prints
            return 0
        print_record(experiment, record)
        print(f"{'found' if known else 'recorded'} {store.path(experiment)}")
        return 0


def print_record(experiment: RateSearch, record: Record) -> None:
    """A line a rate, the chosen one, and the command that uses it."""
    result, table = record.result, record.curve()
    name = result["metric"]
    print(f"{'rate':>10}  {'at the look':>11}  {name + ' at the end':>20}")
    for rate, rows in table.groupby("rate"):
        look, end = (
            rows[column].dropna() if column in rows else rows["rate"].iloc[:0]
            for column in (f"{name}_at_look", name)
        )
        spread = f" (sd {end.std():.4f})" if len(end) > 1 else ""
        shown = f"{end.mean():.4f}{spread}" if len(end) else "given up"
        if rate in result["kept"] and not len(end):
            shown = "diverged"
        early = f"{look.mean():.4f}" if len(look) else ""
        print(f"{rate:10g}  {early:>11}  {shown:>20}{'  *' if rate == result['rate'] else ''}")
    share = result["steps_done"] / result["steps_of_all"]
    print(f"learning rate {result['rate']:g}; {share:.0%} of the steps of all rates were trained")
    if result["at_end"]:
        print("it is at an end of the rates: a better one may lie outside; give more --rates")
    words = ["deltacontrol", "finetune", "--model", experiment.model, "--task", experiment.task]
    words += ["--learning-rate", f"{result['rate']:g}", "--steps", str(experiment.steps)]
    print(f"  {shlex.join(words)} --delta ...")


COMMAND = Tune
