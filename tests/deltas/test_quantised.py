"""Controls beside frozen weights in 4 and 8 bits, and the refusal of what needs the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from deltacontrol.deltas import attach, registry
from deltacontrol.deltas.model import DeltaModel
from deltacontrol.deltas.quantised import is_quantised, values_of
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import METHODS, move

pytest.importorskip("bitsandbytes")

CONFIGS: dict[str, Any] = {
    "bert": BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=32, num_labels=3,
    ),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=32, num_labels=3, pad_token_id=0
    ),
    "llama": LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_labels=3, pad_token_id=0,
    ),
    "phi3": Phi3Config(  # fused maps of query, key and value and of both halves of the MLP
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_labels=3, pad_token_id=0,
    ),
}  # fmt: skip
HEADS = ["classifier", "score"]
BITS = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=HEADS,
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEADS),
}
# Methods that train or move the weights themselves.
NEED_WEIGHTS = {
    "diff-pruning", "fisher-mask", "full", "last-layers", "lottery-ticket", "random-mask", "said",
    "selected-modules", "subspace",
}  # fmt: skip
QUICK = (("llama", "int8"), ("phi3", "nf4"))
TOKENS = torch.arange(1, 22).reshape(3, 7)
LABELS = torch.tensor([0, 1, 2])

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in float32."""
    made = {}
    for family, config in CONFIGS.items():
        torch.manual_seed(0)
        made[family] = tmp_path_factory.mktemp(family)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(made[family])
    return made


def quantised(folder: Path, bits: str) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=BITS[bits], device_map="cpu"
    ).eval()


