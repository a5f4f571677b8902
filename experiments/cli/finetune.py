"""``deltacontrol finetune``: train deltas on a model for a task."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from deltacontrol.experiments import tasks, tracking
from deltacontrol.experiments.runs.interrupts import LIMIT_MINUTES, require_minutes
from deltacontrol.experiments.runs.store import Record, RunStore
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.experiments.training.rates import default_rate

_SHOWN = {
    "accuracy": ".4f",
    "macro_f1": ".4f",
    "pearson": ".4f",
    "mse": ".4f",
    "loss": ".4f",
    "perplexity": ".2f",
    "majority_share": ".4f",
    "num_evaluated": "d",
    "num_trainable": ",d",
    "num_total": ",d",
    "num_head": ",d",
    "trainable_share": ".4%",
    "trainable_share_with_head": ".4%",
    "final_train_loss": ".4f",
    "residual": ".3e",
    "seconds_per_step": ".3f",
}
# What a number leaves out, or takes in, said beside it.
_MEANING = {
    "num_trainable": "the head's among them",
    "num_head": "parameters of the head that are trained",
    "trainable_share": "of num_total, without the head",
    "trainable_share_with_head": "num_trainable over num_total",
}


@dataclass(frozen=True)
class Finetune(FineTuning):
    """Train deltas on a frozen model for a task, and evaluate on rows that training never saw.

    A run is recorded under the hash of its configuration; the same command again prints the record,
    and a killed run goes on from its checkpoint.

    For example

        deltacontrol finetune --model minilm-l6 --task movie --delta lora
        deltacontrol finetune --delta lora:rank=16,sites=attention.query+mlp.up bitfit --seed 1
        deltacontrol finetune --optimiser newton-cg --train-limit 16 --steps 20
        deltacontrol finetune --task reviews.csv --text-column review --label-column stars

    A language model can name the classes by words, without a head: --model smollm2-135m --template
    "{text} It was" --verbaliser negative=terrible positive=great, with --shots 16 from few rows.
    """

    runs: Path = Path("runs")
    """Folder in which the run is recorded."""
    track: tuple[str, ...] = ()
    """Trackers that follow the run: tensorboard, wandb, trackio, mlflow and others of accelerate,
    or of a file of yours. They are no part of it; local ones write into runs/tracking."""
    limit_minutes: float = LIMIT_MINUTES
    """How long the run may take, the time that it waits for another process not counted. At the
    limit it is saved, and the same command with a larger one goes on."""

    def __post_init__(self) -> None:
        """Check nothing yet: `run` makes the experiment, whose errors are messages of their own."""

    def run(self) -> int:
        """Train, record, print; exit code 1 after a divergence."""
        from deltacontrol.experiments.runs.running import run

        require_minutes(self.limit_minutes)
        experiment = FineTuning(**{f.name: getattr(self, f.name) for f in fields(FineTuning)})
        if self.learning_rate is None and experiment.learning_rate is not None:
            print(default_rate(experiment.model, experiment.task, experiment.deltas))
        store = RunStore(self.runs)
        known = store.find(experiment) is not None
        if not known and (told := tasks.reading_of(experiment)):
            print(told)
        with tracking.using(self.track):
            record = run(experiment, store, limit_minutes=self.limit_minutes)
        if record is None:  # another process of the launch writes and prints
            return 0
        print_record(record, store.path(experiment), "found" if known else "recorded")
        return 1 if record.status == "diverged" else 0


def print_record(record: Record, folder: Path, verb: str) -> None:
    """The result of a run, a line a number."""
    config = record.config
    names = " + ".join(delta["name"] for delta in config["deltas"])
    rate, optimiser = config["learning_rate"], config.get("optimiser")
    how = [f"learning rate {rate:g}"] if rate is not None else []
    how += [optimiser] if optimiser is not None else []
    print(
        f"{names} on {config['task']}, {config['model']}, seed {config['seed']}, "
        f"{', '.join(how)}: {record.status}"
    )
    if record.message:
        print(record.message)
    for name, form in _SHOWN.items():
        value = record.result.get(name)
        if value is not None:
            meaning = f" ({_MEANING[name]})" if name in _MEANING else ""
            print(f"  {name:25} {value:{form}}{meaning}")
    memory = record.result.get("peak_memory_bytes")
    if memory:
        print(f"  {'peak_memory':25} {memory / 2**20:.0f} MiB ({record.result['memory_method']})")
    print(f"{verb} {folder}")


COMMAND = Finetune
