"""The plan of a sweep says what is there and how long the rest takes, as far as that is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.scheduling import plan as scheduling
from deltacontrol.experiments.runs.scheduling.forecast import Forecast
from deltacontrol.experiments.runs.scheduling.plan import Clock, Plan, makespan, ordered
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import plan, run_all
from deltacontrol.paper_figures import collect
from tests.experiments.toy_runs import Toy, toys


@dataclass(frozen=True)
class Training(Experiment):
    """Has the fields by which runs are compared, and is never run."""

    kind: ClassVar[str] = "scheduled"
    model: str = "small"
    task: str = "movie"
    seed: int = 0
    learning_rate: float = 0.1
    batch_size: int = 16
    steps: int = 100

    def execute(self, workspace: Workspace) -> Outcome:
        raise NotImplementedError


def record(experiment: Experiment, seconds: float | None) -> Record:
    return Record("0", experiment.kind, experiment.to_config(), {}, {"wall_seconds": seconds},
                  "completed")  # fmt: skip


def named(*experiments: Experiment) -> Mapping[str, Experiment]:
    return {str(n): e for n, e in enumerate(experiments)}


@pytest.mark.parametrize(
    ("wanted", "seconds"),
    [
        (Training(seed=7, learning_rate=0.3), 11.0),  # equal but for seed and rate: 10, 11, 30
        (Training(task="rt"), 11.0),  # another task
        (Training(task="rt", steps=200), 22.0),
        (Training(steps=10), 1.1),
        (Training(batch_size=32), 12.0),  # the model alone: 10, 11, 30 and 13 of 16 x 2 steps
        (Training(model="large", steps=50), 400.0),
        (Training(model="other"), 13.0),  # the kind alone
    ],
)
def test_a_forecast_goes_by_the_runs_that_are_most_alike(wanted: Training, seconds: float) -> None:
    seen = [
        record(Training(seed=0), 10.0),
        record(Training(seed=1), 11.0),
        record(Training(seed=2), 30.0),
        record(Training(batch_size=8), 13.0),
        record(Training(model="large"), 800.0),
        record(Training(seed=3), None),
    ]
    assert Forecast(seen).seconds(wanted) == pytest.approx(seconds)


def test_nothing_is_foretold_of_a_kind_that_was_never_run() -> None:
    assert Forecast([record(Training(), 5.0)]).seconds(Toy(0)) is None


def test_the_last_run_is_done_when_the_first_free_workers_have_done_all() -> None:
    assert makespan([], 3) == 0.0
    assert makespan([5.0, 1.0, 1.0, 1.0], 2) == 5.0
    assert makespan([1.0, 1.0, 1.0, 5.0], 2) == 6.0
    assert makespan([2.0] * 7, 3) == 6.0


def test_runs_are_ordered_by_their_time_and_unknown_ones_count_as_long() -> None:
    forecast = Forecast([record(Training(steps=100), 10.0)])
    pending = named(Training(steps=50), Toy(0), Training(steps=300), Training(steps=10))
    assert list(ordered(pending, "given", forecast)) == ["0", "1", "2", "3"]
    assert list(ordered(pending, "longest", forecast)) == ["1", "2", "0", "3"]
    assert list(ordered(pending, "shortest", forecast)) == ["3", "0", "2", "1"]


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Plan(3, 3, (), 2), "3 runs, 3 recorded: nothing to do"),
        (
            Plan(1, 0, (None,), 2),
            "1 run, 0 recorded: 1 to do, 1 at a time; no run like them is recorded that would tell "
            "how long it takes",
        ),
        (
            Plan(9, 5, (60.0, 60.0, 60.0, 300.0), 2),
            "9 runs, 5 recorded: 4 to do, 2 at a time, about 6 min by recorded runs like them",
        ),
        (
            Plan(4, 1, (20.0, None, 30.0), 1),
            "4 runs, 1 recorded: 3 to do, 1 at a time, about 50 s by recorded runs like them, and "
            "1 run more of which none like it is recorded",
        ),
    ],
)
def test_a_plan_is_a_sentence(found: Plan, text: str) -> None:
    assert found.text == text


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    clock = {"time": 0.0}
    monkeypatch.setattr(scheduling.time, "monotonic", lambda: clock["time"])
    return clock


def test_the_time_that_is_left_goes_by_the_pace_of_this_sweep(now: dict[str, float]) -> None:
    """Ten seconds each are foretold, and this machine needs twenty, five of them to begin."""
    runs = named(*[Training(seed=n) for n in range(4)])
    clock = Clock(Forecast([record(Training(seed=9), 10.0)]), runs, 2)
    assert clock.left == 20.0
    clock.running([["0"], ["1"]])
    now["time"] = 5.0
    assert clock.left == 15.0
    now["time"] = 20.0
    clock.done("0", record(runs["0"], 15.0))
    clock.running([["1"], ["2"]])
    assert clock.left == 20.0  # run 1 should be over, 2 and 3 take twenty seconds each
    now["time"] = 30.0
    clock.done("1", None)  # a failure says nothing of the pace
    clock.running([["2"], ["3"]])
    assert clock.left == 20.0
    now["time"] = 45.0
    assert clock.left == 5.0


def test_runs_that_share_a_place_share_its_time(now: dict[str, float]) -> None:
    runs = named(*[Training(seed=n) for n in range(4)])
    clock = Clock(Forecast([record(Training(seed=9), 10.0)]), runs, 1)
    clock.running([["0", "1"]])
    now["time"] = 10.0
    assert clock.left == 30.0
    clock.done("0", record(runs["0"], 5.0))
    clock.done("1", record(runs["1"], 5.0))
    clock.running([["2", "3"]])
    assert clock.left == 10.0


def test_nothing_is_told_before_something_is_known_of_every_run(now: dict[str, float]) -> None:
    runs: dict[str, Any] = {"a": Training(), "b": Training(seed=1), "c": Toy(0), "d": Toy(1)}
    clock = Clock(Forecast([record(Training(seed=9), 10.0)]), runs, 1)
    assert clock.left is None
    clock.running([["c"]])
    now["time"] = 3.0
    clock.done("c", record(runs["c"], 2.0))
    assert clock.left == pytest.approx(
        1.5 * (10 + 10 + 2)
    )  # it took three where its record has two


def test_a_sweep_prints_its_plan_and_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, wanted = RunStore(tmp_path / "runs"), toys(tmp_path / "runs.log", *["compute"] * 5)
    assert plan(wanted, store, 2).text.startswith("5 runs, 0 recorded: 5 to do, 2 at a time; no")
    run_all(wanted[:2], store, 1, False, executor="in-process")
    assert not capsys.readouterr().err
    found = plan(wanted + wanted[:1], store, 2)
    assert (found.runs, found.recorded, len(found.seconds)) == (5, 2, 3) and all(found.seconds)
    run_all(wanted, store, 1, executor="in-process")
    said = capsys.readouterr().err
    assert "5 runs, 2 recorded: 3 to do, 1 at a time, about 1 s by recorded runs like them" in said
    assert "2/5" in said and "5/5" in said and "left" in said


def test_figures_tell_their_plan_and_run_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    words = ["figures", "--plan", "--only", "solvers", "cost", "--runs", str(runs)]
    assert cli._main(words) == 0
    said = capsys.readouterr().out
    assert "solvers: " in said and " to do, " in said and not runs.exists()
    assert cli._main([*words, "--preset", "paper"]) == 0
    assert "solvers: drawn from committed records, nothing to do" in capsys.readouterr().out
    monkeypatch.setattr(collect, "is_published", lambda study: False)
    assert cli._main([*words, "--preset", "paper"]) == 0
    said = capsys.readouterr().out
    assert "solvers: no committed records" in said and "--recompute" in said
    assert "cost: drawn from committed records" in said  # of a benchmark