def maps(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    found = dict(model.named_modules())
    return {
        name: module
        for name, module in found.items()
        if hasattr(module, "weight")
        and isinstance(module.weight, torch.Tensor)
        and is_quantised(module.weight)
    }


@pytest.mark.parametrize("family", CONFIGS)
def test_four_bits_have_the_values_that_act(folders: dict[str, Path], family: str) -> None:
    model = quantised(folders[family], "nf4")
    assert len(maps(model)) >= 8
    for module in maps(model).values():
        weight = values_of(module, torch.float32)
        x = torch.randn(5, weight.shape[1])
        y = torch.nn.functional.linear(x, weight, module.bias)  # type: ignore[arg-type]
        torch.testing.assert_close(module(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_eight_bits_are_off_by_half_a_code_at_most(folders: dict[str, Path], family: str) -> None:
    given = AutoModelForSequenceClassification.from_pretrained(folders[family])
    model = quantised(folders[family], "int8")
    for when in ("as loaded", "after a pass"):
        for name, module in maps(model).items():
            plain = given.get_submodule(name)
            original = plain.weight.detach()
            values = values_of(module, torch.float32)
            original = original.T if isinstance(plain, Conv1D) else original
            scale = original.abs().amax(1, keepdim=True) / 127
            # The codes are taken of weights in float16.
            bound = 0.5 * scale + 2**-10 * original.abs().amax()
            assert ((values - original).abs() <= bound).all(), (name, when)
        model(input_ids=TOKENS)


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        pytest.param(family, bits, marks=() if (family, bits) in QUICK else pytest.mark.slow)
        for family in CONFIGS
        for bits in BITS
    ],
)
@pytest.mark.slow
def test_every_method_acts_beside_them_or_says_why_not(
    folders: dict[str, Path], family: str, bits: str
) -> None:
    model = quantised(folders[family], bits)
    base = model(input_ids=TOKENS).logits
    for name in registry.available():
        try:
            tuned = attach(model, METHODS[name][0], seed=0)
        except InputError as refusal:
            if "no bias" not in str(refusal):
                assert name in NEED_WEIGHTS and "quantised weights are frozen" in str(refusal), name
            continue
        assert name not in NEED_WEIGHTS, name
        if tuned.attachments[0].delta.identity_at_start:
            assert torch.equal(tuned(input_ids=TOKENS).logits, base), name
        tuned(input_ids=TOKENS, labels=LABELS).loss.backward()
        assert any(
            p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.trainable().values()
        ), name
        assert {p.dtype for p in tuned.controls.parameters()} == {torch.float32}, name
        own = {id(p) for p in tuned.controls.parameters()}
        assert not any(p.grad is not None and id(p) not in own for p in model.parameters()), name
        move(tuned)
        assert not torch.equal(tuned(input_ids=TOKENS).logits, base), name
        tuned.detach()
        assert torch.equal(model(input_ids=TOKENS).logits, base), name


def stepped(tuned: DeltaModel) -> list[float]:
    optimiser, losses = torch.optim.Adam(tuned.trainable().values(), lr=1e-2), []
    for _ in range(8):
        loss = tuned(input_ids=TOKENS, labels=LABELS).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return losses


@pytest.mark.parametrize("bits", BITS)
def test_lora_learns_and_is_given_back(folders: dict[str, Path], bits: str, tmp_path: Path) -> None:
    tuned = attach(quantised(folders["llama"], bits), registry.parse("lora:rank=4"))
    losses = stepped(tuned)
    assert losses[-1] < 0.7 * losses[0]
    tuned.save(tmp_path / "saved")
    from deltacontrol.deltas import load

    again = load(quantised(folders["llama"], bits), tmp_path / "saved")
    with torch.no_grad():
        expected = tuned(input_ids=TOKENS).logits
        torch.testing.assert_close(again(input_ids=TOKENS).logits, expected, rtol=0, atol=0)


def dequantised(folder: Path) -> PreTrainedModel:
    """The model of 4 bits with the values of its weights in float32."""
    plain = quantised(folder, "nf4")
    for path, module in maps(plain).items():
        weight = values_of(module, torch.float32)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = torch.nn.Parameter(weight)
        parent, _, leaf = path.rpartition(".")
        setattr(plain.get_submodule(parent), leaf, linear)
    assert not any(map(is_quantised, plain.parameters()))
    return plain


@pytest.mark.parametrize("name", ["lora:rank=2", "lora:rank=2,init=svd", "dora:rank=2", "ia3"])
def test_four_bits_are_their_values_for_a_control(folders: dict[str, Path], name: str) -> None:
    """The same controls beside the dequantised weights in float32 give the same logits."""
    model, plain = quantised(folders["llama"], "nf4"), dequantised(folders["llama"])
    tuned, other = attach(model, registry.parse(name)), attach(plain, registry.parse(name))
    move(tuned)
    other.load(tuned.state())
    torch.testing.assert_close(
        tuned(input_ids=TOKENS).logits, other(input_ids=TOKENS).logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("init", ["eva", "corda-ipm", "corda-kpm", "lora-ga", "lora-one"])
def test_starts_from_data_need_values_not_trainable_weights(folders: dict[str, Path], init) -> None:
    """Beside 4-bit weights they are those beside the same values in float32."""
    found = []
    for model in (quantised(folders["llama"], "nf4"), dequantised(folders["llama"])):
        tuned = attach(model, registry.parse(f"lora:rank=1,init={init}"))
        tuned.prepare(lambda tuned=tuned: iter([tuned(input_ids=TOKENS).logits.square().mean()]))
        found.append({k: v.float() for k, v in tuned.state().items()})
    for name in (k.removesuffix(".A") for k in found[0] if k.endswith(".A")):
        one, other = ((f[f"{name}.B"] @ f[f"{name}.A"]).abs() for f in found)
        if init == "eva":
            one, other = ((f[f"{name}.A"]).abs() for f in found)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.max()))


def test_merging_is_refused_and_changes_nothing(folders: dict[str, Path]) -> None:
    tuned = attach(quantised(folders["llama"], "nf4"), registry.parse("lora:rank=2"))
    move(tuned)
    before = tuned(input_ids=TOKENS).logits
    with pytest.raises(InputError, match="lora cannot be merged into .*quantised weights are froz"):
        tuned.merge()
    assert torch.equal(tuned(input_ids=TOKENS).logits, before)


def test_parameters_are_counted_not_their_bytes(folders: dict[str, Path]) -> None:
    whole = AutoModelForSequenceClassification.from_pretrained(folders["llama"])
    count = sum(p.numel() for p in whole.parameters())
    for bits in BITS:
        tuned = attach(quantised(folders["llama"], bits), registry.parse("lora:rank=2"))
        assert tuned.num_total == count
