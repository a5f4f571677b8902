"""Folders of a tiny model, copied and changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import BertForSequenceClassification


def copied(tiny: dict[str, str], folder: Path) -> Path:
    return Path(shutil.copytree(tiny["model"], folder / "model"))


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def named(folder: Path, classes: list[str]) -> None:
    """A checkpoint whose head was trained on these classes."""
    model = BertForSequenceClassification.from_pretrained(
        folder, num_labels=len(classes), ignore_mismatched_sizes=True
    )
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: i for i, name in enumerate(classes)}
    model.save_pretrained(folder)
