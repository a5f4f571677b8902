"""``deltacontrol dimension``: how many dimensions a task needs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltacontrol.experiments import tasks
from deltacontrol.experiments.runs.executors.registry import DEFAULT, using
from deltacontrol.experiments.runs.interrupts import LIMIT_MINUTES, require_minutes
from deltacontrol.experiments.runs.store import Record, RunStore
from deltacontrol.experiments.studies.d90.fine_tuning import FineTuningDimension
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from deltacontrol.experiments.studies.threshold.predictions import DimensionPrediction


@dataclass(frozen=True)
class Dimension(FineTuningDimension):
    """Find the smallest subspace in which a model learns a task, with an interval.

    Trains θ = θ₀ + P z with a random P for several dimensions d of z, every d with a learning rate
    of its own (chosen on validation rows) and several seeds, and prints the d at which the test
    performance reaches the target: by default 90 % of full fine-tuning, d90. Where the runs do not
    tell, the verdict says so, and what to change.

    Every training is recorded. The same command again computes nothing; a killed one goes on. The
    exit code is 1 where no dimension could be told.

    For example

        deltacontrol dimension --model minilm-l3 --task trec6
        deltacontrol dimension --task movie --method did --budget 40 --width 1.5
        deltacontrol dimension --task movie --delta lora:rank=8 --baseline delta --largest 50000
        deltacontrol dimension --task reviews.csv --target 0.8 --json reviews.json
    """

    predict: bool = True
    """Whether to predict the dimension beside it, from the untrained model's gradients at a few
    rows; of a subspace without gains, also where said adds them."""
    predict_rows: int = 256
    """Training rows, and as many validation rows, from which it is predicted."""
    runs: Path = Path("runs")
    """Folder in which everything is recorded."""
    executor: str = DEFAULT
    """Who makes the runs: in-process, processes, ray or slurm, with options behind the name, such
    as ray:gpus=1."""
    limit_minutes: float = LIMIT_MINUTES
    """How long the search may take, the time that it waits for another process not counted. At the
    limit it is saved, and the same command with a larger one goes on."""
    plot: Path | None = None
    """Draw performance over d into this file; by default one beside the record."""
    csv: Path | None = None
    """Write one row a training to this file."""
    json: Path | None = None
    """Write estimate, interval and verdict to this file."""

    def __post_init__(self) -> None:
        """Check nothing yet: `run` makes the experiment, whose errors are messages of their own."""

    def run(self) -> int:
        """Search, record, print, draw; exit code 1 where no dimension could be told."""
        from deltacontrol.experiments.runs.running import run
        from deltacontrol.experiments.runs.sweep import prepare

        prepare(self.executor)
        require_minutes(self.limit_minutes)
        names = [f.name for f in fields(FineTuningDimension)]
        experiment = FineTuningDimension(**{name: getattr(self, name) for name in names})
        store = RunStore(self.runs)
        known = store.find(experiment) is not None
        if not known and (told := tasks.reading_of(experiment)):
            print(told)
        with using(self.executor):
            record = run(experiment, store, limit_minutes=self.limit_minutes)
        if record is None:  # another process of the launch writes and prints
            return 0
        print_record(experiment, record)
        prediction = self._prediction(experiment, record) if self.predict else None
        if prediction is not None:
            print(f"  predicted     {prediction.text}")
        plot = self.plot or store.root / f"{record.id}.png"
        self._write(experiment, record, prediction, plot)
        print(f"{'found' if known else 'recorded'} {store.path(experiment)}")
        return 1 if record.result["verdict"] == "inconclusive" else 0

    def _prediction(
        self, experiment: FineTuningDimension, record: Record
    ) -> DimensionPrediction | None:
        """From the start of seed 0; of a subspace without gains, also where said adds them."""
        from deltacontrol.experiments.studies.threshold.predictions import predict_dimension

        try:
            return predict_dimension(
                experiment.model,
                experiment.task,
                [experiment.delta] if experiment.delta else [],
                target=record.result["target"],
                rows=self.predict_rows,
                heldout=self.predict_rows,
                max_length=experiment.max_length,
                pretrained=experiment.pretrained,
                text_column=experiment.text_column,
                label_column=experiment.label_column,
                task_kind=experiment.task_kind,
            )
        except InputError as error:
            print(f"  predicted     nothing: {error}")
            return None

    def _write(
        self,
        experiment: FineTuningDimension,
        record: Record,
        prediction: DimensionPrediction | None,
        plot: Path,
    ) -> None:
        try:
            for path in filter(None, (plot, self.csv, self.json)):
                path.parent.mkdir(parents=True, exist_ok=True)
            if record.result["dimensions"]:
                draw(experiment, record, prediction).savefig(plot, dpi=200)
                print(f"drew {plot}")
            if self.csv is not None:
                record.curve().to_csv(self.csv, index=False)
            if self.json is not None:
                document = {"id": record.id, "config": record.config, "result": record.result}
                if prediction is not None:
                    names = ("dimension", "low", "high", "standard_error", "reason", "text")
                    told = {name: getattr(prediction, name) for name in names}
                    document["prediction"] = {k: None if v != v else v for k, v in told.items()}
                self.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        except InputError:  # it says what is wrong already
            raise
        except (OSError, ValueError) as error:  # a ValueError names an unknown picture format
            raise InputError(f"cannot write what was found: {error}") from error


def print_record(experiment: FineTuningDimension, record: Record) -> None:
    """The estimate and what it rests on."""
    found = record.result
    title = "d" if experiment.target is not None else f"d{100 * experiment.share:g}"
    print(f"{experiment.label}: {title} = {found['text']} ({found['verdict']})")
    print(f"  {found['reason']}")
    low, high = (math.nan if found[end] is None else found[end] for end in ("low", "high"))
    if found["verdict"] == "estimated" and high > experiment.width * low > 0:
        print(
            f"  its ends are a factor of {high / low:.2g} apart, not {experiment.width:g}; a "
            "larger --budget narrows it"
        )
    rows = record.curve()
    for d, runs in rows[rows["used"]].groupby("dimension", sort=True):
        values = runs["performance"]
        spread = f" ± {values.std():.3f}" if len(values) > 1 else ""
        seeds = "1 seed" if len(values) == 1 else f"{len(values)} seeds"
        print(
            f"  d = {d:<9,} {values.mean():.3f}{spread} ({seeds}, "
            f"learning rate {runs['rate'].iloc[0]:.3g})"
        )
    if found["baseline"]:
        mean = sum(found["baseline"]) / len(found["baseline"])
        print(
            f"  baseline      {mean:.3f} ({experiment.baseline}, {len(found['baseline'])} seeds, "
            f"learning rate {found['baseline_rate']:.3g})"
        )
    print(f"  target        {found['target']:.3f}, guessing {found['chance']:.3f}")
    print(
        f"  trainings     {found['num_runs']} and {len(rows) - found['num_runs']} of the baseline; "
        f"{found['stopped']}"
    )


def draw(
    experiment: FineTuningDimension, record: Record, prediction: DimensionPrediction | None = None
) -> Figure:
    """Performance over d: runs, fit, target, interval, prediction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found: dict[str, Any] = record.result
    rows = record.curve()
    rows = rows[rows["used"] & rows["dimension"].notna()]
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.plot(rows["dimension"].astype(float), rows["performance"], "o", ms=4, alpha=0.6, label="run")
    ax.plot(found["dimensions"], found["fit"], color="C0", label="non-decreasing fit")
    ax.axhline(found["target"], color="black", ls="--", lw=1, label="target")
    ax.axhline(found["chance"], color="grey", ls=":", lw=1, label="guessing")
    low, high = found["low"] or found["dimensions"][0], found["high"] or found["dimensions"][-1]
    if high > low:
        share = f"{100 * found['confidence']:g} % interval"
        ax.axvspan(low, high, color="C1", alpha=0.25, lw=0, label=share)
    if prediction is not None and prediction.dimension > 0:
        ax.axvline(prediction.dimension, color="C2", lw=1, ls="-.", label="predicted")
    ax.set_xscale("log")
    ax.set_xlabel("dimension d of the subspace")
    ax.set_ylabel("test performance")
    ax.set_title(f"{experiment.label}: {found['text']}", fontsize=9)
    ax.legend(fontsize=7)
    return figure


COMMAND = Dimension
