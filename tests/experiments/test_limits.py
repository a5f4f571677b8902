"""A run has a time limit: it is saved there, listed with its reason, and goes on with more time."""

from __future__ import annotations

import signal
import time

import pandas as pd
import pytest
import torch

from deltacontrol.deltas import LoRA, attach
from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.interactive import finetune
from deltacontrol.experiments.measures.solving import Solve
from deltacontrol.experiments.runs import interrupts
from deltacontrol.experiments.runs.failures import failures
from deltacontrol.experiments.runs.interrupts import LimitError, deferred, limited
from deltacontrol.experiments.runs.running import run_together
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run
from deltacontrol.experiments.training import execution
from deltacontrol.experiments.training.loop import train
from deltacontrol.theory.errors import InputError
from tests.experiments.test_finetune import places, tiny
from tests.experiments.training_models import ParityBatches, bert, settings

__all__ = ["places"]

RAISED = "larger --limit-minutes: it goes on from its checkpoint"


def end_time() -> None:
    """The limit is reached now."""
    limit = interrupts._LIMIT.get()
    assert limit is not None
    limit.ends = time.monotonic()


class Ending(ParityBatches):
    """Batches of which one takes the time that was left."""

    def __init__(self, at: int):
        super().__init__()
        self.at = at

    def batch(self, step):
        if step == self.at:
            end_time()
        return super().batch(step)


@pytest.fixture
def store(tmp_path) -> RunStore:
    return RunStore(tmp_path / "runs")


@pytest.fixture
def ending(monkeypatch):
    """Makes the batch of one step, in any run, take the time that was left."""

    def at(number):
        batch = execution.TrainingBatches.batch

        def slow(self, step):
            if step == number:
                end_time()
            return batch(self, step)

        monkeypatch.setattr(execution.TrainingBatches, "batch", slow)

    return at


@pytest.mark.parametrize("at", [2, 11])  # of 12 steps
def test_at_the_limit_a_step_ends_and_is_saved(tmp_path, at):
    def fit(batches):
        model = attach(bert(), LoRA(rank=2), seed=0)
        return train(model, batches, settings(), progress=False, checkpoint_dir=tmp_path / "kept")

    whole = train(attach(bert(), LoRA(rank=2), seed=0), ParityBatches(), settings(), progress=False)
    with pytest.raises(LimitError, match=f"step {at + 1} of 12"), limited(60.0):
        fit(Ending(at))
    with limited(60.0):
        resumed = fit(ParityBatches())
    assert all(torch.equal(whole.controls[k], resumed.controls[k]) for k in whole.controls)


def test_a_pass_of_several_at_its_limit_is_listed_and_goes_on(places, store, ending, monkeypatch):
    runs = [tiny(places, steps=6), tiny(places, steps=6, seed=1)]
    whole = [run(one, RunStore(store.root.parent / "other"), progress=False) for one in runs]
    with monkeypatch.context():
        ending(3)
        with pytest.raises(
            InputError, match="and 1 more: it was stopped at its limit of 120 minut"
        ):
            run_together(runs, store, progress=False, limit_minutes=60.0)
    assert len(failures(store.root)) == 2
    monkeypatch.undo()
    for mine, own in zip(run_together(runs, store, progress=False), whole, strict=True):
        assert mine.result["copies_trained_together"] == 2
        assert mine.curve()["loss"].tolist() == pytest.approx(
            own.curve()["loss"].tolist(), rel=1e-4
        )
    assert not failures(store.root)


