"""How many dimensions a task needs: dimension and interval from real runs, as one record.

A run at dimension d trains θ = θ₀ + P z, z ∈ R^d; `deltacontrol.experiments.studies.d90.search`
places the runs and tunes their rates, `deltacontrol.theory.dimension.estimate` makes the estimate.
The target is a number, or a share of the mean performance of baseline runs, whose rate is tuned
in the same way.

Every training is a run of its own in the same store, and the search follows from these runs alone:
one that was interrupted goes on, and a second one computes nothing. Another search of the same task
finds the runs that both have, such as those of the baseline. Trainings that are certain to come are
made at a time (`deltacontrol.experiments.studies.d90.trainings`).

Sources: Li et al., ICLR 2018, section 2 (d_int90, absolute and relative baselines); Aghajanyan et
al., ACL 2021, section 3 (d90 of language models, DID and SAID).
"""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.experiments.studies.d90.search import (
    TRIES,
    Search,
    Trial,
    steadiest,
    three_digits,
)
from deltacontrol.experiments.studies.d90.trainings import Line, Trainings
from deltacontrol.experiments.training.settings import check_count, check_number
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

BASELINE, SEARCH = "baseline", "search"  # the parts of the trainings


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
        for name in ("smallest", "largest", "start", "seeds", "budget", "baseline_seeds"):
            check_count(self, name, least=1)
        for name in ("stride", "resolution", "width", "share", "confidence", "target"):
            check_number(self, name, above=0.0)
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
            InputError: from a training, or under `accelerate launch`.
        """
        from deltacontrol.experiments.runs.store import RunStore

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                "a search for a dimension starts processes of its own; start it without accelerate"
            )
        store = RunStore(workspace.store or workspace.folder / "runs", keep_controls=False)
        smallest, largest = self._range()
        most = {BASELINE: 0 if self.target else TRIES * self.baseline_seeds, SEARCH: self.budget}
        with closing(Line(self.label, most, workspace.progress)) as line:
            runs = _Runs(self, Trainings(store, line))
            baseline: list[Trial] = []
            goal: float | Baseline = self.target or 0.0
            if self.target is None:
                baseline = steadiest(
                    self.first_rate(), runs.baseline, self.baseline_seeds, runs.baselines_ahead
                )
                goal = Baseline(tuple(t.performance for t in baseline), self.share)
                line.finish(BASELINE)
            names = {f.name for f in fields(Search)} & {f.name for f in fields(DimensionSearch)}
            options = {name: getattr(self, name) for name in names - {"target"}}
            options |= {"smallest": smallest, "largest": largest}
            search = Search(runs.measure, goal, ahead=runs.ahead, **options)
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

    def __init__(self, spec: DimensionSearch, trainings: Trainings) -> None:
        self.spec, self.trainings = spec, trainings
        self.trials: list[Trial] = []
        self.chance = -math.inf

    def baseline(self, rate: float, seed: int) -> Trial:
        return self._done(self.spec.baseline_training(rate, seed), None, rate, rate, seed)

    def baselines_ahead(self, certain: Sequence[tuple[float, int]]) -> None:
        self.trainings.ahead(BASELINE, [self.spec.baseline_training(*key) for key in certain])

    def measure(self, d: int, move: float, seed: int) -> Trial:
        rate = _rate(d, move)
        return self._done(self.spec.training(d, rate, seed), d, move, rate, seed)

    def ahead(self, certain: Sequence[tuple[int, float, int]]) -> None:
        trainings = [self.spec.training(d, _rate(d, move), seed) for d, move, seed in certain]
        self.trainings.ahead(SEARCH, trainings)

    def _done(
        self, training: Experiment, d: int | None, move: float, rate: float, seed: int
    ) -> Trial:
        record = self.trainings.one(BASELINE if d is None else SEARCH, training)
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
        return trial


def _rate(d: int, move: float) -> float:
    return three_digits(move / math.sqrt(d))


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
