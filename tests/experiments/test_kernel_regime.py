"""Fine-tuning against its kernel: exact where the model is linear, second order where not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltacontrol.deltas import HeadTuning, LoRA
from deltacontrol.experiments.measures.kernel_regime import follow, kernel_distance
from deltacontrol.experiments.measures.margins import MarginData
from deltacontrol.experiments.setting import Setting
from deltacontrol.theory.errors import InputError


@pytest.fixture(scope="module")
def data(minilm_l6: str) -> MarginData:
    setting = Setting(
        minilm_l6, "movie", train_rows=4, test_rows=3, order="shuffled", max_length=8,
        head="ridge", head_rows=64, dtype="float64",
    )  # fmt: skip
    return MarginData.of(setting)


@pytest.mark.slow
def test_a_head_follows_its_kernel_exactly(data: MarginData) -> None:
    found = follow(data, [HeadTuning()], fall=0.3, steps=20)
    assert max(found.error, found.train_error, found.drift) < 1e-9
    assert found.direction == pytest.approx(1.0, abs=1e-12)
    assert found.loss == pytest.approx(found.predicted, rel=1e-9)
    assert found.loss < found.start


@pytest.mark.slow
def test_lora_leaves_its_kernel_in_proportion_to_how_far_it_goes(data: MarginData) -> None:
    """A tenth of a short step: a tenth of the error and of the drift, to the next order."""
    long, short = (
        follow(data, [LoRA(rank=2)], fall=0.99, steps=1, stretch=s) for s in (0.01, 0.001)
    )
    assert long.steps == short.steps == 1
    assert short.error == pytest.approx(long.error / 10, rel=0.3)
    assert short.drift == pytest.approx(long.drift / 10, rel=0.3)


def test_the_distance_of_kernels_forgets_their_sizes() -> None:
    one = torch.eye(3)
    assert kernel_distance(one, 5 * one) == 0
    assert kernel_distance(one, torch.diag(torch.tensor([1.0, 0, 0]))) == pytest.approx(
        (2 - 2 / 3**0.5) ** 0.5
    )


def test_unseen_examples_are_needed(data: MarginData) -> None:
    none = replace(data.test, tokens=data.test.tokens[:0], offsets=data.test.offsets[:1])
    with pytest.raises(InputError, match="unseen"):
        follow(replace(data, test=none), [LoRA()])
