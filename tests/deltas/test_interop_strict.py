"""What does not fit is refused, all of it listed, and the model is left as it was."""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from deltacontrol.deltas import LoRA, attach
from deltacontrol.deltas.interop import import_peft
from deltacontrol.theory.errors import InputError
from tests.deltas.peft_models import peft, save
from tests.deltas.zoo import assert_same, snapshot

Build = Callable[..., PreTrainedModel]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sound adapters for the small BERT."""
    from tests.deltas import zoo

    model = zoo.build("bert", dtype=torch.float32)
    folder = tmp_path_factory.mktemp("adapters")
    both = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    rows = {"num_virtual_tokens": 3, "task_type": "SEQ_CLS"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configs = {
            "lora": peft.LoraConfig(r=4, rank_pattern={"value": 2}, **both),
            "all": peft.LoraConfig(r=4, bias="all", **both),
            "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, **both),
            "ia3": peft.IA3Config(feedforward_modules=["value"], **both),
            "vera": peft.VeraConfig(r=4, **both),
            "loha": peft.LoHaConfig(r=4, **both),
            "prompt": peft.PromptTuningConfig(**rows),
            "prefix": peft.PrefixTuningConfig(**rows),
        }
    for name, config in configs.items():
        save(model, config, folder / name)
    return {name: folder / name for name in configs}


@pytest.fixture
def refused(build: Build, adapters: dict[str, Path], tmp_path: Path) -> Iterator[Callable]:
    """Changes an adapter, and expects a message with all of the parts."""

    def check(
        name: str,
        *parts: str,
        fields: dict[str, Any] | None = None,
        tensors: Callable[[dict[str, torch.Tensor]], object] | None = None,
        family: str = "bert",
        kind: str = "classification",
        **changes: Any,
    ) -> str:
        folder = shutil.copytree(adapters[name], tmp_path / name)
        config = json.loads((folder / CONFIG).read_text())
        config.update(fields or {})
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v != "DROP"}))
        values = load_file(folder / WEIGHTS)
        if tensors is not None:
            tensors(values)
            save_file(values, folder / WEIGHTS)
        model = build(family, kind, dtype=torch.float32, **changes)
        before = snapshot(model)
        with pytest.raises(InputError) as caught:
            import_peft(folder, model)
        message = str(caught.value)
        for part in parts:
            assert part in message, message
        assert_same(before, snapshot(model))
        return message

    yield check


def test_every_adapter_is_sound_before_it_is_spoilt(build: Build, adapters):
    for path in adapters.values():
        import_peft(path, build("bert", dtype=torch.float32)).detach()


@pytest.mark.parametrize(
    ("name", "fields", "parts"),
    [
        ("lora", {"peft_type": "DROP"}, ("peft_type None", "LOHA, LOKR, LORA")),
        ("lora", {"peft_type": "LOORA"}, ("unknown peft_type 'LOORA'", "nearest: LORA")),
        ("lora", {"lora_alhpa": 3, "rank": 2}, ("unknown field lora_alhpa = 3", "field rank = 2")),
        ("lora", {"r": 0}, ("r is 0, expected a positive integer",)),
        ("lora", {"r": "4", "bias": "some"}, ("r is '4'", "bias is 'some'", "'lora_only'")),
        ("lora", {"lora_alpha": True}, ("lora_alpha is True, expected a number",)),
        ("lora", {"rank_pattern": {"value": 2.5}}, ("rank_pattern", "object of positive integers")),
        ("lora", {"rank_pattern": {"valeu": 2}}, ("the patterns ['valeu'] match no targeted",)),
        ("lora", {"rank_pattern": {"val(": 2}}, ("not a regular expression",)),
        ("lora", {"target_modules": ["query", "valeu"]}, ("target_modules ['valeu'] match no",)),
        ("lora", {"target_modules": None}, ("target_modules is empty", "its own default")),
        ("lora", {"target_modules": "query("}, ("'query('", "not a regular expression")),
        ("lora", {"layers_to_transform": [1, 7]}, ("layers_to_transform holds [7]",)),
        ("lora", {"exclude_modules": ["query", "value"]}, ("leave no module",)),
        ("lora", {"modules_to_save": ["classifer"]}, ("['classifer'] match no module",)),
        ("lora", {"modules_to_save": ["bert", "pooler"]}, ("lie in others",)),
        ("lora", {"init_lora_weights": "pissa"}, ("'pissa'", "path_initial_model_for_weight")),
        ("lora", {"lora_bias": True, "layer_replication": [[0, 1]]}, ("lora_bias", "layer_repl")),
        ("lora", {"trainable_token_indices": [3]}, ("trainable_token_indices is [3]",)),
        ("lora", {"target_parameters": ["x"]}, ("target_parameters is ['x']",)),
        ("lora", {"use_dora": True}, ("missing", f"{QUERY}.lora_magnitude_vector")),
        ("lora", {"r": 3}, (f"{QUERY}.lora_A.weight has shape (4, 32), expected (3, 32)",)),
        ("lora", {"bias": "lora_only"}, (f"missing {QUERY}.base_layer.bias",)),
        ("all", {"bias": "none"}, ("unknown base_model.model.bert.pooler.dense.bias",)),
        ("adalora", {"rank_pattern": {"x.lora_E": [True]}}, ("x.lora_E is no targeted module",)),
        ("adalora", {"use_rslora": True}, ("use_rslora is True",)),
        ("ia3", {"feedforward_modules": ["key"]}, ("['key'] are not in target_modules",)),
        ("ia3", {"feedforward_modules": []}, ("value.ia3_l has shape (1, 32), expected (32, 1)",)),
        ("vera", {"projection_prng_key": 1}, ("base_model.vera_A is not what", "vera_B is not")),
        ("vera", {"exclude_modules": ["key"]}, ("unknown field exclude_modules",)),
        ("loha", {"rank_dropout": 0.1}, ("rank_dropout is 0.1", "while training")),
        ("prompt", {"num_virtual_tokens": 4}, ("has shape (3, 32), expected (4, 32)",)),
        ("prompt", {"task_type": None}, ("task_type is None", "is for SEQ_CLS")),
        ("prompt", {"num_transformer_submodules": 2}, ("num_transformer_submodules is 2",)),
        ("prompt", {"token_dim": 16}, ("token_dim is 16, this model has 32",)),
        ("prefix", {"num_layers": 3, "num_attention_heads": 2}, ("num_layers is 3", "heads is 2")),
    ],
)  # fmt: skip
def test_fields(refused, name, fields, parts):
    refused(name, *parts, fields=fields)


@pytest.mark.parametrize("value", [None, False, {}, []])
def test_a_field_of_another_version_that_is_off_is_passed_over(
    build: Build, adapters, tmp_path: Path, value: object
) -> None:
    folder = Path(shutil.copytree(adapters["lora"], tmp_path / "later"))
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"enable_lora": value}))
    with pytest.warns(UserWarning, match="switched off and change nothing: enable_lora"):
        import_peft(folder, build("bert", dtype=torch.float32)).detach()


@pytest.mark.parametrize("value", [0, True, "", "no", 0.0, [None]])
def test_another_value_of_an_unknown_field_is_refused(refused, value):
    refused("lora", f"unknown field enable_lora = {value!r}", fields={"enable_lora": value})


def test_tensors(refused):
    def spoil(values: dict[str, torch.Tensor]) -> None:
        values[f"{QUERY}.lora_a.weight"] = values.pop(f"{QUERY}.lora_A.weight")
        values[f"{QUERY}.lora_B.weight"] = values[f"{QUERY}.lora_B.weight"][:16].clone()
        del values["base_model.model.classifier.bias"]

    message = refused(
        "lora",
        f"missing {QUERY}.lora_A.weight",
        f"unknown {QUERY}.lora_a.weight",
        f"{QUERY}.lora_B.weight has shape (16, 4), expected (32, 4)",
        "missing base_model.model.classifier.bias",
        tensors=spoil,
    )
    assert message.count("\n  ") == 4, "all are listed, and nothing else"


def test_copies_must_agree(refused):
    def spoil(values: dict[str, torch.Tensor]) -> None:
        values["base_model.model.classifier.modules_to_save.bias"] += 1

    refused("all", "classifier.modules_to_save.bias differs from", tensors=spoil)


def test_a_resized_embedding_is_seen(refused):
    def spoil(values: dict[str, torch.Tensor]) -> None:
        key = "base_model.model.bert.embeddings.word_embeddings.weight"
        values[key] = torch.zeros(101, 32)

    refused("lora", "has 101 tokens", "call model.resize_token_embeddings(101)", tensors=spoil)


def test_infinite_values_are_refused(refused):
    def spoil(values: dict[str, torch.Tensor]) -> None:
        values[f"{QUERY}.lora_A.weight"][0, 0] = float("nan")

    refused("lora", "not finite", f"{QUERY}.lora_A.weight", tensors=spoil)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lora", (f"{QUERY}.lora_A.weight has shape (4, 32), expected (4, 64)",)),
        ("ia3", (f"{QUERY}.ia3_l has shape (32, 1), expected (64, 1)",)),
        ("prompt", ("token_dim is 32, this model has 64",)),
        ("prefix", ("token_dim is 32, this model has 64",)),
    ],
)
def test_weights_for_another_width(refused, name, parts):
    refused(name, *parts, hidden_size=64)


def test_an_adapter_for_another_model(refused):
    refused("lora", "target_modules", "match no module of GPT2For", family="gpt2")


def test_an_adapter_for_another_head(refused):
    refused("lora", "unknown base_model.model.classifier.weight", kind="backbone")


def test_a_model_with_deltas(build: Build, adapters):
    controlled = attach(build("bert", dtype=torch.float32), LoRA(rank=2))
    with pytest.raises(InputError, match="has deltas already"):
        import_peft(adapters["lora"], controlled.model)
    controlled.detach()


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda f: (f / CONFIG).unlink(), "holds no adapter_config.json; give the folder"),
        (_write(CONFIG, "{"), "not readable as JSON"),
        (_write(CONFIG, "[1]"), "holds a list; expected an object"),
        (lambda f: (f / WEIGHTS).unlink(), "holds no adapter_model.safetensors; copy it"),
        (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "is a pickle.*never read"),
        (_write(WEIGHTS, "nonsense"), "adapter_model.safetensors is damaged"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "is damaged"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{}"), "not readable as JSON"),
    ],
)
def test_files(build: Build, adapters, tmp_path, spoil, parts):
    folder = shutil.copytree(adapters["lora"], tmp_path / "a")
    spoil(folder)
    with pytest.raises(InputError, match=parts):
        import_peft(folder, build("bert", dtype=torch.float32))


def test_names_the_folders_inside(build: Build, adapters, tmp_path):
    shutil.copytree(adapters["lora"], tmp_path / "mine")
    with pytest.raises(InputError, match=re.escape("its sub-folders mine do")):
        import_peft(tmp_path, build("bert", dtype=torch.float32))
    with pytest.raises(InputError, match="holds no adapter_config.json"):
        import_peft(tmp_path / "absent", build("bert", dtype=torch.float32))
