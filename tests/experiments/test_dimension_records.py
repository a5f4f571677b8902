"""The records of a search for a dimension, with made-up trainings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from deltacontrol.experiments.runs import sweep
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run
from deltacontrol.experiments.studies.d90.dimension import estimate_from
from deltacontrol.experiments.studies.d90.mnist import MnistDimension, MnistTraining
from deltacontrol.theory.dimension.estimate import Baseline
from deltacontrol.theory.errors import InputError


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[MnistTraining]:
    """Let trainings be read off a curve; lists those that were executed."""
    from deltacontrol.experiments.runs.experiment import Outcome

    done: list[MnistTraining] = []

    def execute(self: MnistTraining, workspace: object) -> Outcome:
        done.append(self)
        accuracy: float | None = 0.95
        if self.dimension is not None:
            accuracy = 0.7 + 0.2 * math.log10(self.dimension / 100) + 0.001 * self.seed
        status = "completed"
        if self.learning_rate * math.sqrt(self.dimension or 1) > 20:
            accuracy, status = None, "diverged"
        result: dict[str, Any] = {
            "accuracy": accuracy,
            "validation_accuracy": accuracy,
            "validation_loss": accuracy and 1 - accuracy,
            "majority_share": 0.1,
            "num_total": 5000,
        }
        return Outcome(status, result, pd.DataFrame({"step": [1]}))

    monkeypatch.setattr(MnistTraining, "execute", execute)
    monkeypatch.setattr(sweep, "default_workers", lambda: 1)  # other processes would not know
    return done


def test_a_search_is_recorded_once_with_all_that_it_ran(
    made_up: list[MnistTraining], tmp_path: Path
) -> None:
    store = RunStore(tmp_path)
    record = run(MnistDimension(), store, progress=False)
    assert record is not None
    rows = record.curve()
    assert len(rows) == len(made_up) == len(set(rows["run"]))
    assert {r.id for r in store.records()} == {record.id, *rows["run"]}
    assert record.result["num_runs"] == rows["dimension"].notna().sum()
    assert record.result["target"] == pytest.approx(0.9 * 0.95)
    exact = 100 * 10 ** (0.155 / 0.2)
    assert record.result["low"] <= exact * 1.05 and record.result["high"] >= exact * 0.95
    assert record.result["verdict"] == "estimated"
    json.dumps(record.result, allow_nan=False)
    again = estimate_from(rows, Baseline(tuple(record.result["baseline"])), chance=0.1)
    assert again.to_dict()["text"] == record.result["text"]
    run(MnistDimension(), store, progress=False)
    assert len(made_up) == len(rows)


@pytest.mark.slow
def test_an_interrupted_search_goes_on(
    made_up: list[MnistTraining], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(MnistDimension(), RunStore(tmp_path / "whole"), progress=False)
    assert whole is not None
    total = len(made_up)
    made_up.clear()
    execute = MnistTraining.execute

    def interrupted(self: MnistTraining, workspace: Any) -> Any:
        if len(made_up) == 7:
            raise KeyboardInterrupt
        return execute(self, workspace)

    monkeypatch.setattr(MnistTraining, "execute", interrupted)
    store = RunStore(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        run(MnistDimension(), store, progress=False)
    monkeypatch.setattr(MnistTraining, "execute", execute)
    record = run(MnistDimension(), store, progress=False)
    assert record is not None and record.result == whole.result
    assert len(made_up) == total


@pytest.mark.parametrize(("share", "end"), [(2.0, 5000), (0.4, 15)])
@pytest.mark.one_in(2)
def test_no_dimension_is_outside_of_those_that_there_are(
    share: float,
    end: int,
    made_up: list[MnistTraining],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MnistDimension, "extent", lambda self: (15, 5000))
    run(MnistDimension(share=share), RunStore(tmp_path), progress=False)
    tried = {t.dimension for t in made_up if t.dimension}
    assert end in tried and min(tried) >= 15 and max(tried) <= 5000
    with pytest.raises(InputError, match="from 15 to 5,000 only, of which smallest = 6,000"):
        run(MnistDimension(smallest=6000), RunStore(tmp_path), progress=False)


@pytest.mark.slow
def test_rules_share_their_trainings(made_up: list[MnistTraining], tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run(MnistDimension(), store, progress=False)
    before = {(t.dimension, t.learning_rate, t.seed) for t in made_up}
    record = run(MnistDimension(target=0.9), store, progress=False)
    assert record is not None and record.result["baseline"] is None
    shared = {(r.dimension, r.rate, r.seed) for r in record.curve().itertuples()} & before
    assert len(shared) >= 4
    assert len(made_up) == len({(t.dimension, t.learning_rate, t.seed) for t in made_up})


def test_a_diverged_run_counts_as_guessing(made_up: list[MnistTraining], tmp_path: Path) -> None:
    spec = MnistDimension(stride=10.0, resolution=4.0, budget=9)
    record = run(spec, RunStore(tmp_path), progress=False)
    assert record is not None
    rows = record.curve()
    diverged = rows[rows["status"] == "diverged"]
    assert len(diverged) and set(diverged["performance"]) == {0.1} and not diverged["used"].any()


def test_a_target_that_guessing_reaches_trains_nothing(
    made_up: list[MnistTraining], tmp_path: Path
) -> None:
    record = run(MnistDimension(share=0.1), RunStore(tmp_path), progress=False)
    assert record is not None and record.result["verdict"] == "inconclusive"
    assert "guessing" in record.result["reason"] and record.result["num_runs"] == 0
    assert {t.dimension for t in made_up} == {None}
