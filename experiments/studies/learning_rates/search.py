"""A search of learning rates that gives hopeless ones up early, as one record.

Every rate is trained with every seed up to a first look, after a share ``s`` of the steps; the
``keep`` rates of the best mean validation metric there are trained on to the end, and so are those
that have a recorded training already; the others are given up (one round of successive halving).
All trainings follow the schedule of the whole, and one that goes on is the uninterrupted one, up to
the rounding of passes that several of them share. They run in as many processes as there are
cores. The search costs

    (s R + (1 - s) keep) / R    of training all R rates to the end,

and finds the same rate unless the best one is behind ``keep`` others at the first look. Test rows
are never looked at.

Source: Jamieson & Talwalkar, *Non-stochastic best arm identification and hyperparameter
optimization*, AISTATS 2016; Li, Jamieson, DeSalvo, Rostamizadeh & Talwalkar, *Hyperband*, JMLR
18(185), 2018.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, ClassVar

from deltacontrol.experiments.runs.experiment import Outcome, Workspace
from deltacontrol.experiments.training.finetune import FineTuning, Subject
from deltacontrol.experiments.training.settings import check_count
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from deltacontrol.experiments.runs.store import Record, RunStore

LOSSES = {"accuracy": "loss", "pearson": "mse"}  # which breaks ties of the metric


@dataclass(frozen=True)
class RateSearch(Subject):
    """Find a learning rate on validation rows."""

    kind: ClassVar[str] = "rate-search"

    rates: tuple[float, ...] = ()
    """The rates to try; by default those that the delta's own file names."""
    seeds: int = 3
    """Trainings of each rate, with the seeds seed, seed + 1, ..."""
    look: float = 0.2
    """After which share of the steps all but the best rates are given up; 1 gives none up."""
    keep: int = 2
    """How many rates are trained to the end."""
    steps: int = 100
    """Updates of a training."""
    batch_size: int = 16
    """Examples of an update."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    eval_limit: int | None = 1000
    """Evaluate on at most so many validation rows."""

    def __post_init__(self) -> None:
        """Check the fields, and settle the rates."""
        super().__post_init__()
        if not self.rates:
            object.__setattr__(self, "rates", _own_rates(self.deltas))
        wrong = [r for r in self.rates if isinstance(r, bool) or not 0 < r < math.inf]
        if wrong or len(set(self.rates)) < len(self.rates):
            raise InputError(
                f"the rates are {', '.join(map(str, self.rates))}; expected different numbers "
                "above 0, such as 1e-3 3e-3"
            )
        object.__setattr__(self, "rates", tuple(sorted(float(r) for r in self.rates)))
        for name in ("seeds", "keep", "steps", "batch_size", "eval_limit"):
            check_count(self, name, least=1)
        if not 0 < self.look <= 1:
            raise InputError(
                f"look is {self.look}; expected a share of the steps, above 0, up to 1"
            )
        self.training(self.rates[0], self.seed)  # which checks the rest

    @property
    def label(self) -> str:
        """Model, task, deltas and the number of rates."""
        names = "+".join(delta["name"] for delta in self.deltas)
        return f"{self.model} {self.task} {names}, {len(self.rates)} rates"

    def training(self, rate: float, seed: int) -> FineTuning:
        """One training, evaluated on validation rows."""
        return FineTuning(
            model=self.model,
            task=self.task,
            deltas=self.deltas,
            seed=seed,
            max_length=self.max_length,
            pretrained=self.pretrained,
            text_column=self.text_column,
            label_column=self.label_column,
            task_kind=self.task_kind,
            learning_rate=rate,
            steps=self.steps,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            eval_limit=self.eval_limit,
            evaluate_on="validation",
        )

    def execute(self, workspace: Workspace) -> Outcome:
        """Search.

        The result holds rate, the chosen one; metric, by which; score and spread, its mean and
        standard deviation over the seeds; at_end, whether it is the first or the last of the rates,
        so that the best may lie outside; steps_done of steps_of_all. The curve has a row a
        training: its rate and seed, the metric at the look and at the end (None where it was given
        up, or diverged) and the id of its run.

        Raises:
            InputError: From a training, because every one diverged, or under `accelerate launch`.
        """
        import pandas as pd

        from deltacontrol.experiments.runs.running import forsake
        from deltacontrol.experiments.runs.store import RunStore
        from deltacontrol.experiments.runs.sweep import advance_all, run_all

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                "a search of rates starts processes of its own; start it without accelerate"
            )
        store = RunStore(workspace.store or workspace.folder / "runs", keep_controls=False)
        seeds = range(self.seed, self.seed + self.seeds)
        first = max(1, round(self.look * self.steps))
        early = first < self.steps and self.keep < len(self.rates)
        rows = {(r, s): {"rate": r, "seed": s} for r in self.rates for s in seeds}
        kept, looks = list(self.rates), _Looks(workspace.folder)
        waiting = [key for key in rows if early and key not in looks]
        if waiting:
            trainings = [self.training(*key) for key in waiting]
            metrics = advance_all(trainings, store, first, progress=workspace.progress)
            looks.keep(dict(zip(waiting, metrics, strict=True)))
        if early:
            for key, found in looks.items():
                if found:
                    rows[key][f"{_monitored(found)}_at_look"] = found[_monitored(found)]
            kept = self._kept(looks, store)
        keys = [(rate, seed) for rate in kept for seed in seeds]
        records = run_all([self.training(*key) for key in keys], store, progress=workspace.progress)
        ends: dict[float, list[dict[str, float] | None]] = {}
        for key, record in zip(keys, records, strict=True):
            found = _metrics(record)
            ends.setdefault(key[0], []).append(found)
            rows[key]["run"] = record.id
            if found:
                rows[key][_monitored(found)] = found[_monitored(found)]
        for rate in set(self.rates) - set(kept):
            for seed in seeds:
                forsake(self.training(rate, seed), store)
        best = min(ends, key=lambda r: _rank(ends[r]))
        reached = [found for found in ends[best] if found]
        if len(reached) < self.seeds:
            raise InputError(
                f"{self.label}: every rate that was trained to the end diverged with some seed; "
                "try smaller ones"
            )
        name = _monitored(reached[0])
        values = [found[name] for found in reached]
        done = self.seeds * (len(kept) * self.steps + (len(self.rates) - len(kept)) * first)
        result: dict[str, Any] = {
            "rate": best,
            "metric": name,
            "score": mean(values),
            "spread": stdev(values) if len(values) > 1 else None,
            "kept": kept,
            "at_end": best in (self.rates[0], self.rates[-1]) and len(self.rates) > 1,
            "steps_done": done,
            "steps_of_all": self.seeds * len(self.rates) * self.steps,
        }
        return Outcome("completed", result, pd.DataFrame(list(rows.values())))

    def _kept(self, looks: _Looks, store: RunStore) -> list[float]:
        """The best rates at the look, and those of which a training is recorded already.

        One that has no look and no record diverged before it.
        """
        seeds = range(self.seed, self.seed + self.seeds)
        trials = {r: [looks[r, s] for s in seeds] for r in self.rates}
        ranked = sorted(self.rates, key=lambda r: _rank(trials[r]))
        unlooked = {
            r
            for r in self.rates
            for s in seeds
            if looks[r, s] is None and store.find(self.training(r, s)) is not None
        }
        looked = [r for r in ranked if r not in unlooked]
        return sorted([*looked[: self.keep], *unlooked])


class _Looks(dict[tuple[float, int], "dict[str, float] | None"]):
    """The metrics at the first look by rate and seed, kept in a file of an interrupted search."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "looks.json"
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else []
        super().__init__({(rate, seed): found for rate, seed, found in known})

    def keep(self, found: Mapping[tuple[float, int], dict[str, float] | None]) -> None:
        """Add what was seen, and write all of it down."""
        self.update(found)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_suffix(".partial")
        rows = [[rate, seed, found] for (rate, seed), found in self.items()]
        beside.write_text(json.dumps(rows), encoding="utf-8")
        os.replace(beside, self.file)


def _own_rates(deltas: tuple[dict[str, Any], ...]) -> tuple[float, ...]:
    from deltacontrol.deltas import registry

    methods = registry.available()
    return min((methods[d["name"]] for d in deltas), key=lambda m: m.rate()).rates_to_search()


def _metrics(record: Record) -> dict[str, float] | None:
    """What it reached on validation rows; None after a divergence."""
    result = record.result
    if record.status == "diverged":
        return None
    names = [n for n in ("accuracy", "pearson", "loss", "mse") if result.get(n) is not None]
    return {name: result[name] for name in names}


def _monitored(found: dict[str, float]) -> str:
    return next((name for name in LOSSES if name in found), "loss")


def _rank(trials: list[dict[str, float] | None]) -> tuple[float, float]:
    """What sorts the best rate first: its mean metric, then its mean loss; divergence last."""
    if any(found is None or not all(map(math.isfinite, found.values())) for found in trials):
        return math.inf, math.inf
    known = [found for found in trials if found is not None]
    name = _monitored(known[0])
    loss = LOSSES.get(name, name)
    level = mean(found[name] for found in known) if name in LOSSES else 0.0
    return -level, mean(found[loss] for found in known)