def test_a_fine_tuning_at_its_limit_is_listed_and_goes_on(places, store, ending, capsys):
    experiment = tiny(places, steps=6)
    whole = run(experiment, RunStore(store.root.parent / "other"), progress=False)
    words = ["--model", experiment.model, "--task", experiment.task, "--steps", "6",
             "--batch-size", "8", "--max-length", "12", "--learning-rate", "5e-3", "--device",
             "cpu", "--precision", "fp32", "--runs", str(store.root)]  # fmt: skip
    ending(3)
    assert cli._main(["finetune", *words, "--limit-minutes", "60"]) == 2
    said = capsys.readouterr().err
    assert "stopped at its limit of 60 minutes; step 4 of 6 is saved" in said and RAISED in said
    (failure,) = failures(store.root)
    assert failure.label in said and failure.reason in said
    assert cli._main(["runs", "--runs", str(store.root), "--failed"]) == 0
    assert "its limit of 60 minutes; step 4 of 6 is saved" in " ".join(
        capsys.readouterr().out.split()
    )
    assert cli._main(["finetune", *words, "--limit-minutes", "120"]) == 0
    resumed = store.find(experiment)
    assert resumed is not None and failures(store.root) == []
    drop = ["seconds"]
    pd.testing.assert_frame_equal(
        whole.curve().drop(columns=drop), resumed.curve().drop(columns=drop), check_exact=True
    )
    assert resumed.result["loss"] == whole.result["loss"]


@pytest.mark.parametrize("solver", ["newton-cg", "adam:lr=0.01"])
@pytest.mark.one_in(2)
def test_a_solve_at_its_limit_goes_on(places, store, monkeypatch, solver):
    experiment = Solve(
        model=str(places / "tiny-bert"), task=str(places / "task.csv"), deltas=("bitfit",),
        rows=4, max_length=12, weight_decay=0.1, solver=solver, steps=4, tol=0.0,
    )  # fmt: skip
    whole = run(experiment, RunStore(store.root.parent / "other"), progress=False)

    def slow(*args, callback, **options):
        def look(now):
            if now.iteration == 2:
                end_time()
            callback(now)

        return solve(*args, callback=look, **options)

    solve = execution.solve
    monkeypatch.setattr(execution, "solve", slow)
    with pytest.raises(InputError, match="its limit of 1440 minutes; iteration 2 is saved"):
        run(experiment, store, progress=False)
    assert [f.id for f in failures(store.root)] == [store.path(experiment).name]
    resumed = run(experiment, store, progress=False)
    assert resumed.result["objective"] == whole.result["objective"]
    assert resumed.result["residual"] == whole.result["residual"]
    ours, theirs = whole.controls(), resumed.controls()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_work_without_steps_stops_at_once():
    with pytest.raises(LimitError, match="^$") as stop, limited(1e-4) as limit:
        time.sleep(300.0)
    assert stop.value.limit is limit and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_step_that_does_not_end_is_stopped_after_the_grace(monkeypatch):
    monkeypatch.setattr(interrupts, "GRACE_SECONDS", 1e-3)
    with pytest.raises(LimitError), limited(1e-4), deferred():
        time.sleep(300.0)


def test_inside_of_another_limit_the_earlier_end_counts():
    with limited(60.0) as outer:
        with limited(120.0), deferred() as asked:
            assert asked.limit is outer
        with limited(1.0) as inner, deferred() as asked:
            assert asked.limit is inner
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 3600.0
        outer.ends = time.monotonic()
        with deferred() as asked, pytest.raises(LimitError) as stop:
            assert asked.asked
            asked.stop("all of it is saved")
        assert stop.value.limit is outer and "; all of it is saved; if" in stop.value.reason


def test_the_limit_of_a_whole_is_no_failure_of_its_part(places, store, ending):
    ending(3)
    with pytest.raises(LimitError), limited(60.0):
        run(tiny(places, steps=6), store, progress=False, limit_minutes=120.0)
    assert failures(store.root) == []


@pytest.mark.parametrize("minutes", [0, -1.0, float("nan"), float("inf")])
def test_a_limit_is_read_before_anything_else(places, tmp_path, minutes, capsys):
    with pytest.raises(InputError, match="limit_minutes is"):
        finetune("nowhere", "nothing", runs=tmp_path, limit_minutes=minutes)
    for command in ("finetune", "solve", "dimension"):
        words = [command, "--task", "nothing", "--limit-minutes", str(minutes)]
        assert cli._main([*words, "--runs", str(tmp_path)]) == 2
        assert "limit_minutes is" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
