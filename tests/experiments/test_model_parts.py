"""Parts, heads, paddings and prompts of a model's folder that do not belong together are said."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from deltacontrol.deltas import PromptTuning
from deltacontrol.experiments import models
from deltacontrol.experiments.models import fit
from deltacontrol.theory.errors import InputError
from tests import tiny_model
from tests.experiments.model_folders import copied, edit, named


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_model.write(tmp_path_factory.mktemp("fit"))


@pytest.mark.parametrize("entry", ["attention_bias", "mlp_bias"])
def test_a_part_that_config_json_switches_off_is_named(tiny, tmp_path: Path, entry: str) -> None:
    """The weights have it, so that without it the model would be another one, in silence."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, **{entry: True},
    )  # fmt: skip
    folder = copied(tiny, tmp_path)
    LlamaForCausalLM(config).save_pretrained(folder)
    models.load(str(folder), kind="causal-lm")
    edit(folder, **{entry: False})
    with pytest.raises(
        InputError, match=r"for which its config.json has no place.*layers\.0\..*bi"
    ):
        models.load(str(folder), kind="causal-lm")


def test_a_model_of_another_type_is_named_by_its_norms(tiny, tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, intermediate_size=32,
    )  # fmt: skip
    folder = copied(tiny, tmp_path)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    edit(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(InputError, match=r"self_attn\.k_norm\.weight"):
        models.load(str(folder), kind="causal-lm")


@pytest.mark.parametrize("leaf", ["attn.bias", "attn.masked_bias", "attn.rotary.inv_freq"])
def test_computed_tables_may_be_left_over(tiny, tmp_path: Path, leaf: str) -> None:
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    folder = copied(tiny, tmp_path)
    GPT2LMHeadModel(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights[f"transformer.h.0.{leaf}"] = torch.ones(1, 1, 4, 4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    models.load(str(folder), kind="causal-lm")


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        ("multi_label_classification", "a head for multi label classification"),
        ("regression", "a head for regression"),
        ("single_label_classification", ""),
    ],
)
def test_a_head_that_was_trained_for_something_else_is_said(
    tiny, tmp_path: Path, goal: str, said: str
) -> None:
    folder = copied(tiny, tmp_path)
    named(folder, ["yes", "no"])
    edit(folder, problem_type=goal)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model, _ = models.load(str(folder), kind="classification", num_labels=2)
    assert model.other_head.startswith(said) and bool(model.other_head) == bool(said)
    assert any(said in str(w.message) for w in told) or not said


def test_an_encoder_counts_positions_from_its_own_padding(tiny, tmp_path: Path) -> None:
    """RoBERTa counts from config.pad_token_id, whatever token its tokenizer pads with."""
    config = RobertaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=34, pad_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    folder = copied(tiny, tmp_path)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    model, tokenizer = models.load(str(folder), kind="classification", num_labels=2)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 1
    ids = torch.tensor([[2, 5, 6, 7]])
    own = RobertaForSequenceClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(model(ids).logits, own(ids).logits, rtol=0, atol=1e-6)


def test_a_padding_token_beyond_the_embedding_is_named_with_both_sizes(tiny, tmp_path) -> None:
    folder = copied(tiny, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<other pad>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=rf"gives the token {rows}, but its embedding has {rows} "):
        models.load(str(folder), kind="classification", num_labels=2)


@pytest.mark.parametrize("taken", [9, 16, 40])
def test_a_prompt_that_leaves_no_text_is_what_should_be_shorter(tiny, taken: int) -> None:
    model, _ = models.load(tiny["model"], kind="classification", num_labels=2)
    with pytest.raises(InputError, match="choose shorter prompts$"):
        fit.require_positions(model, "it", 8, [PromptTuning(length=taken)])


@pytest.mark.parametrize("architectures", [True, [], [3], "Bert", None])
def test_names_of_architectures_of_another_kind_tell_nothing(tiny, tmp_path, architectures) -> None:
    folder = copied(tiny, tmp_path)
    named(folder, ["yes", "no"])
    edit(folder, architectures=architectures)
    try:
        model, _ = models.load(str(folder), kind="classification", num_labels=2)
    except InputError:  # where transformers itself refuses the entry
        return
    assert model.other_head == ""
