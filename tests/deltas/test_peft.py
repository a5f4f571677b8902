"""The same controls give the same model as the real peft library, in float32."""

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltacontrol.deltas import (
    AdaLoRA,
    Delta,
    DoRA,
    LayerNormTuning,
    LoHa,
    LoKr,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    VeRA,
    attach,
)
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
    """In float64: the rounding of float32 would hide what controls of this size change."""
    model = build(family, kind)
    config = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=list(sites), fan_in_fan_out=family == "gpt2",
        use_rslora=rslora,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    scaling = "rslora" if rslora else "standard"
    controlled = move(attach(model, LoRA(rank=4, alpha=7.0, sites=sites, scaling=scaling)))
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
    expected = out(theirs, batch)
    assert_equal(found, expected)
    if family != "llama":  # computes its norms in float32 always
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
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


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning(build, encoder):
    """With the same encoder, which theirs keeps while training, and drops on saving."""
    model = build("gpt2", "causal-lm", dtype=torch.float32)
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=5,
        encoder_reparameterization_type=encoder.upper(),
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    controlled = move(attach(model, PTuning(length=3, encoder=encoder, hidden=5)), scale=1.0)
    u = {k.partition("wte.")[2]: v for k, v in controlled.state().items()}
    head = "encoder." if encoder == "mlp" else "encoder.2."
    maps = len([k for k in u if k.startswith(f"{head}weights")])
    saved = {"embedding.weight": u["rows"]}
    for i in range(maps):
        saved[f"mlp_head.{2 * i}.weight"] = u[f"{head}weights.{i}"]
        saved[f"mlp_head.{2 * i}.bias"] = u[f"{head}biases.{i}"]
    for layer in range(2 if encoder == "lstm" else 0):
        for k, end in enumerate((f"l{layer}", f"l{layer}_reverse")):
            saved[f"lstm_head.weight_ih_{end}"] = u[f"encoder.{layer}.W"][k]
            saved[f"lstm_head.weight_hh_{end}"] = u[f"encoder.{layer}.R"][k]
            saved[f"lstm_head.bias_ih_{end}"] = u[f"encoder.{layer}.b"][k]
            saved[f"lstm_head.bias_hh_{end}"] = torch.zeros_like(u[f"encoder.{layer}.b"][k])
    theirs.prompt_encoder["default"].load_state_dict(saved)
    batch = batch_of(model)
    found = out(controlled, batch)
    assert_equal(found, out(theirs, batch)[:, 3:])
    controlled.detach()
    assert float((found - out(model, batch)).detach().abs().max()) > 1e-2


def test_a_projected_prefix(build):
    """With the same MLP, which theirs keeps while training, and drops on saving."""
    model = build("gpt2", "causal-lm", dtype=torch.float32)
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    delta = PrefixTuning(length=3, init_std=1.0, projection=5, shift=True)
    controlled = move(attach(model, delta))
    u = {k.removeprefix("prefix."): v for k, v in controlled.state().items()}
    layers = [f"transformer.h.{i}.attn" for i in range(L)]
    theirs.prompt_encoder["default"].load_state_dict(
        {
            "embedding.weight": u["rows.rows"],
            "transform.0.weight": u["rows.weight"],
            "transform.0.bias": u["rows.bias"],
            "transform.2.weight": torch.cat([u[f"{layer}.weight"] for layer in layers]),
            "transform.2.bias": torch.cat([u[f"{layer}.bias"] for layer in layers]),
        }
    )
    batch = batch_of(model)
    found = out(controlled, batch)
    assert_equal(found, out(theirs, batch))
    controlled.detach()
    assert float((found - out(model, batch)).detach().abs().max()) > 1e-2


SITES = {
    "bert": ("query", "value", "intermediate.dense"),
    "gpt2": ("c_attn", "mlp.c_fc"),
    "llama": ("q_proj", "v_proj", "down_proj"),
}
NORMS = {
    "bert": ("LayerNorm",),
    "gpt2": ("ln_1", "ln_2", "ln_f"),
    "llama": ("input_layernorm", "post_attention_layernorm", "norm"),
}
# Our method, theirs, and how the tensors of a site are called there.
Pair = tuple[Delta, "peft.PeftConfig", dict[str, str]]


