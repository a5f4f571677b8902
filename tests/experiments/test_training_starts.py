"""Starts from data in a training: shown whole batches once, and saved with the controls."""

from __future__ import annotations

import pytest
import torch

from deltacontrol.deltas import HeadTuning, LoRA, attach
from tests.experiments.test_training import Interrupted, Stop, fit
from tests.experiments.training_models import ParityBatches, bert


@pytest.mark.parametrize("init", ["lora-ga", "corda-kpm"])
@pytest.mark.one_in(2)
def test_a_start_from_data_sees_the_first_batches_whole(init, tmp_path):
    """It is saved with the controls, so that a training that goes on does not look again."""

    def model():
        return attach(bert(), LoRA(rank=2, init=init), HeadTuning(), seed=0)

    by_hand = model()
    rows: list[int] = []

    def losses():
        for step in range(8):
            batch = ParityBatches().batch(step)
            rows.append(len(batch["labels"]))
            yield by_hand(**batch).loss

    by_hand.prepare(losses)
    start = {k: v for k, v in by_hand.state().items() if k.endswith("_0")}
    assert rows == [8] * 8 and start
    whole = fit(model())
    assert all(torch.equal(whole.controls[k], value) for k, value in start.items())
    moved = [k for k in start if not torch.equal(whole.controls[k[: -len("_0")]], start[k])]
    assert len(moved) == len(start)
    with pytest.raises(Stop):
        fit(model(), Interrupted(10), checkpoint_dir=tmp_path, checkpoint_seconds=0.0)
    resumed = fit(model(), checkpoint_dir=tmp_path, checkpoint_seconds=0.0)
    assert all(torch.equal(whole.controls[k], resumed.controls[k]) for k in whole.controls)
