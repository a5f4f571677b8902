"""What config.json says of the classes: names by label2id alone serve, contradictions do not."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForSequenceClassification

from deltacontrol.experiments import models
from deltacontrol.theory.errors import InputError
from tests import tiny_model


def saved(folder: Path, **entries: Any) -> str:
    """A classifier of two classes, with entries of its config.json replaced or taken out."""
    path = Path(tiny_model.write(folder)["model"])
    BertForSequenceClassification(BertConfig.from_pretrained(path)).save_pretrained(path)
    file = path / "config.json"
    config = json.loads(file.read_text("utf-8"))
    for name in ("id2label", "label2id", "num_labels"):
        config.pop(name, None)
    file.write_text(json.dumps({**config, **entries}), "utf-8")
    return str(path)


def test_names_of_label2id_alone_are_taken(tmp_path: Path) -> None:
    name = saved(tmp_path, label2id={"pos": 0, "neg": 1})
    model, _ = models.load(name, kind="classification", num_labels=2)
    assert model.config.id2label == {0: "pos", 1: "neg"}


@pytest.mark.parametrize(
    "entries",
    [
        {"id2label": {"0": "pos", "1": "neg"}, "num_labels": 3},
        {"id2label": {"0": "pos", "1": "neg"}, "label2id": {"pos": 1, "neg": 0}},
        {"label2id": {"pos": 0, "neg": 1}, "num_labels": 5},
    ],
)
def test_contradictions_are_refused(tmp_path: Path, entries: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="contradicts itself"):
        models.load(saved(tmp_path, **entries), kind="classification", num_labels=2)


def test_classes_are_numbered_from_zero(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected 0 to 1"):
        models.load(
            saved(tmp_path, id2label={"1": "a", "2": "b"}), kind="classification", num_labels=2
        )
