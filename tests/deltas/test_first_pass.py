"""A delta that cannot act on a model, or changes nothing there, says so at its first pass."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    FunnelConfig,
    FunnelForSequenceClassification,
    LongformerConfig,
    LongformerForSequenceClassification,
    SqueezeBertConfig,
    SqueezeBertForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from deltacontrol.deltas import LoRA, PromptTuning, attach, registry
from deltacontrol.theory.errors import InputError

TEXT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(4, 14)[None]


def squeezebert() -> torch.nn.Module:
    """Its encoder calls ``layer.forward``, which no hook sees."""
    config = SqueezeBertConfig(**TEXT, embedding_size=16, intermediate_size=32, q_groups=2,
                               k_groups=2, v_groups=2, intermediate_groups=2, output_groups=2)  # fmt: skip  # noqa: E501
    return SqueezeBertForSequenceClassification(config).eval()


def funnel() -> torch.nn.Module:
    """Its blocks lie in lists within a list."""
    config = FunnelConfig(vocab_size=64, block_sizes=[1, 2], d_model=16, n_head=2, d_head=8,
                          d_inner=32, num_decoder_layers=1)  # fmt: skip
    return FunnelForSequenceClassification(config).eval()


def swin() -> torch.nn.Module:
    """The widths of its stages differ."""
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
                        window_size=2, num_labels=2)  # fmt: skip
    return SwinForImageClassification(config).eval()


def whisper() -> torch.nn.Module:
    """Its encoder reads sound, and no embedded tokens."""
    config = WhisperConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1,
                           encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
                           decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=20,
                           pad_token_id=0, bos_token_id=1, eos_token_id=2,
                           decoder_start_token_id=1)  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def longformer() -> torch.nn.Module:
    """It pads to whole windows after the prompt has entered."""
    config = LongformerConfig(**TEXT, intermediate_size=32, attention_window=4,
                              max_position_embeddings=40)  # fmt: skip
    return LongformerForSequenceClassification(config).eval()


IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["loreft", "ladder", "state-based", "mixture-of-control"])
def test_a_delta_whose_modules_are_not_called_is_said(name: str) -> None:
    model = squeezebert()
    before = model(IDS).logits
    tuned = attach(model, registry.parse(name))
    with pytest.warns(UserWarning, match=f"{name} changed nothing in .*such as transformer.encod"):
        tuned(IDS)
    tuned.detach()
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    ("build", "name", "batch"),
    [
        (swin, "state-based", {"pixel_values": IMAGE}),
        (swin, "ladder", {"pixel_values": IMAGE}),
        (whisper, "prompt:length=2", {"input_features": SOUND, "decoder_input_ids": IDS}),
        (longformer, "prompt:length=2", {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}),
    ],
)
def test_a_delta_that_cannot_act_is_named(build, name: str, batch: dict) -> None:
    tuned = attach(build(), registry.parse(name))
    with pytest.raises(InputError, match=r"cannot act on this .* and with them torch says"):
        tuned(**batch)
    with tuned.disable():
        tuned(**batch)


@pytest.mark.parametrize("name", ["loreft", "state-based", "bitfit"])
def test_blocks_in_lists_of_lists_are_found(name: str) -> None:
    model = funnel()
    before = model(IDS).logits
    tuned = attach(model, registry.parse(name)).eval()
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(tuned(IDS).logits, before)


def test_a_fault_of_the_batch_stays_torchs_own() -> None:
    tuned = attach(squeezebert(), LoRA(rank=2, sites=("classifier",)))
    with pytest.raises((IndexError, RuntimeError)):
        tuned(torch.full((1, 3), 999))


def test_a_first_pass_without_the_deltas_is_not_theirs() -> None:
    tuned = attach(squeezebert(), registry.parse("loreft"))
    with tuned.disable():
        tuned(IDS)
    with pytest.warns(UserWarning, match="changed nothing"):
        tuned(IDS)


def test_the_passes_after_the_first_are_not_watched() -> None:
    config = LongformerConfig(**TEXT, intermediate_size=32, attention_window=4)
    tuned = attach(LongformerForSequenceClassification(config).eval(), LoRA(rank=2))
    tuned(IDS)
    assert tuned._has_acted
    assert attach(funnel(), PromptTuning(length=1))._has_acted is False


def test_an_error_of_the_users_own_code_stays_as_it_is() -> None:
    tuned = attach(funnel(), registry.parse("loreft"))

    def once(_module: torch.nn.Module, _args: tuple) -> None:
        handle.remove()
        raise RuntimeError("a hook of mine")

    handle = tuned.model.register_forward_pre_hook(once)
    with pytest.raises(RuntimeError, match="a hook of mine"):
        tuned(IDS)


def test_an_expert_that_no_token_calls_is_no_fault() -> None:
    model = squeezebert()
    tuned = attach(model, registry.parse("loreft"), LoRA(rank=2, sites=("classifier",)))
    with pytest.warns(UserWarning, match="loreft changed nothing"):
        first = tuned(IDS).logits
    assert torch.equal(tuned(IDS).logits, first)
