"""How many dimensions a task needs: dimension and interval from real runs, as one record.

A run at dimension d trains θ = θ₀ + P z, z ∈ R^d; `deltacontrol.experiments.studies.d90.search`
places the runs and tunes their rates, `deltacontrol.theory.dimension.estimate` makes the estimate.
The target is a number, or a share of the mean performance of baseline runs, whose rate is tuned
in the same way.

Every training is a run of its own in the same store, and the search follows from these runs alone:
one that was interrupted goes on, and a second one computes nothing.

Sources: Li et al., ICLR 2018, section 2 (d_int90, absolute and relative baselines); Aghajanyan et
al., ACL 2021, section 3 (d90 of language models, DID and SAID).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.experiments.studies.d90.search import Search, Trial, steadiest, three_digits
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory.dimension.estimate import (
    SHARE,
    Baseline,
    DimensionEstimate,
    DimensionVerdict,
    estimate_dimension,
)
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from deltacontrol.experiments.runs.record import Record
    from deltacontrol.experiments.runs.store import RunStore

METHODS = {"said": "said", "did": "subspace"}


@dataclass(frozen=True)
class Reading:
    """What the record of a training says.

    Attributes:
        performance: on test rows; None after a divergence.
        validation: on validation rows; None after a divergence.
        validation_loss: of the validation rows; None after a divergence.
        chance: the performance of guessing.
    """

    performance: float | None
    validation: float | None
    validation_loss: float | None
    chance: float


@dataclass(frozen=True)
class DimensionSearch(Experiment):
    """A search for the dimension of a target; a subclass says what is trained.

    The curve of the record has one row a training: the attributes of `Trial`, and whether the
    estimate is from it (else it lost against another rate).
    """

    target: float | None = None
    """The performance to reach; by default a share of the baseline's."""
    share: float = SHARE
    """Share of the baseline's mean performance that is to be reached."""
    baseline_seeds: int = 3
    """Runs of the baseline."""
    start: int = 1000
    """The first dimension that is tried."""
    smallest: int = 10
    """The least dimension that is tried."""
    largest: int = 100_000
    """The greatest dimension that is tried."""
    stride: float = 10.0
    """Factor between dimensions until the target is between two of them."""
    resolution: float = 4.0
    """Gaps between dimensions of at most this factor are not divided: seeds are added instead."""
    width: float = 2.0
    """The search ends where the interval's upper end is at most this many times the lower one."""
    seeds: int = 3
    """Runs at one dimension at most."""
    budget: int = 20
    """Trainings at most, besides those of the baseline."""
    confidence: float = 0.9
    """Of the interval."""

    def __post_init__(self) -> None:
        """Check the numbers of the search."""
        if not 1 <= self.smallest < self.largest:
            raise InputError(
                f"smallest is {self.smallest} and largest {self.largest}; expected "
                "1 <= smallest < largest"
            )
        for name in ("stride", "resolution", "width"):
            if not 1 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; expected a factor above 1")
        for name, least in (("seeds", 2), ("budget", 2), ("baseline_seeds", 1), ("start", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if not 0 < self.share < math.inf:
            raise InputError(f"share is {self.share}; expected a number above 0, such as 0.9")
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence is {self.confidence}; expected a number in (0, 1)")
        if self.target is not None and not 0 < self.target < 1:
            raise InputError(
                f"target is {self.target}; expected a share between 0 and 1, such as 0.8, or none"
            )

    @abstractmethod
    def training(self, dimension: int, rate: float, seed: int) -> Experiment:
        """The training at a dimension."""

    @abstractmethod
    def baseline_training(self, rate: float, seed: int) -> Experiment:
        """The training whose performance is to be reached in part."""

    @abstractmethod
    def first_rate(self) -> float:
        """The rate of the baseline that is tried first."""

    @abstractmethod
    def reading(self, record: Record) -> Reading:
        """What a training gave."""

    @abstractmethod
    def extent(self) -> tuple[int, int]:
        """The least and the greatest dimension that there is."""

    def execute(self, workspace: Workspace) -> Outcome:
        """Search.

        The result holds `DimensionEstimate.to_dict`; baseline and baseline_rate, the performances
        and the rate of the baseline's runs (None with a target of one's own); chance; num_runs
        without the baseline's, and stopped, why there are no more.

        Raises:
            InputError: from a training.
        """
        from tqdm.auto import tqdm

        from deltacontrol.experiments.runs.store import RunStore

        store = RunStore(workspace.store or workspace.folder / "runs", keep_controls=False)
        smallest, largest = self._range()
        with tqdm(desc=self.label, unit="run", disable=not workspace.progress) as bar:
            runs = _Runs(self, store, bar)
            baseline: list[Trial] = []
            goal: float | Baseline = self.target or 0.0
            if self.target is None:
                baseline = steadiest(self.first_rate(), runs.baseline, self.baseline_seeds)
                goal = Baseline(tuple(t.performance for t in baseline), self.share)
            names = {f.name for f in fields(Search)} & {f.name for f in fields(DimensionSearch)}
            options = {name: getattr(self, name) for name in names - {"target"}}
            options |= {"smallest": smallest, "largest": largest}
            search = Search(runs.measure, goal, **options)
            hopeless = isinstance(goal, Baseline) and goal.target <= runs.chance
            estimate = None if hopeless else search.run()
        if estimate is None:
            reason = f"guessing reaches the target already: {runs.chance:.4g}"
            found = _without_runs(search, reason)
        else:
            found = search.estimate(runs.chance).to_dict() | {"stopped": search.stopped}
        used = {t.run for t in [*baseline, *search.chosen()]}
        found |= {
            "baseline": [t.performance for t in baseline] or None,
            "baseline_rate": baseline[0].rate if baseline else None,
            "chance": runs.chance,
            "num_runs": len(search.trials),
        }
        return Outcome(status="completed", result=found, curve=_table(runs.trials, used))

    def _range(self) -> tuple[int, int]:
        """The dimensions to be searched."""
        least, most = self.extent()
        smallest, largest = max(self.smallest, least), min(self.largest, most)
        if smallest >= largest:
            raise InputError(
                f"{self.label}: there are dimensions from {least:,} to {most:,} only, of which "
                f"smallest = {self.smallest:,} and largest = {self.largest:,} leave no range"
            )
        return smallest, largest


class _Runs:
    """The trainings of a search, each recorded, or found among the records."""

    def __init__(self, spec: DimensionSearch, store: RunStore, bar: Any) -> None:
        self.spec, self.store, self.bar = spec, store, bar
        self.trials: list[Trial] = []
        self.chance = -math.inf

    def baseline(self, rate: float, seed: int) -> Trial:
        return self._done(self.spec.baseline_training(rate, seed), None, rate, rate, seed)

    def measure(self, d: int, move: float, seed: int) -> Trial:
        rate = three_digits(move / math.sqrt(d))
        return self._done(self.spec.training(d, rate, seed), d, move, rate, seed)

    def _done(
        self, training: Experiment, d: int | None, move: float, rate: float, seed: int
    ) -> Trial:
        from deltacontrol.experiments.runs.sweep import run

        record = run(training, self.store, progress=False)
        assert record is not None
        read = self.spec.reading(record)
        self.chance = max(self.chance, read.chance)
        trial = Trial(
            dimension=d,
            seed=seed,
            move=move,
            rate=rate,
            performance=read.chance if read.performance is None else read.performance,
            validation=-math.inf if read.validation is None else read.validation,
            validation_loss=math.inf if read.validation_loss is None else read.validation_loss,
            status=record.status,
            run=record.id,
        )
        self.trials.append(trial)
        self.bar.set_postfix_str(f"d={d or 'all'}, rate {rate:.2g}: {trial.performance:.3f}")
        self.bar.update()
        return trial


def _without_runs(search: Search, reason: str) -> dict[str, Any]:
    """The result where nothing was trained for it."""
    return DimensionEstimate(
        DimensionVerdict.INCONCLUSIVE,
        reason,
        search.goal,
        dimension=math.nan,
        low=math.nan,
        high=math.nan,
        confidence=search.confidence,
        dimensions=(),
        fit=(),
        spread=math.nan,
    ).to_dict() | {"stopped": reason}


def _table(trials: Sequence[Trial], used: set[str]) -> pd.DataFrame:
    import pandas as pd

    rows = [vars(trial) | {"used": trial.run in used} for trial in trials]
    return pd.DataFrame(rows).astype({"dimension": "Int64"})


def estimate_from(
    curve: pd.DataFrame,
    target: float | Baseline,
    *,
    chance: float | None = None,
    confidence: float = 0.9,
    seed: int = 0,
) -> DimensionEstimate:
    """The dimension of any target, from the runs of a recorded search.

    Args:
        curve: of the record of a `DimensionSearch`.
        target: as in `deltacontrol.theory.dimension.estimate.estimate_dimension`.
        chance: the performance of guessing; a target that it meets says nothing.
        confidence: of the interval.
        seed: of the bootstrap; draws of two searches with one seed are not independent.

    Raises:
        InputError: the search trained at no dimension.
    """
    rows = curve[curve["used"] & curve["dimension"].notna()]
    return estimate_dimension(
        rows["dimension"].to_numpy(float),
        rows["performance"].to_numpy(float),
        target,
        chance=chance,
        confidence=confidence,
        seed=seed,
    )


@dataclass(frozen=True)
class _Trained:
    """What is trained, and how: the fields that a command asks for before those of the search."""

    model: str = "minilm-l6"
    """A packaged model's name, a local folder, or an id on the hub."""
    task: str = "movie"
    """A packaged task's name, or the path of a CSV, JSON Lines or Parquet file."""
    method: Literal["said", "did"] = "said"
    """said: a subspace with a trained gain for every layer; did: one of all parameters alike."""
    delta: str = ""
    """The delta whose parameters the subspace is of, such as lora:rank=8; all if empty."""
    baseline: Literal["full", "pretrained", "delta"] = "full"
    """What to reach a share of: full fine-tuning of the same start, that of the pre-trained start,
    or the delta itself."""
    projection: str = "fastfood"
    """The kind of P: fastfood, dense, gaussian, sparse-sign, srht or kronecker."""
    pretrained: bool = True
    """Whether to start from pre-trained weights, or from random ones of the same architecture."""
    steps: int = 100
    """Updates of a training."""
    batch_size: int = 16
    """Examples of an update."""
    max_length: int = 64
    """Longest text in tokens; longer ones are cut."""
    eval_limit: int | None = 1000
    """Evaluate on at most so many validation rows, and as many test rows."""
    text_column: str = "text"
    """Column of the texts in a task file."""
    label_column: str = "label"
    """Column of the labels in a task file."""
    task_kind: Literal["classification", "regression"] | None = None
    """What the labels of a task file are; inferred by default."""


@dataclass(frozen=True)
class FineTuningDimension(DimensionSearch, _Trained):
    """The dimension that a model needs for a task."""

    kind: ClassVar[str] = "dimension"

    def __post_init__(self) -> None:
        """Check the fields and write the delta in full."""
        super().__post_init__()
        if self.method not in METHODS:
            raise InputError(f"method is {self.method!r}; expected said or did")
        if self.baseline not in ("full", "pretrained", "delta"):
            raise InputError(f"baseline is {self.baseline!r}; expected full, pretrained or delta")
        if self.baseline == "delta" and not self.delta:
            raise InputError("baseline is delta, but no delta is given; give one, such as lora")
        self.training(self.largest, 1.0, 0)  # which checks what a training takes

    @property
    def label(self) -> str:
        """Model, start, task, method and delta."""
        start = "" if self.pretrained else " from random weights"
        of = f" of {self.delta}" if self.delta else ""
        return f"{self.model}{start} {self.task} {self.method}{of}"

    def training(self, dimension: int, rate: float, seed: int) -> FineTuning:
        """Fine-tuning in a subspace."""
        delta = self._subspace(self.method, dimension)
        return self._tuning(delta, rate, seed, self.pretrained)

    def baseline_training(self, rate: float, seed: int) -> FineTuning:
        """Full fine-tuning, or the delta itself."""
        start = self.pretrained or self.baseline == "pretrained"
        return self._tuning(self.delta if self.baseline == "delta" else "full", rate, seed, start)

    def first_rate(self) -> float:
        """About what MiniLM wants."""
        return 3e-3 if self.baseline == "delta" else 3e-4

    def reading(self, record: Record) -> Reading:
        """Accuracy against the majority class, or Pearson's correlation against zero."""
        result = record.result
        metric, loss = ("accuracy", "loss") if "accuracy" in result else ("pearson", "mse")
        if metric not in result:
            raise InputError(
                f"{self.task} is no classification or regression, and a share of a loss is no "
                "target; choose another task"
            )
        curve = record.curve()
        last = curve.get(f"validation_{loss}")
        return Reading(
            result[metric],
            result.get(f"best_validation_{metric}"),
            None if last is None else float(last.iloc[-1]),
            result["majority_share"] or 0.0,
        )

    def extent(self) -> tuple[int, int]:
        """One beside the gains of the method, and all parameters that the subspace is of."""
        from deltacontrol.deltas.methods.parts.coordinates import Coordinates
        from deltacontrol.deltas.methods.said import ScaledCoordinates

        def laid(method: str, dimension: int, kind: type[Any]) -> Any:
            delta = self._subspace(method, dimension)
            tuned = self._tuning(delta, 1.0, 0, self.pretrained).setting().controlled
            return next(module for module in tuned.modules() if isinstance(module, kind))

        most = laid("did", 1, Coordinates).full_dim
        if self.method == "did":
            return 1, most
        gains = laid("said", min(most, 1000), ScaledCoordinates).gains
        return len(gains) + 1, most

    def _subspace(self, method: str, dimension: int) -> dict[str, Any]:
        return {
            "name": METHODS[method],
            "dimension": dimension,
            "projection": self.projection,
            "of": self.delta.replace(",", ";"),
        }

    def _tuning(self, delta: Any, rate: float, seed: int, pretrained: bool) -> FineTuning:
        return FineTuning(
            model=self.model,
            task=self.task,
            deltas=(delta,),
            learning_rate=rate,
            seed=seed,
            pretrained=pretrained,
            steps=self.steps,
            eval_every=self.steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            eval_limit=self.eval_limit,
            text_column=self.text_column,
            label_column=self.label_column,
            task_kind=self.task_kind,
        )
