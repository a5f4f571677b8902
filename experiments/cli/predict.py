"""``deltacontrol predict``: which delta, which rate and which rank, before any training."""

from __future__ import annotations

import json
import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltacontrol.experiments import tasks
from deltacontrol.experiments.runs.executors.registry import DEFAULT, require_workers, using
from deltacontrol.experiments.runs.interrupts import LIMIT_MINUTES, require_minutes
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    import pandas as pd

    from deltacontrol.experiments.predicting.outlook import Outlook, Prospect
    from deltacontrol.experiments.training.finetune import FineTuning

METHODS = (
    *("lora", "houlsby", "pfeiffer", "bitfit", "layer-norm"),
    *("ia3", "vera", "prefix", "prompt", "head"),
)
PREDICTORS = (
    *("linearised", "curvature", "kernel-condition", "effective-dimension", "control-energy"),
    *("gradient-spectrum", "parameters"),
)
HONEST = "not calibrated against a study yet: take the order as a hypothesis, --verify tests it"


@dataclass(frozen=True)
class Predict:
    """Foretell which delta does best on a task, at which learning rate, from its start alone.

    Each method is linearised at its start on a few hundred rows: one forward and a few backward
    passes for each of them. That tells the validation loss of the linearised training and the order
    by it, AdamW's learning rate from slope and curvature, the rank that holds most of the gradient,
    and the layers in which it lies; in brackets stands what rows that are drawn again would tell.
    Time and memory are those of three real steps. The head is fitted first, to other rows.

    Nothing of this is calibrated against a study yet. With --verify the first few methods and the
    last one are trained at the predicted rates, and what came stands beside what was foretold.

    For example

        deltacontrol predict --model minilm-l6 --task movie
        deltacontrol predict --task trec6 --budget 100000 --deltas lora:rank=4 bitfit "lora ia3"
        deltacontrol predict --task reviews.csv --minutes 1 --rows 128 --json outlook.json
        deltacontrol predict --task movie --verify --top 2

    Attributes:
        model: A packaged model's name, a local folder, or an id on the hub.
        task: A packaged classification task's name, or a file.
        deltas: The methods: each a delta, or several in quotes.
        budget: Leave out methods with more parameters, the head's not counted.
        minutes: After so many no further method is measured, and those left out are named. What
            was begun ends, and ordering what was measured takes its time as well.
        rows: Training rows on which methods are linearised, and as many validation rows, at most;
            fewer of a task with many classes.
        predictors: What is computed of each method, such as probe:steps=30 or critical-sharpness;
            it all goes into --json and --csv.
        by: The predictor that orders the methods.
        steps: Updates of the training that is foretold.
        batch_size: Examples of an update.
        seed: Seed of the head, the controls and the draws of rows.
        max_length: Longest text in tokens.
        pretrained: False starts from a random model of the same architecture.
        text_column: Column of the texts in a task file.
        label_column: Column of the labels in a task file.
        verify: Train the first methods and the last one, and compare.
        top: With --verify, how many of the first ones.
        eval_limit: With --verify, validation rows at most.
        runs: With --verify, your folder of runs.
        workers: With --verify, runs at a time; by default one a core, or what the cluster has room
            for.
        executor: With --verify, who makes the runs: in-process, processes, ray or slurm.
        limit_minutes: With --verify, how long one run may take.
        csv: Write one row a method to this file.
        json: Write all of it to this file.
    """

    model: str = "minilm-l6"
    task: str = "movie"
    deltas: tuple[str, ...] = METHODS
    budget: int | None = None
    minutes: float | None = None
    rows: int = 256
    predictors: tuple[str, ...] = PREDICTORS
    by: str = "linearised"
    steps: int = 300
    batch_size: int = 16
    seed: int = 0
    max_length: int = 64
    pretrained: bool = True
    text_column: str = "text"
    label_column: str = "label"
    verify: bool = False
    top: int = 3
    eval_limit: int | None = 1000
    runs: Path = Path("runs")
    workers: int | None = None
    executor: str = DEFAULT
    limit_minutes: float = LIMIT_MINUTES
    csv: Path | None = None
    json: Path | None = None

    def run(self) -> int:
        """Measure, order, print; with --verify train.

        Raises:
            InputError: an option cannot be, the task is no classification, no method can be
                measured, or a training fails.
        """
        self._check()
        from tqdm.auto import tqdm

        from deltacontrol.experiments.predicting.outlook import Foresight
        from deltacontrol.experiments.predicting.registry import predictor_of
        from deltacontrol.experiments.predicting.situation import Situation

        began = time.monotonic()
        ends = math.inf if self.minutes is None else began + 60 * self.minutes
        predictors = {p.name: p for p in map(predictor_of, self.predictors)}
        if self.by not in predictors:
            raise unknown("predictor to order by", self.by, predictors)
        template = self._training()
        if told := tasks.reading_of(template):
            print(told)
        foresight = Foresight(
            Situation(template, self.rows), predictors, self.by, self.budget, ends
        )
        with tqdm(self.deltas, unit="method", disable=None) as bar:
            for text in bar:
                bar.set_description(text)
                foresight.measure(text)
        outlook = foresight.outlook()
        for line in lines(outlook):
            print(line)
        print(f"foretold in {time.monotonic() - began:.0f} s; {HONEST}")
        verified = self._verified(outlook) if self.verify else []
        self._write(outlook, verified)
        return 0

    def _check(self) -> None:
        if not self.deltas or len(set(self.deltas)) < len(self.deltas):
            raise InputError(
                f"the deltas are {', '.join(self.deltas) or 'none'}; expected different ones, such "
                "as --deltas lora bitfit"
            )
        for name in ("budget", "top", "eval_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; expected a whole number >= 1")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise InputError(f"minutes is {self.minutes}; expected a number above 0, such as 2")
        require_minutes(self.limit_minutes)
        require_workers(self.workers)

    def _training(self) -> FineTuning:
        """What is foretold, with whatever delta."""
        from deltacontrol.experiments.training.finetune import FineTuning

        return FineTuning(
            model=self.model,
            task=self.task,
            seed=self.seed,
            max_length=self.max_length,
            pretrained=self.pretrained,
            text_column=self.text_column,
            label_column=self.label_column,
            steps=self.steps,
            batch_size=self.batch_size,
            eval_limit=self.eval_limit,
            evaluate_on="validation",
        )

    def _verified(self, outlook: Outlook) -> list[dict[str, Any]]:
        """Train the first methods and the last one at their predicted rates, and print."""
        from deltacontrol.experiments.predicting.calibration import rank_correlation, regret
        from deltacontrol.experiments.runs.sweep import prepare, run_all

        told = [p for p in outlook.prospects if not math.isnan(p.rate.value)]
        chosen = told[: self.top] + told[self.top :][-1:]
        if not chosen:
            raise InputError("no method has a predicted rate, so none can be trained at it")
        prepare(self.executor)
        trainings = [p.candidate.training(float(f"{p.rate.value:.2g}")) for p in chosen]
        with using(self.executor, self.workers):
            records = run_all(
                trainings, RunStore(self.runs), self.workers, limit_minutes=self.limit_minutes
            )
        found = []
        for prospect, training, record in zip(chosen, trainings, records, strict=True):
            loss, accuracy = (record.result.get(name) for name in ("loss", "accuracy"))
            found.append({
                "method": prospect.candidate.text,
                "predicted": prospect.scores[outlook.by].value,
                "learning_rate": training.learning_rate,
                "loss": math.inf if loss is None else loss,
                "accuracy": accuracy,
                "run": record.id,
            })  # fmt: skip
        predictor = self.by
        print(f"{'trained':24} {predictor:>12} {'loss':>8} {'accuracy':>9} {'rate':>9}")
        for row in found:
            accuracy = "diverged" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
            print(
                f"{row['method']:24} {row['predicted']:12.4f} {row['loss']:8.4f} {accuracy:>9} "
                f"{row['learning_rate']:9.2g}"
            )
        if len(found) > 1:
            pair = [r["predicted"] for r in found], [r["loss"] for r in found]
            print(
                f"rank correlation {rank_correlation(*pair):.2f}, loss given away by the first "
                f"{regret(*pair):.4f}, of {len(found)} trainings"
            )
        return found

    def _write(self, outlook: Outlook, verified: list[dict[str, Any]]) -> None:
        texts = {
            self.csv: lambda: table(outlook).to_csv(index=False),
            self.json: lambda: json.dumps(_json(document(outlook, verified)), indent=1) + "\n",
        }
        for path, text in texts.items():
            if path is None:
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text(), encoding="utf-8")
            except OSError as error:
                raise InputError(f"cannot write {path}: {error.strerror}") from error
            print(f"wrote {path}")


