"""Adapters of the real peft as runs: without a task, without its type, of one output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from transformers import BertForSequenceClassification, BertForTokenClassification, BertModel

from deltacontrol.deltas import LoRA, attach
from deltacontrol.deltas.interop import export_peft
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run
from deltacontrol.experiments.sharing import base_of
from deltacontrol.experiments.training.peft_import import ImportedAdapter
from deltacontrol.theory.errors import InputError
from tests import tiny_model

# peft asks transformers by a name that is about to go.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_model.write(tmp_path_factory.mktemp("imported"))


def adapter(model: torch.nn.Module, folder: Path, *, keep_type: bool = True) -> Path:
    """A LoRA adapter whose controls are away from their start."""
    task = "SEQ_CLS" if isinstance(model, BertForSequenceClassification) else "FEATURE_EXTRACTION"
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type=task)
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(str(folder))
    if not keep_type:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": None}))
    return folder


def test_a_reward_model_has_one_output(tiny: dict[str, str], tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(tiny["model"], num_labels=1)
    folder = adapter(model, tmp_path / "adapter")
    record = run(ImportedAdapter(folder), RunStore(tmp_path / "runs"), progress=False)
    assert record is not None and record.result["model_kind"] == "regression"
    again = record.model()
    batch = {"input_ids": torch.tensor([[2, 5, 6, 3]])}
    reference = peft.PeftModel.from_pretrained(
        BertForSequenceClassification.from_pretrained(tiny["model"], num_labels=1), folder
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, reference(**batch).logits)


def test_an_adapter_without_a_task_type_goes_by_the_base(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    folder = adapter(BertModel.from_pretrained(tiny["model"]), tmp_path / "a", keep_type=False)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": None}))
    record = run(ImportedAdapter(folder), RunStore(tmp_path / "runs"), progress=False)
    assert record is not None and record.result["model_kind"] == "backbone"
    assert record.model().num_trainable == 2 * 2 * 2 * 2 * 16


def test_a_base_is_named_by_a_folder_that_peft_finds(tiny: dict[str, str], tmp_path: Path) -> None:
    folder = adapter(BertModel.from_pretrained(tiny["model"]), tmp_path / "a")
    record = run(ImportedAdapter(folder), RunStore(tmp_path / "runs"), progress=False)
    assert record is not None and Path(base_of(record)) == Path(tiny["model"]).resolve()


@pytest.mark.parametrize(
    ("classes", "fits"), [(["so", "yes", "no"], True), (["yes", "no", "maybe"], False)]
)
def test_an_adapters_head_keeps_the_classes_that_its_base_names(
    tiny: dict[str, str], tmp_path: Path, classes: list[str], fits: bool
) -> None:
    base = Path(shutil.copytree(tiny["model"], tmp_path / "base"))
    body = BertModel.from_pretrained(base)
    body.config.id2label = dict(enumerate(classes))
    body.config.label2id = {name: number for number, name in enumerate(classes)}
    body.save_pretrained(base)
    folder = adapter(BertForSequenceClassification.from_pretrained(base), tmp_path / "adapter")
    wanted = ImportedAdapter(folder, model=str(base), task=tiny["task"], max_length=12)
    if not fits:
        with pytest.raises(InputError, match="tells the classes yes, no, maybe apart"):
            run(wanted, RunStore(tmp_path / "runs"), progress=False)
        return
    record = run(wanted, RunStore(tmp_path / "runs"), progress=False)
    assert record is not None
    setting = wanted.setting()
    order = setting.class_order
    assert order is not None and [classes[i] for i in order] == list(setting.data.labels)


@pytest.mark.parametrize("other", ["size", "task"])
def test_an_adapter_without_a_head_is_not_judged_by_another_head(
    tiny: dict[str, str], tmp_path: Path, other: str
) -> None:
    base = Path(shutil.copytree(tiny["model"], tmp_path / "base"))
    trained = BertForSequenceClassification if other == "size" else BertForTokenClassification
    trained.from_pretrained(base, num_labels=5 if other == "size" else 3).save_pretrained(base)
    folder = tmp_path / "adapter"
    whole = BertForSequenceClassification.from_pretrained(tiny["model"])
    export_peft(attach(whole, LoRA(rank=2)), folder)
    wanted = ImportedAdapter(folder, model=str(base), task=tiny["task"], max_length=12)
    with (
        pytest.warns(UserWarning, match=f"head of another {other}"),
        pytest.raises(
            InputError, match=f"holds no head, and its base has .*head of another {other}"
        ),
    ):
        run(wanted, RunStore(tmp_path / "runs"), progress=False)
