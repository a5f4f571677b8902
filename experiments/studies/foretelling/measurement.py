"""What every predictor says of methods on one task, before any of them is trained.

What came of it is in the records of the study of many tasks, whose trainings are the ones that are
foretold here. `deltacontrol.experiments.predicting.calibration` holds the two against each other.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.experiments.training.settings import check_count
from deltacontrol.theory.errors import InputError

PREDICTORS = (
    *("linearised", "curvature", "kernel-condition", "effective-dimension", "control-energy"),
    *("gradient-spectrum", "critical-sharpness:passes=5", "parameters", "fixed-order"),
    *("probe:steps=30", "halving:cost=768"),
)
FORWARD_AND_BACKWARD = 3.0  # forward passes that a row of a training costs


@dataclass(frozen=True)
class Foretelling(Experiment):
    """Scores and rates of methods on a task.

    Attributes:
        task: a classification task.
        methods: what is foretold of.
        rates: of their short trainings, which some predictors make; by default the recorded or
            default ones.
        predictors: what foretells, such as ``"probe:steps=30"``.
        model: the model.
        rows: training rows that are linearised on, and as many validation rows, at most.
        steps: of the training that is foretold.
        batch_size: rows of an update of it.
        max_length: tokens of a text at most.
        seed: of the head, the controls and the draws of rows.
    """

    task: str = "movie"
    methods: tuple[str, ...] = ("lora", "bitfit")
    rates: tuple[float, ...] = ()
    predictors: tuple[str, ...] = PREDICTORS
    model: str = "minilm-l3"
    rows: int = 128
    steps: int = 80
    batch_size: int = 8
    max_length: int = 24
    seed: int = 0

    kind: ClassVar[str] = "foretelling"

    def __post_init__(self) -> None:
        """Check the fields, and make tuples of a record's lists."""
        for name in ("methods", "predictors", "rates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.rates and len(self.rates) != len(self.methods):
            raise InputError(
                f"{len(self.rates)} rates of {len(self.methods)} methods; give one each, or none"
            )
        for name in ("methods", "predictors"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty; give some, such as {PREDICTORS[0]!r}")
        for name in ("rows", "steps", "batch_size", "max_length"):
            check_count(self, name, least=1)
        check_count(self, "seed", least=0)

    @property
    def label(self) -> str:
        """Model and task."""
        return f"foretelling {self.model} {self.task}"

    def execute(self, workspace: Workspace) -> Outcome:
        """Compute every predictor's scores.

        The result holds, by predictor and method, scores (None where the predictor says nothing)
        and costs (forward passes of a row); cost_of_training, that of one training in the same
        unit; by method, rates (value, low, high); features of the task; seconds, by predictor. What
        several predictors take from one linearisation is in the seconds of the first of them.

        Raises:
            InputError: as the predictors and `deltacontrol.experiments.predicting.situation`.
        """
        import pandas as pd
        from tqdm.auto import tqdm

        from deltacontrol.experiments.predicting.candidate import Candidate
        from deltacontrol.experiments.predicting.known_tasks import features
        from deltacontrol.experiments.predicting.rates import rate_estimate
        from deltacontrol.experiments.predicting.registry import predictor_of
        from deltacontrol.experiments.predicting.situation import Situation

        situation = Situation(self.training(), self.rows)
        given = self.rates or (None,) * len(self.methods)
        candidates = [Candidate(situation, *pair) for pair in zip(self.methods, given, strict=True)]
        _ = situation.base
        rows, seconds = [], {}
        for text in tqdm(self.predictors, disable=not workspace.progress, unit="predictor"):
            began = time.perf_counter()
            found = predictor_of(text).scores(candidates)
            seconds[text] = time.perf_counter() - began
            for method, score in zip(self.methods, found, strict=True):
                row = {"predictor": text, "method": method, "cost": score.cost}
                rows.append(row | {"score": score.value, "note": score.note})
        rates = {}
        for method, candidate in zip(self.methods, candidates, strict=True):
            estimate = rate_estimate(candidate.start)
            values = (estimate.value, estimate.low, estimate.high)
            rates[method] = [value if math.isfinite(value) else None for value in values]
        result: dict[str, Any] = {
            "scores": _nested(rows, "score"),
            "costs": _nested(rows, "cost"),
            "cost_of_training": FORWARD_AND_BACKWARD * self.steps * self.batch_size,
            "rates": rates,
            "features": list(features(situation)),
            "num_rows": situation.num_rows,
            "num_heldout": situation.num_heldout,
            "seconds": seconds,
        }
        return Outcome("completed", result, pd.DataFrame(rows))

    def training(self) -> FineTuning:
        """What is foretold, with whatever delta."""
        return FineTuning(
            model=self.model,
            task=self.task,
            seed=self.seed,
            steps=self.steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            precision="fp32",
            evaluate_on="validation",
        )


def _nested(rows: list[dict[str, Any]], what: str) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {}
    for row in rows:
        value = row[what] if math.isfinite(row[what]) else None
        found.setdefault(row["predictor"], {})[row["method"]] = value
    return found
