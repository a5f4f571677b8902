"""Tiny language models that know a few words, tasks of these, and settings with a template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.tasks.templates import Template
from deltacontrol.experiments.training.finetune import FineTuning
from tests import tiny_model
from tests.experiments import model_folders

WORDS = ("good", "bad", "fine", "poor", "the", "film", "a", "very", "so", "it", "It", "was", "is",
         "great", "terrible", "and", ".")  # fmt: skip
TEMPLATES = {"masked": "{text} It was [MASK].", "causal": "{text} It was"}
VERBALISER = ("negative=terrible", "positive=great")
KINDS = tuple(TEMPLATES)


def write(folder: Path) -> dict[str, str]:
    """Both kinds of language model, one without a head, and files of texts, pairs and numbers."""
    found = {
        "masked": model_folders.masked(folder / "masked", WORDS),
        "causal": model_folders.causal(folder / "causal", WORDS),
        "headless": tiny_model.write(folder)["model"],
    }
    generator = np.random.default_rng(0)
    rows = []
    for index in range(600):
        words = generator.choice(WORDS[4:9], 2 + index % 12).tolist()
        words.insert(index % len(words), WORDS[index % 4])
        rows.append({"text": " ".join(words), "label": ("positive", "negative")[index % 2]})
    frame = pd.DataFrame(rows)
    tables = {
        "task": frame,
        "pairs": frame.assign(text_pair=frame["text"].iloc[::-1].to_numpy()),
        "numbers": frame.assign(label=generator.normal(size=len(frame))),
    }
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
        found[name] = str(folder / f"{name}.csv")
    return found


def setting_of(places: dict[str, str], kind: str, task: str = "task", **options: Any) -> Setting:
    text = options.pop("text", TEMPLATES.get(kind, ""))
    template = Template(text, options.pop("verbaliser", VERBALISER))
    given = {"max_length": 12, "train_rows": 40, "template": template} | options
    return Setting(places[kind], places[task], **given)


def tiny(places: dict[str, str], kind: str, **options: Any) -> FineTuning:
    fixed = {"model": places[kind], "task": places["task"], "device": "cpu", "precision": "fp32"}
    sizes = {"steps": 12, "batch_size": 8, "max_length": 12, "learning_rate": 1e-2}
    words = {"template": TEMPLATES[kind], "verbaliser": VERBALISER}
    given: dict[str, Any] = {**fixed, **sizes, **words, **options}
    return FineTuning(**given)
