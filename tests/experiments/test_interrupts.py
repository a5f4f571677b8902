"""Ctrl-C and SIGTERM in a training: the step ends and is saved, however early."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pandas as pd
import pytest
import torch

from deltacontrol.deltas import LoRA, attach
from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.training.loop import train
from tests.experiments.training_models import ParityBatches, bert, settings


def fit(model, batches=None, **options):
    return train(model, batches or ParityBatches(), settings(), progress=False, **options)


class Interrupting(ParityBatches):
    """Batches of which one sends the process a signal."""

    def __init__(self, at: int, number: int, times: int = 1):
        super().__init__()
        self.at, self.number, self.times = at, number, times

    def batch(self, step):
        if step == self.at:
            for _ in range(self.times):  # the handler runs between two of them
                os.kill(os.getpid(), self.number)
        return super().batch(step)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Ctrl-C raises, also where this process was started with it ignored; as before afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_an_interrupt_in_the_last_step_is_not_lost(tmp_path):
    whole = fit(attach(bert(), LoRA(rank=2), seed=0))
    last = len(whole.curve) - 1
    with pytest.raises(KeyboardInterrupt, match="step 12 of 12: it is saved"):
        batches = Interrupting(last, signal.SIGINT)
        fit(attach(bert(), LoRA(rank=2), seed=0), batches, checkpoint_dir=tmp_path)
    resumed = fit(attach(bert(), LoRA(rank=2), seed=0), checkpoint_dir=tmp_path)
    assert all(torch.equal(whole.controls[k], resumed.controls[k]) for k in whole.controls)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_the_first_seconds_loses_nothing(tmp_path, number, capsys):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    whole = fit(attach(bert(), LoRA(rank=2), seed=0))
    with pytest.raises(KeyboardInterrupt, match="step 3 of 12 is saved"):
        fit(attach(bert(), LoRA(rank=2), seed=0), Interrupting(2, number), checkpoint_dir=tmp_path)
    assert "this step ends and is saved" in capsys.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    resumed = fit(attach(bert(), LoRA(rank=2), seed=0), checkpoint_dir=tmp_path)
    drop = ["seconds"]
    pd.testing.assert_frame_equal(whole.curve.drop(columns=drop), resumed.curve.drop(columns=drop))
    assert all(torch.equal(whole.controls[k], resumed.controls[k]) for k in whole.controls)


def test_the_second_one_stops_at_once(tmp_path):
    batches = Interrupting(2, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt) as stop:
        fit(attach(bert(), LoRA(rank=2), seed=0), batches, checkpoint_dir=tmp_path)
    assert not stop.value.args


def test_the_command_says_what_is_saved(monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt("step 3 of 10 is saved")

    monkeypatch.setattr(cli.available()["models"], "run", interrupted)
    assert cli._main(["models"]) == 130
    assert "interrupted; step 3 of 10 is saved; the same command goes on" in capsys.readouterr().err
