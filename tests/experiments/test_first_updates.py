"""Frozen weights are converted once, and a delta without a gradient is refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import (
    SqueezeBertConfig,
    SqueezeBertForSequenceClassification,
)

from deltacontrol.deltas import (
    BitFit,
    DoRA,
    HeadTuning,
    LoRA,
    LoReFT,
    attach,
)
from deltacontrol.experiments.training import devices as resources
from deltacontrol.experiments.training.loop import train
from deltacontrol.theory.errors import InputError
from tests.experiments.training_models import (
    VOCABULARY,
    ParityBatches,
    bert,
    settings,
)


def fit(model, batches=None, **options):
    keys = ("evaluate", "checkpoint_dir")
    extra = {key: options.pop(key) for key in keys if key in options}
    kind = options.get("kind", "classification")
    data = batches or ParityBatches(kind=kind)
    return train(model, data, settings(**options), progress=False, **extra)


@pytest.mark.parametrize("deltas", [(LoRA(rank=2),), (BitFit(),), (DoRA(rank=2), HeadTuning())])
def test_weights_that_are_converted_once_give_the_same_bits(deltas, monkeypatch) -> None:
    """Autocast would convert them in every call, to the same numbers."""

    def trained() -> dict:
        model = attach(bert(), *deltas, seed=1)
        result = fit(model, precision="bf16")
        assert not any(
            "forward" in m.__dict__ for m in model.model.modules() if m is not model.model
        )
        return result.controls

    once = trained()
    monkeypatch.setattr(resources, "cast_once", lambda model, precision: nullcontext())
    for name, value in trained().items():
        assert torch.equal(once[name], value), name


def test_a_weight_that_is_trained_or_changed_is_not_converted() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    with resources.cast_once(model, "bf16"):
        assert "forward" in model[0].__dict__ and "forward" not in model[1].__dict__
        x = torch.ones(2, 3)
        plain = torch.nn.functional.linear(x, model[0].weight, model[0].bias)
        assert torch.equal(model[0](x), plain)  # without autocast nothing is converted
        with resources.autocast("bf16", "cpu"):
            assert model[0](x).dtype == torch.bfloat16
            model[0].weight = torch.nn.Parameter(2 * model[0].weight.detach())
            doubled = torch.nn.functional.linear(x, model[0].weight, model[0].bias)
            assert torch.equal(model[0](x), doubled)
    with resources.cast_once(model, "fp32"):
        assert all("forward" not in m.__dict__ for m in model)


def test_a_delta_without_a_gradient_is_refused_after_a_few_batches() -> None:
    """SqueezeBERT's encoder calls layer.forward, which no hook sees."""
    torch.manual_seed(0)
    config = SqueezeBertConfig(
        vocab_size=VOCABULARY, hidden_size=16, embedding_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, q_groups=2, k_groups=2, v_groups=2,
        intermediate_groups=2, output_groups=2, max_position_embeddings=32,
    )  # fmt: skip
    base = SqueezeBertForSequenceClassification(config).eval()
    model = attach(base, LoReFT(rank=2), HeadTuning())
    with (
        pytest.warns(UserWarning, match="loreft changed nothing"),
        pytest.raises(InputError, match="no gradient reaches the controls of loreft"),
    ):
        fit(model)
