"""Models and controls that cannot work are refused by name, before anything is changed."""

from typing import Any

import pytest
import torch

from deltacontrol.deltas import FullFineTuning, LoRA, MixtureOfControl, attach, registry
from deltacontrol.theory.errors import InputError


def model() -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("delta", [LoRA(rank=2), FullFineTuning()])
def test_offloaded_weights_are_refused(delta: object) -> None:
    base = model()
    name = "bert.encoder.layer.1.output.dense"
    base.get_submodule(name).to("meta")
    before = {n: p.requires_grad for n, p in base.named_parameters()}
    with pytest.raises(InputError, match=rf"2 weights .* on meta.*{name}.weight.*offloaded"):
        attach(base, delta)  # type: ignore[arg-type]
    assert {n: p.requires_grad for n, p in base.named_parameters()} == before


def test_controls_larger_than_the_memory_are_refused() -> None:
    base = model()
    with pytest.raises(InputError, match="mixture-of-control would have .* GiB, and the memory"):
        attach(base, MixtureOfControl(num_controls=2**40))  # type: ignore[arg-type]
    attach(base, LoRA(rank=2)).detach()  # type: ignore[arg-type]


def test_a_delta_that_acts_nowhere_is_refused() -> None:
    with pytest.raises(InputError, match="acts nowhere"):
        attach(model(), LoRA(rank=2, sites=()))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**70, True, 1.0, None])
def test_a_seed_is_a_whole_number(seed: object) -> None:
    with pytest.raises(InputError, match="the seed is"):
        attach(model(), LoRA(rank=2), seed=seed)  # type: ignore[arg-type]


def test_a_number_is_one_of_float32() -> None:
    with pytest.raises(InputError, match=r"lora: alpha is 1e\+308; .*float32"):
        LoRA(rank=2, alpha=1e308)


@pytest.mark.parametrize("name", ["vblora", "vera", "compacter", "lora"])
def test_a_delta_without_sites_is_refused(name: str) -> None:
    base = model()
    before = {n: p.requires_grad for n, p in base.named_parameters()}
    with pytest.raises(InputError):
        attach(base, registry.available()[name](sites=()))  # type: ignore[arg-type, call-arg]
    assert {n: p.requires_grad for n, p in base.named_parameters()} == before


def test_a_control_that_is_no_tensor_is_named() -> None:
    tuned = attach(model(), LoRA(rank=2))  # type: ignore[arg-type]
    state: Any = dict.fromkeys(tuned.state(), "x")
    with pytest.raises(InputError, match="is none, expected a tensor"):
        tuned.load(state)
    with pytest.raises(InputError, match="unknown delta of this model"):
        tuned.train_only(3.0)  # type: ignore[arg-type]
