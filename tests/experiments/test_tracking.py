"""Trackers see what a run does, are no part of it, and cannot end it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking as accelerated
from accelerate.tracking import GeneralTracker

import deltacontrol as dc
from deltacontrol.experiments import tracking
from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run, run_all
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory import plugins
from deltacontrol.theory.errors import InputError
from tests import tiny_model

# As a user would write it, in a file of theirs that workers load too.
TOY = '''
import json
from pathlib import Path

from accelerate.tracking import GeneralTracker, register_tracker_class


class Toy(GeneralTracker):
    """Writes a line a call into the folder."""

    name = "toy"
    requires_logging_directory = True

    def __init__(self, run_name, logging_dir):
        super().__init__()
        self.file = Path(logging_dir) / f"{run_name}.jsonl"

    @property
    def tracker(self):
        return self.file

    def _write(self, what, **values):
        with self.file.open("a") as file:
            file.write(json.dumps({"what": what, **values}) + "\\n")

    def start(self):
        self._write("start")

    def store_init_configuration(self, values):
        self._write("configuration", values=values)

    def log(self, values, step=None):
        self._write("log", step=step, values=values)

    def finish(self):
        self._write("finish")


register_tracker_class(Toy)
'''


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_model.write(tmp_path_factory.mktemp("places"), classes=2)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tracker of the user's own, for this test alone."""
    monkeypatch.setattr(accelerated, "LOGGER_TYPE_TO_CLASS", dict(accelerated.LOGGER_TYPE_TO_CLASS))
    monkeypatch.setattr(plugins, "_loaded", {})
    file = tmp_path / "my_tracker.py"
    file.write_text(TOY)
    plugins.load(file)
    return "toy"


def tiny(places: dict[str, str], **options: Any) -> FineTuning:
    sizes = {"steps": 6, "batch_size": 8, "max_length": 8, "learning_rate": 1e-2, "eval_every": 3}
    fixed = {"deltas": ("lora:rank=2",), "precision": "fp32", "device": "cpu", "seed": 1}
    given: dict[str, Any] = {**places, **sizes, **fixed, **options}
    return FineTuning(**given)


def told(store: RunStore, run_id: str) -> list[dict[str, Any]]:
    file = store.root / tracking.FOLDER / f"{run_id}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_tracker_sees_configuration_steps_evaluations_and_result(
    places: dict[str, str], store: RunStore, toy: str
) -> None:
    experiment = tiny(places)
    with tracking.using(toy):
        record = run(experiment, store, progress=False)
    assert record is not None
    lines = told(store, record.id)
    assert [line["what"] for line in lines[:2]] == ["start", "configuration"]
    assert lines[-1]["what"] == "finish"
    config = lines[1]["values"]
    assert config["deltas.0.rank"] == 2 and config["steps"] == 6 and record.id in config["run"]
    logs = [line for line in lines if line["what"] == "log"]
    curve = record.curve()
    for log, row in zip(
        (g for g in logs if "loss" in g["values"]), curve.itertuples(), strict=True
    ):
        assert log["step"] == row.step and log["values"]["loss"] == row.loss
        assert log["values"]["learning_rate"] == row.learning_rate
    seen = {g["step"]: g["values"] for g in logs if "validation_accuracy" in g["values"]}
    assert list(seen) == [3, 6]
    assert seen[6]["validation_accuracy"] == curve["validation_accuracy"].iloc[-1]
    result = logs[-1]["values"]
    assert result["result_accuracy"] == record.result["accuracy"] and logs[-1]["step"] == 6


def test_a_tracked_run_is_the_run_without_trackers(
    places: dict[str, str], store: RunStore, tmp_path: Path, toy: str
) -> None:
    experiment = tiny(places)
    with tracking.using([toy]):
        tracked = run(experiment, store, progress=False)
    plain = run(experiment, RunStore(tmp_path / "other"), progress=False)
    assert tracked is not None and plain is not None
    assert tracked.id == plain.id and tracked.config == plain.config
    assert tracked.curve()["loss"].equals(plain.curve()["loss"])
    assert tracking.used() == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the folder beside the records is no stray one
        assert [r.id for r in store.listed()] == [tracked.id]


