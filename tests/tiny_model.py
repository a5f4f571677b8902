"""A random model of a few thousand parameters, and a task of few classes, in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]
    PretrainedConfig,
    PreTrainedModel,
)

WORDS = ("good", "bad", "fine", "poor", "the", "film", "was", "a", "very", "so")


SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def tokenizer(folder: Path, words: Sequence[str] = WORDS) -> int:
    """Write BERT's tokenizer of these words into a new folder; the number of its tokens."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return len(vocabulary)


def bert(
    folder: Path,
    words: Sequence[str] = WORDS,
    kind: type[PreTrainedModel] = BertModel,
    **config: Any,
) -> None:
    """Write a random BERT with a tokenizer of these words into a new folder."""
    given = {"max_position_embeddings": 16, "initializer_range": 0.3} | SIZES | config
    size = tokenizer(folder, words)
    saved(kind, BertConfig(vocab_size=size, **given), folder)


def saved(kind: type[PreTrainedModel], config: PretrainedConfig, folder: Path) -> None:
    """Write a random model into a folder."""
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)


def write(folder: Path, classes: int = 3) -> dict[str, str]:
    """Write both; give their paths as ``model`` and ``task``, whose last words tell the class."""
    model = folder / "tiny-bert"
    bert(model)
    generator = np.random.default_rng(0)
    rows = [
        {
            "text": " ".join(generator.choice(WORDS, 3 + index % 5)) + " " + WORDS[index % classes],
            "label": ("yes", "no", "so")[index % classes],
        }
        for index in range(200)
    ]
    pd.DataFrame(rows).to_csv(folder / "task.csv", index=False)
    return {"model": str(model), "task": str(folder / "task.csv")}
