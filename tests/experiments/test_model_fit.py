"""What a model's folder must have, and what must match the rows of a task, before any training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetModel,
)

from deltacontrol.experiments import models
from deltacontrol.experiments.models import fit
from deltacontrol.experiments.setting import Setting
from deltacontrol.theory.errors import InputError
from tests import tiny_model
from tests.experiments.model_folders import copied, edit, named


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_model.write(tmp_path_factory.mktemp("fit"))


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",), ("special_tokens_map.json",)])
def test_a_folder_without_a_tokenizer_is_refused(tiny, tmp_path: Path, kept: tuple) -> None:
    folder = copied(tiny, tmp_path)
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors", *kept):
            path.unlink()
    with pytest.raises(InputError, match="has no tokenizer|no fast tokenizer|could not be loaded"):
        models.load(str(folder), kind="classification", num_labels=3)


@pytest.mark.parametrize("layers", [1, 0])
def test_a_model_is_not_cut_short(tiny, tmp_path: Path, layers: int) -> None:
    folder = copied(tiny, tmp_path)
    if layers:
        edit(folder, num_hidden_layers=layers)
    else:  # more layers than the weights have
        edit(folder, num_hidden_layers=3)
    message = r"encoder.layer.1.*number of layers" if layers else r"encoder.layer.2"
    with pytest.raises(InputError, match=message):
        models.load(str(folder), kind="classification", num_labels=3)


def test_a_backbones_own_file_is_not_cut_short_either(tiny, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    edit(folder, num_hidden_layers=1)
    for kind in ("classification", "backbone"):
        with pytest.raises(InputError, match="weights that its config.json leaves out"):
            models.load(str(folder), kind=kind, num_labels=3 if kind != "backbone" else None)


def test_heads_of_other_tasks_may_be_left_over(tiny, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["cls.predictions.transform.dense.weight"] = torch.zeros(16, 16)
    weights["bert.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    models.load(str(folder), kind="classification", num_labels=2)


@pytest.mark.parametrize("method", ["magic", None])
def test_an_unknown_quantisation_is_refused(tiny, tmp_path: Path, method: str | None) -> None:
    folder = copied(tiny, tmp_path)
    edit(folder, quantization_config={"quant_method": method, "bits": 3})
    with pytest.raises(InputError, match="quantised by|could not be loaded"):
        models.load(str(folder), kind="classification", num_labels=3)


def test_classes_are_matched_by_name(tiny, tmp_path: Path) -> None:
    """The task sorts them no, so, yes; the head has YES, no, so."""
    folder = copied(tiny, tmp_path)
    named(folder, ["YES", "no", "so"])
    setting = Setting(str(folder), tiny["task"], max_length=12, train_rows=30)
    assert setting.data.labels == ("no", "so", "yes")
    order = np.array([1, 2, 0])
    codes = setting.frame("train")["label"].to_numpy()
    assert (setting.split("train").labels == order[codes]).all()
    assert (setting.batch()["labels"].numpy() == order[codes]).all()


def test_a_head_that_was_trained_on_these_classes_keeps_its_accuracy(tiny, tmp_path: Path) -> None:
    """Trained with the model's numbers, it is as good when it is read by the task's."""
    folder = copied(tiny, tmp_path)
    named(folder, ["yes", "so", "no"])
    setting = Setting(str(folder), tiny["task"], max_length=12, head="fitted", dtype="float64")
    model, (_, tokenizer) = setting.base, setting._loaded
    batch = setting.batch("train")
    labels = batch.pop("labels")
    right = float((model(**batch).logits.argmax(1) == labels).float().mean())
    model.save_pretrained(folder / "trained")
    tokenizer.save_pretrained(folder / "trained")
    again = Setting(str(folder / "trained"), tiny["task"], max_length=12, dtype="float64")
    batch = again.batch("train")
    labels = batch.pop("labels")
    guessed = again.base(**batch).logits.argmax(1)
    assert float((guessed == labels).float().mean()) == right
    by_number = torch.tensor(again.frame("train")["label"].tolist())
    assert float((guessed == by_number).float().mean()) < right


@pytest.mark.parametrize("classes", [["yes", "no", "maybe"], ["yes", "no", "NO"]])
def test_classes_of_other_names_are_refused(tiny, tmp_path: Path, classes: list[str]) -> None:
    folder = copied(tiny, tmp_path)
    named(folder, classes)
    with pytest.raises(InputError, match="the head of .* tells the classes yes, no"):
        Setting(str(folder), tiny["task"], max_length=12).split("train")
    Setting(str(folder), tiny["task"], max_length=12, head="fitted").split(
        "train"
    )  # which is made anew
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    Setting(str(folder), tiny["task"], max_length=12).split(
        "train"
    )  # and so is one that is not there


def test_a_head_of_another_size_is_said(tiny, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    named(folder, ["a", "b", "c", "d", "e"])
    with pytest.warns(
        UserWarning, match=r"head of another size \(classifier.* \(5,\) there, \(3,\) needed"
    ):
        setting = Setting(str(folder), tiny["task"], max_length=12)
        setting.split("train")
    assert setting.class_order is None


@pytest.mark.parametrize(
    ("trained", "classes", "kind"),
    [
        (BertForTokenClassification, 3, "classification"),
        (BertForMultipleChoice, 1, "regression"),
    ],
)
def test_a_head_of_another_task_is_said_though_it_fits(
    tiny, tmp_path: Path, trained: type, classes: int, kind: str
) -> None:
    folder = copied(tiny, tmp_path)
    trained.from_pretrained(folder, num_labels=classes).save_pretrained(folder)
    with pytest.warns(UserWarning, match=rf"head of another task \({trained.__name__}\)"):
        models.load(str(folder), kind=kind, num_labels=classes)


def test_a_head_of_this_task_and_none_are_no_others(tiny, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    for _ in range(2):  # without a head, and with one of three classes
        model, _tokenizer = models.load(str(folder), kind="classification", num_labels=3)
        assert model.other_head == ""
        named(folder, ["a", "b", "c"])


@pytest.mark.parametrize("rows", [14, 10])
def test_tokens_beyond_the_embedding_are_refused(tiny, tmp_path: Path, rows: int) -> None:
    folder = copied(tiny, tmp_path)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=rf"gives the token 14, but its embedding has {rows} rows"):
        Setting(str(folder), tiny["task"], max_length=12).split("train")


def roberta(folder: Path, tiny: dict[str, str]) -> str:
    copied(tiny, folder)
    config = RobertaConfig(
        vocab_size=15, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=18, pad_token_id=1, num_labels=3,
    )  # fmt: skip
    (folder / "model" / "config.json").unlink()
    RobertaForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[UNK]"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return str(folder / "model")


def test_positions_are_those_that_text_can_have(tiny, tmp_path: Path) -> None:
    """RoBERTa has 18 rows of positions, and text begins at the third."""
    model = roberta(tmp_path, tiny)
    with pytest.raises(InputError, match=r"has 16 positions; choose max_length <= 16"):
        Setting(model, tiny["task"], max_length=17).split("train")
    Setting(model, tiny["task"], max_length=16).split("train")


@pytest.mark.parametrize(
    "delta", ["prompt:length=4", "p-tuning:length=4", "prefix:length=4,shift=true"]
)
def test_positions_that_deltas_take_are_counted(tiny, delta: str) -> None:
    name = delta.partition(":")[0]
    with pytest.raises(InputError, match=f"16 positions, of which {name} takes 4.*<= 12"):
        Setting(tiny["model"], tiny["task"], deltas=[delta], max_length=13).split("train")
    Setting(tiny["model"], tiny["task"], deltas=[delta], max_length=12).split("train")


def test_a_model_without_a_limit_has_none() -> None:
    from deltacontrol.deltas.editing.positions import usable_positions

    config = XLNetConfig(vocab_size=20, d_model=8, n_layer=1, n_head=2, d_inner=16)
    model = XLNetModel(config)
    assert usable_positions(model) is None
    fit.require_positions(model, "xlnet", 10**6)


def test_code_in_a_folder_never_runs(tiny, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import BertConfig as C, BertModel as M\n"
    )
    edit(folder, auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"}, model_type="evil")
    with pytest.raises(InputError, match="could not be loaded"):
        models.load(str(folder), kind="backbone")
    assert not mark.exists()


def test_the_table_of_the_task_is_left_as_it_is(tiny, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    named(folder, ["yes", "no", "so"])
    setting = Setting(str(folder), tiny["task"], max_length=12)
    before = setting.data.train.copy()
    setting.split("train")
    pd.testing.assert_frame_equal(setting.data.train, before)


@pytest.mark.parametrize(
    ("labels", "classes", "order"),
    [
        (["0", "1", "2"], ["bad", "fair", "good"], None),  # the model's numbers
        (["A", "a", "b"], ["a", "b", "A"], [2, 0, 1]),  # exact names before folded ones
        (["neg", "pos"], ["neg", "neutral", "pos"], [0, 2]),  # some of the model's classes
        ([f"LABEL_{i}" for i in (0, 10, 2)], [f"LABEL_{i}" for i in range(11)], [0, 10, 2]),
    ],
)
def test_orders_of_classes(labels: list[str], classes: list[str], order: list[int] | None) -> None:
    config = BertConfig(id2label=dict(enumerate(classes)))
    model = SimpleNamespace(config=config)
    found = fit.class_order(model, "m", labels, head_is_kept=True)  # type: ignore[arg-type]
    assert (None if found is None else found.tolist()) == order


def test_too_few_classes_are_refused_before_training(tiny) -> None:
    with pytest.raises(InputError, match="num_labels is 2, and .* has 3 classes"):
        Setting(tiny["model"], tiny["task"], max_length=12, num_labels=2).split("train")


def test_an_adapter_beside_a_model_is_not_attached_in_silence(tiny, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter of peft beside the model"):
        models.load(str(folder), kind="backbone")