def command(prospect: Prospect) -> str:
    """The fine-tuning of a method at its predicted rate, as it is typed."""
    training = prospect.candidate.training()
    rate = prospect.rate.value
    words = ["deltacontrol", "finetune", "--model", training.model, "--task", training.task]
    words += ["--delta", *prospect.candidate.text.split(), "--steps", str(training.steps)]
    if not math.isnan(rate):
        words += ["--learning-rate", f"{rate:.2g}"]
    for name in ("batch_size", "seed", "max_length", "text_column", "label_column"):
        value = getattr(training, name)
        if value != type(training).__dataclass_fields__[name].default:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if not training.pretrained:
        words += ["--no-pretrained"]
    return shlex.join(words)


def lines(outlook: Outlook) -> list[str]:
    """What the command prints."""
    situation, by = outlook.situation, outlook.by
    training = situation.training
    head = "as it was"
    if situation.head_weight is not None:
        head = f"fitted to others (λ {situation.head_weight:.1g})"
    found = [
        f"{training.model} on {training.task}: {situation.num_rows} training and "
        f"{situation.num_heldout} validation rows, head {head}; {training.steps} steps of "
        f"{training.batch_size}",
        f"{'method':24} {'parameters':>10} {by:>12} {'place':>12} {'rate':>8} {'':19} "
        f"{'s/step':>7} {'MiB':>6}",
    ]
    for p in outlook.prospects:
        s, score = p.standing, p.scores[by]
        place = f"{s.place}" if s.low is None else f"{s.place} [{s.low}, {s.high}]"
        value = "none" if math.isnan(score.value) else f"{score.value:.4f}"
        span = f"[{p.rate.low:.1e}, {p.rate.high:.1e}]"
        found.append(
            f"{p.candidate.text:24} {p.candidate.num_parameters:10,d} {value:>12} {place:>12} "
            f"{p.rate.value:8.1e} {span:19} {p.trial.seconds:7.3f} {p.trial.memory / 2**20:6.0f}"
        )
    for text, why in outlook.left_out.items():
        found.append(f"{text:24} left out: {why}")
    for p in outlook.prospects:
        start = p.candidate.start
        if start.num_kept < start.num_controls:
            found.append(
                f"{p.candidate.text:24} from {start.num_kept:,} of {start.num_controls:,} controls "
                "(head included), drawn at random; fewer --rows take more of them"
            )
    found.append("in brackets: 5 % to 95 % on rows drawn again, of a rate over both estimates")
    return found + _advice(outlook)