def low_rank_pairs(family: str) -> dict[str, Pair]:
    sites = SITES[family]
    common = {"target_modules": list(sites)}
    fan = {"fan_in_fan_out": family == "gpt2"}
    ranks = 4 / (4 + 1e-5)  # theirs guards against a rank of zero
    pairs: dict[str, Pair] = {
        "dora": (
            DoRA(rank=4, alpha=7.0, sites=sites),
            peft.LoraConfig(r=4, lora_alpha=7, use_dora=True, **common, **fan),
            {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"},
        ),
        "adalora": (
            AdaLoRA(rank=4, target_rank=2, alpha=7.0 * ranks, sites=sites),
            peft.AdaLoraConfig(
                init_r=4, target_r=2, lora_alpha=7, total_step=100, tfinal=10, **common, **fan
            ),
            {"Q": "lora_A", "P": "lora_B", "Lambda": "lora_E"},
        ),
        "vera": (
            VeRA(rank=6, sites=sites, projection_seed=3),
            peft.VeraConfig(r=6, projection_prng_key=3, save_projection=False, **common, **fan),
            {"b": "vera_lambda_b", "d": "vera_lambda_d"},
        ),
    }
    product = {"W_1.0": "lokr_w1", "W_2.0": "lokr_w2_a", "W_2.1": "lokr_w2_b"}
    both = {"W_1.0": "lokr_w1_a", "W_1.1": "lokr_w1_b", "W_2.0": "lokr_w2_a", "W_2.1": "lokr_w2_b"}
    return pairs | {
        "loha": (
            LoHa(rank=4, alpha=7.0, sites=sites),
            peft.LoHaConfig(r=4, alpha=7, **common),
            {"X_1": "hada_w1_a", "Y_1": "hada_w1_b", "X_2": "hada_w2_a", "Y_2": "hada_w2_b"},
        ),
        "lokr": (
            LoKr(rank=2, alpha=7.0, sites=sites),
            peft.LoKrConfig(r=2, alpha=7, **common),
            product,
        ),
        "lokr-full": (
            LoKr(rank=30, alpha=7.0, sites=sites),
            peft.LoKrConfig(r=30, alpha=7, **common),
            {"W_1.0": "lokr_w1", "W_2.0": "lokr_w2"},
        ),
        "lokr-both": (
            LoKr(rank=1, alpha=7.0, decompose_both=True, sites=sites),
            peft.LoKrConfig(r=1, alpha=7, decompose_both=True, **common),
            both,
        ),
        "lokr-factor": (
            LoKr(rank=2, alpha=7.0, factor=4, sites=sites),
            peft.LoKrConfig(r=2, alpha=7, decompose_factor=4, **common),
            product,
        ),
    }


LYCORIS = ("loha", "lokr", "lokr-full", "lokr-both", "lokr-factor")  # they do not know Conv1D


@pytest.mark.parametrize(
    ("family", "name"),
    [(f, n) for f in SITES for n in ("dora", "adalora", "vera", *LYCORIS)
     if (f, n) not in {("gpt2", lycoris) for lycoris in LYCORIS}],
)  # fmt: skip
def test_changes_of_weight(build, family, name):
    """The tensors of every site, copied into theirs, give the same logits."""
    model = build(
        family, "classification" if family == "bert" else "causal-lm", dtype=torch.float32
    )
    ours, config, names = low_rank_pairs(family)[name]
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    controlled = move(attach(model, ours), scale=0.1)
    saved = peft.get_peft_model_state_dict(theirs)
    renamed = {}
    for key, value in controlled.trainable().items():
        path = key.partition(".")[2]
        leaf = next(leaf for leaf in names if path.endswith("." + leaf))
        column = value[:, None] if leaf == "Lambda" else value
        path = path.removesuffix(leaf) + names[leaf]
        renamed[f"base_model.model.{path}"] = column.detach().clone()
    assert renamed.keys() == saved.keys()
    assert all(renamed[key].shape == saved[key].shape for key in saved)
    assert not peft.set_peft_model_state_dict(theirs, renamed).unexpected_keys
    batch = batch_of(model)
    found = out(controlled, batch)
    controlled.detach()
    assert_equal(found, out(theirs, batch))
    assert float((found - out(model, batch)).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("family", SITES)
def test_layer_norm(build, family):
    model = build(
        family, "classification" if family == "bert" else "causal-lm", dtype=torch.float32
    )
    config = peft.LNTuningConfig(target_modules=list(NORMS[family]))
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    controlled = move(attach(model, LayerNormTuning()))
    renamed = {}
    for key, value in controlled.trainable().items():
        path, _, leaf = key.partition(".")[2].rpartition(".")
        renamed[f"base_model.model.{path}.ln_tuning_layers.{leaf}"] = value.detach().clone()
    assert renamed.keys() == peft.get_peft_model_state_dict(theirs).keys()
    peft.set_peft_model_state_dict(theirs, renamed)
    batch = batch_of(model)
    found = out(controlled, batch)
    controlled.detach()
    assert_equal(found, out(theirs, batch))
    assert float((found - out(model, batch)).detach().abs().max()) > 1e-2


def test_the_pair_of_vera_is_theirs(build):
    """The same numbers from the same seed, so that nothing of it needs to be stored."""
    model = build("bert", dtype=torch.float32)
    _, config, _ = low_rank_pairs("bert")["vera"]
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    controlled = attach(model, VeRA(rank=6, sites=SITES["bert"], projection_seed=3))
    for name in ("A", "B"):
        pair = getattr(theirs.base_model, f"vera_{name}")["default"]
        assert torch.equal(controlled.controls.get_buffer(f"vera.shared.{name}"), pair)
    controlled.detach()