def test_stages_and_solvers_are_tracked(places: dict[str, str], store: RunStore, toy: str) -> None:
    with tracking.using(toy):
        both = run(
            tiny(places, deltas=("lora:rank=2", "bitfit"), sequential=True, steps=3,
                 eval_every=None), store, progress=False,
        )  # fmt: skip
        solved = run(
            tiny(places, optimiser="lbfgs", learning_rate=None, eval_every=None, steps=2, seed=0,
                 precision="auto", train_limit=8), store, progress=False,
        )  # fmt: skip
    assert both is not None and solved is not None
    steps = [g["step"] for g in told(store, both.id) if "loss" in g.get("values", {})]
    assert steps == [1, 2, 3, 4, 5, 6]
    last = told(store, solved.id)[-2]["values"]
    assert last["result_objective"] == solved.result["objective"]


class Failing(GeneralTracker):
    """Fails at one of its calls."""

    name = "failing"
    requires_logging_directory = False
    at = "log"
    calls: list[str] = []

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.project = run_name

    @property
    def tracker(self) -> None:
        return None

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.at:
            raise ConnectionError("the server is gone")

    def start(self) -> None:
        self._call("start")

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        self._call("log")

    def finish(self) -> None:
        self._call("finish")


@pytest.mark.parametrize("at", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(
    places: dict[str, str], store: RunStore, toy: str, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    accelerated.register_tracker_class(Failing)
    monkeypatch.setattr(Failing, "at", at)
    monkeypatch.setattr(Failing, "calls", [])
    with tracking.using(["failing", toy]), pytest.warns(UserWarning) as caught:
        record = run(tiny(places), store, progress=False)
    assert record is not None and record.status == "completed"
    said = [str(w.message) for w in caught if "failing" in str(w.message)]
    assert len(said) == 1 and "the server is gone" in said[0] and "the run goes on" in said[0]
    assert Failing.calls.count(at) == 1
    assert len([g for g in told(store, record.id) if "loss" in g.get("values", {})]) == 6


def test_an_interrupted_run_closes_its_trackers(
    places: dict[str, str], store: RunStore, toy: str
) -> None:
    config: dict[str, Any] = {"a": 1}
    with pytest.raises(KeyboardInterrupt), tracking.using(toy):
        with tracking.following("0" * 16, "a run", config, store.root) as trackers:
            trackers.row({"step": 4, "loss": 0.5, "timed": True, "note": "x"})
            raise KeyboardInterrupt
    lines = told(store, "0" * 16)
    assert [line["what"] for line in lines] == ["start", "configuration", "log", "finish"]
    assert lines[2] == {"what": "log", "step": 4, "values": {"loss": 0.5}}


@pytest.mark.slow
def test_the_workers_of_a_sweep_track_too(
    places: dict[str, str], store: RunStore, toy: str
) -> None:
    """Runs that could share a pass do not, because each has its tracker."""
    experiments = [tiny(places, seed=seed) for seed in (0, 1)]
    with tracking.using(toy):
        records = run_all(experiments, store, workers=2, progress=False)
    for record in records:
        lines = told(store, record.id)
        assert lines[-1]["what"] == "finish"
        assert [g["step"] for g in lines if "loss" in g.get("values", {})] == [1, 2, 3, 4, 5, 6]


def test_the_workers_in_this_process_track_too(
    places: dict[str, str], store: RunStore, toy: str
) -> None:
    experiments = [tiny(places, seed=seed) for seed in (0, 1)]
    with tracking.using(toy):
        records = run_all(experiments, store, progress=False, executor="in-process")
    assert all(told(store, record.id)[-1]["what"] == "finish" for record in records)
    assert tracking.used() == ()


def test_the_command_and_the_call_take_trackers(
    places: dict[str, str],
    tmp_path: Path,
    toy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["finetune", "--model", places["model"], "--task", places["task"], "--steps", "2"]
    words += ["--max-length", "8", "--learning-rate", "1e-2", "--track", toy, "--device", "cpu"]
    assert cli._main(words) == 0
    (one,) = (tmp_path / "runs" / tracking.FOLDER).iterdir()
    assert '"finish"' in one.read_text()
    record = dc.finetune(
        places["model"], places["task"], "bitfit", steps=2, max_length=8, learning_rate=1e-2,
        progress=False, track=toy,
    )  # fmt: skip
    assert told(RunStore(tmp_path / "runs"), record.id)
    assert cli._main([*words[:-4], "--track", "tensorbord"]) == 2
    assert "nearest: tensorboard" in capsys.readouterr().err


def test_a_missing_package_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerated, "_available_trackers", [])
    for name, package in (("tensorboard", "tensorboard"), ("comet_ml", "comet-ml")):
        with pytest.raises(InputError, match=f"pip install {package}"):
            tracking.require(name)
    with pytest.raises(InputError, match="unknown tracker 'wandbb'; nearest: wandb"):
        tracking.require(["wandbb"])
    assert tracking.require(()) == ()