def _advice(outlook: Outlook) -> list[str]:
    best, found = outlook.prospects[0], []
    layers = list(best.layers.items())[:3]
    if layers:
        shares = ", ".join(f"{layer} ({share:.0%})" for layer, share in layers)
        found.append(f"layers with most of the gradient of {best.candidate.text}: {shares}")
    try:
        sites = _sites(outlook)
    except InputError as error:
        found.append(str(error))
    else:
        shares = ", ".join(f"{site} ({share:.0%})" for site, share in list(sites.items())[:3])
        found.append(f"sites with most of the gradient of the weights: {shares}")
    if outlook.useful is not None:
        found.append(f"rank that holds 90 % of that gradient at its sites: {outlook.useful}")
    return [*found, "to be tried first:", f"  {command(best)}"]


def _sites(outlook: Outlook) -> dict[str, float]:
    """Of each kind of site, its share of the squared gradient of the weights, the largest first."""
    sums: dict[str, float] = {}
    for one in outlook.situation.weight_gradients:
        sums[one.site] = sums.get(one.site, 0.0) + one.energy
    total = sum(sums.values()) or 1.0
    return {site: sums[site] / total for site in sorted(sums, key=lambda s: -sums[s])}


def table(outlook: Outlook) -> pd.DataFrame:
    """One row a method."""
    import pandas as pd

    rows = []
    for p in outlook.prospects:
        row: dict[str, Any] = {"method": p.candidate.text, "parameters": p.candidate.num_parameters}
        row |= {"place": p.standing.place, "place_low": p.standing.low}
        row |= {"place_high": p.standing.high, "first": p.standing.first}
        row |= {"rate": p.rate.value, "rate_low": p.rate.low, "rate_high": p.rate.high}
        row |= {"rate_sign": p.rate.sign, "rate_curvature": p.rate.curvature}
        row |= {"seconds_per_step": p.trial.seconds, "memory_bytes": p.trial.memory}
        row |= {name: score.value for name, score in p.scores.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def document(outlook: Outlook, verified: list[dict[str, Any]]) -> dict[str, Any]:
    """All that is foretold, as plain values."""
    from deltacontrol.experiments.predicting.linear_start import CAPACITY

    situation, rows = outlook.situation, table(outlook).to_dict("records")
    for row, p in zip(rows, outlook.prospects, strict=True):
        start = p.candidate.start
        row["layers"] = {str(layer): share for layer, share in p.layers.items()}
        row["entries_looked_at"], row["entries"] = start.num_kept, start.num_controls
        row["scores"] = {
            name: {"value": s.value, "cost": s.cost, "draws": list(s.draws),
                   "details": dict(s.details), "note": s.note}
            for name, s in p.scores.items()
        }  # fmt: skip
        row["command"] = command(p)
    return {
        "training": situation.training.to_config(),
        "rows": situation.num_rows,
        "heldout": situation.num_heldout,
        "head_weight": situation.head_weight,
        "by": outlook.by,
        "capacity": CAPACITY,
        "calibrated": False,
        "useful_rank": outlook.useful,
        "methods": rows,
        "left_out": dict(outlook.left_out),
        "verified": verified,
    }


def _json(value: Any) -> Any:
    """With None for what is no finite number."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


COMMAND = Predict
