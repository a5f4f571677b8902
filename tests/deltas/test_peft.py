"""The same controls give the same model as the real peft library, in float32."""

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltas import LoRA, PrefixTuning, PromptTuning, attach
from tests.deltas.zoo import H, L, batch_of, d, move, out

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

Build = Callable[..., PreTrainedModel]


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-6 of the largest entry."""
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * scale)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Their warnings are not ours to keep."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("family", "kind", "sites"),
    [
        ("bert", "classification", ("query", "value", "intermediate.dense")),
        ("gpt2", "causal-lm", ("c_attn", "mlp.c_fc")),
        ("llama", "causal-lm", ("q_proj", "v_proj", "down_proj")),
    ],
)
def test_lora(build: Build, family, kind, sites, rslora):
    model = build(family, kind, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=list(sites), fan_in_fan_out=family == "gpt2",
        use_rslora=rslora,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    alpha = 7 * 4**0.5 if rslora else 7.0
    controlled = move(attach(model, LoRA(rank=4, alpha=alpha, sites=sites)))
    saved = peft.get_peft_model_state_dict(theirs)
    renamed = {
        f"base_model.model.{key.removeprefix('lora.')[:-1]}lora_{key[-1]}.weight": value
        for key, value in controlled.state().items()
    }
    assert renamed.keys() == saved.keys()
    peft.set_peft_model_state_dict(theirs, renamed)
    batch = batch_of(model)
    found = out(controlled, batch)
    controlled.detach()
    assert_equal(found, out(theirs, batch))
    assert float((found - out(model, batch)).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prompt(build, family):
    model = build(family, "causal-lm", dtype=torch.float32)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    controlled = move(attach(model, PromptTuning(length=3)))
    (rows,) = controlled.state().values()
    peft.set_peft_model_state_dict(theirs, {"prompt_embeddings": rows})
    batch = batch_of(model)
    assert_equal(out(controlled, batch), out(theirs, batch)[:, 3:])
    # Theirs also lets the last prompt row predict the first token; ours has no logits there.
    ours, labels = batch["input_ids"], batch["input_ids"].clone()
    labels[:, 0] = -100
    assert_equal(controlled(**batch, labels=ours).loss, theirs(**batch, labels=labels).loss)
    controlled.detach()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prefix(build, family):
    """Theirs is a cache, which also moves the text's positions by its length."""
    model = build(family, "causal-lm", dtype=torch.float32)
    heads = H if family == "gpt2" else H // 2
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    controlled = attach(model, PrefixTuning(length=3, init_std=1.0))
    state = list(controlled.state().items())
    assert [k.rpartition(".")[2] for k, _ in state] == ["keys", "values"] * L
    rows = torch.stack([value.transpose(0, 1) for _, value in state], dim=1)
    assert rows.shape == (3, 2 * L, heads, d // H)
    peft.set_peft_model_state_dict(theirs, {"prompt_embeddings": rows.flatten(1)})
    batch = batch_of(model)
    positions = torch.arange(3, 10)[None]
    found = out(controlled, batch, position_ids=positions)
    assert_equal(found, out(theirs, batch))
    controlled.detach()
    assert float((found - out(model, batch)).detach().abs().max()) > 1e-2
