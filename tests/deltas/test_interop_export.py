"""Deltas of ours as peft loads them: what it has no word for is rewritten exactly, or refused."""

import json
import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from deltacontrol.deltas import (
    IA3,
    AdaLoRA,
    BitFit,
    DoRA,
    FullFineTuning,
    HeadTuning,
    HoulsbyAdapter,
    IntrinsicPrompt,
    LayerNormTuning,
    LoHa,
    LoKr,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    SelectedModules,
    Subspace,
    VeRA,
    attach,
)
from deltacontrol.deltas.interop import export_peft, import_peft
from deltacontrol.theory.errors import InputError
from tests.deltas.peft_models import logits, same
from tests.deltas.zoo import assert_same, batch_of, move, out, snapshot

Build = Callable[..., PreTrainedModel]

CLS, LM, BASE = "classification", "causal-lm", "backbone"
KEY, QUERY, VALUE = "attention.key", "attention.query", "attention.value"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Their warnings are not ours to keep."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def drop_ranks(controlled) -> None:
    """As an allocation that left some of the ranks."""
    for i, (name, buffer) in enumerate(controlled.controls.named_buffers()):
        if name.endswith("mask"):
            buffer[i % len(buffer)] = False


EXPORTS = [
    ("slices", "gpt2", LM, (LoRA(rank=3), BitFit(sites=("c_attn",)))),
    ("slices-of-heads", "gpt_neox", LM, (LoRA(rank=3),)),
    ("two-at-a-site", "bert", CLS, (LoRA(rank=2, alpha=5), LoRA(rank=3, sites=(QUERY, "mlp.up")))),
    ("rslora", "bert", CLS, (LoRA(rank=3, scaling="rslora"), HeadTuning())),
    ("modules-alone", "bert", CLS, (SelectedModules(sites=("mlp.up",)), HeadTuning())),
    ("vision", "vit", CLS, (LoRA(rank=2), HeadTuning())),
    ("tied-biases", "bert", "masked-lm", (LoRA(rank=2), BitFit(sites=(".*",)))),
    ("two-scalings", "bert", CLS, (
        LoRA(rank=3, scaling="rslora", sites=(QUERY,)), LoRA(rank=2, sites=(VALUE,)))),
    ("svd", "bert", CLS, (LoRA(rank=3, init="svd"),)),
    ("svd-slices", "gpt2", LM, (LoRA(rank=3, init="svd", sites=(QUERY, "mlp.up")),)),
    ("one-block", "llama", LM, (LoRA(rank=3, layers=(1,)),)),
    ("embedding", "bert", CLS, (LoRA(rank=3, sites=("embedding", KEY)), HeadTuning(), BitFit())),
    ("lora-norms", "bert", CLS, (LoRA(rank=3), LayerNormTuning())),
    ("lora-modules", "bert", CLS, (LoRA(rank=3), SelectedModules(sites=("mlp.up",)))),
    ("dora-slices", "gpt2", LM, (DoRA(rank=3, sites=(QUERY, "mlp.up")),)),
    ("adalora", "gpt2", LM, (AdaLoRA(rank=4, target_rank=2),)),
    ("adalora-grouped", "llama", LM, (AdaLoRA(rank=4, target_rank=2), )),
    ("ia3", "bert", CLS, (IA3(), HeadTuning())),
    ("ia3-slices", "gpt2", LM, (IA3(),)),
    ("ia3-twice", "t5", CLS, (IA3(), IA3(sites=(KEY,), input_sites=()))),
    ("vera", "llama", LM, (VeRA(rank=7, sites=(QUERY, VALUE, "mlp.down")),)),
    ("vera-bias", "bert", CLS, (VeRA(rank=7), BitFit(sites=(QUERY,)))),
    ("loha", "bert", CLS, (LoHa(rank=3), LoHa(rank=2, alpha=3, sites=("mlp.up",)))),
    ("lokr", "bert", CLS, (LoKr(rank=2, factor=4, decompose_both=True),)),
    ("norms", "gpt2", LM, (LayerNormTuning(layers=(0,)),)),
    ("norms-head", "bert", CLS, (LayerNormTuning(), HeadTuning())),
    ("prompt", "gpt2", LM, (PromptTuning(length=3),)),
    ("prompt-subspace", "gpt2", LM, (IntrinsicPrompt(length=3, dimension=4),)),
    ("prompt-kept", "bert", CLS, (PromptTuning(length=3, strip=False), HeadTuning())),
    ("two-prompts", "llama", LM, (PromptTuning(length=2), PromptTuning(length=3))),
    ("prompt-encoder", "t5", CLS, (PromptTuning(length=3, strip=False),)),
    ("p-tuning", "bert", CLS, (PTuning(length=3, hidden=6, encoder="lstm", strip=False),)),
    ("prefix", "llama", LM, (PrefixTuning(length=3, init_std=1.0, shift=True),)),
    ("two-prefixes", "gpt2", LM, (
        PrefixTuning(length=3, shift=True), PrefixTuning(length=2, shift=True))),
    ("prefix-mlp", "bert", CLS, (PrefixTuning(length=3, projection=6, shift=True), HeadTuning())),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "kind", "deltas"), [pytest.param(*e[1:], id=f"{e[0]}-{e[1]}") for e in EXPORTS]
)
@pytest.mark.one_in(3)
def test_peft_computes_the_same(build: Build, tmp_path, family, kind, deltas):
    model = build(family, kind, dtype=torch.float32)
    batch = batch_of(model)
    controlled = move(attach(model, *deltas), scale=0.1)
    drop_ranks(controlled)
    with torch.no_grad():
        ours = out(controlled, batch)
    export_peft(controlled, tmp_path / "a")
    controlled.detach()
    theirs = logits(model, tmp_path / "a", batch)
    same(theirs[:, -ours.shape[1] :], ours)
    if ours.shape == out(model, batch).shape:
        assert float((ours - out(model, batch)).detach().abs().max()) > 1e-3, "it has no effect"
    again = import_peft(tmp_path / "a", model)
    with torch.no_grad():
        same(out(again, batch), ours)
    again.detach()


def test_writes_what_a_reader_expects(build: Build, tmp_path):
    """Short names, one rank with exceptions, whole numbers, no task where no head is trained."""
    model = build("bert", dtype=torch.float32)
    controlled = attach(model, LoRA(rank=3, sites=(QUERY, VALUE)), LoRA(rank=2, sites=("mlp.up",)))
    export_peft(controlled, tmp_path / "a", base_model="some/bert")
    controlled.detach()
    text = (tmp_path / "a" / "adapter_config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True)
    expected = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": "some/bert", "r": 3,
        "target_modules": ["intermediate.dense", "query", "value"], "lora_alpha": 16,
        "bias": "none", "use_rslora": False, "use_dora": False, "modules_to_save": None,
        "inference_mode": True, "alpha_pattern": {}, "fan_in_fan_out": False,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert [re.sub(r"\W", "", key) for key in config["rank_pattern"]] == [
        f"bertencoderlayer{i}intermediatedense" for i in (0, 1)
    ]
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 3 * 2
    assert all(key.startswith("base_model.model.bert.encoder.layer.") for key in tensors)


@pytest.mark.parametrize(
    ("family", "kind", "deltas", "parts"),
    [
        ("bert", CLS, (HoulsbyAdapter(),), ("no format for houlsby", "lora")),
        ("bert", CLS, (FullFineTuning(),), ("no format for full",)),
        ("bert", CLS, (Subspace(dimension=3),), ("no format for subspace",)),
        ("bert", CLS, (BitFit(), HeadTuning()), ("BEFT acts at Linear modules", "LayerNorm")),
        ("bert", CLS, (LoRA(), IA3()), ("one method", "ia3 and lora")),
        ("bert", CLS, (LoRA(), DoRA(sites=("mlp.up",))), ("use_dora is for all",)),
        ("bert", CLS, (LoRA(dropout=0.1), LoRA(sites=("mlp.up",))), ("dropout 0.1 and 0.0",)),
        ("bert", CLS, (DoRA(rank=2), DoRA(rank=3)), ("two dora act at", "query")),
        ("bert", CLS, (IA3(), BitFit()), ("IA3 has no field for trained biases",)),
        ("bert", CLS, (IA3(), IA3(sites=("mlp.down",), input_sites=())), ("input and the output",)),
        ("bert", CLS, (VeRA(rank=3), VeRA(rank=4)), ("one vera",)),
        ("gpt2", LM, (VeRA(rank=3),), ("slice of", "c_attn", "sites=c_attn")),
        ("gpt2", LM, (LoHa(rank=3, sites=("c_attn",)),), ("Linear modules alone", "Conv1D")),
        ("gpt2", LM, (LoKr(rank=3),), ("slice of", "sites=c_attn")),
        ("bert", CLS, (LoHa(rank=3), LoHa(rank=2)), ("two loha act at",)),
        ("bert", CLS, (LoRA(), SelectedModules(sites=("query",))), ("other modules", "self.query")),
        ("bert", CLS, (PromptTuning(length=2),), ("strip=false", "first position")),
        ("gpt2", CLS, (PromptTuning(length=2, strip=False),), ("last token", "strip=true")),
        ("bert", "masked-lm", (PromptTuning(length=2),), ("no task_type for BertForMaskedLM",)),
        ("bert", CLS, (PrefixTuning(length=2),), ("shift=true", "cache")),
        ("bert", CLS, (PrefixTuning(layers=(1,), shift=True),), ("leaves out", "layer.0")),
        ("gemma3", LM, (PrefixTuning(length=2, shift=True),), ("sliding window", "out of sight")),
    ],
)  # fmt: skip
def test_refuses_what_peft_cannot_hold(build: Build, tmp_path, family, kind, deltas, parts):
    model = build(family, kind, dtype=torch.float32)
    before = snapshot(model)
    controlled = move(attach(model, *deltas))
    pattern = "".join(f"(?=.*{re.escape(part)})" for part in parts)
    with pytest.raises(InputError, match=pattern):
        export_peft(controlled, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    controlled.detach()
    assert_same(before, snapshot(model))


def test_overwrites_no_adapter(build: Build, tmp_path):
    controlled = attach(build("bert", dtype=torch.float32), LoRA(rank=2))
    export_peft(controlled, tmp_path / "a")
    with pytest.raises(InputError, match="holds adapter_config.json and adapter_model"):
        export_peft(controlled, tmp_path / "a")
    controlled.detach()


def test_positions_behind_a_prefix_end_where_the_model_ends(build: Build):
    model = build("bert", dtype=torch.float32)
    controlled = attach(model, PrefixTuning(length=36, shift=True))
    with pytest.raises(InputError, match="prefix and text come to 43 positions.*has 40"):
        controlled(**batch_of(model))
    controlled.detach()
    before = snapshot(build("t5"))
    with pytest.raises(InputError, match="where positions enter t5 is not known"):
        attach(build("t5"), PrefixTuning(length=2, shift=True))
    assert_same(before, snapshot(build("t5")))
