"""A random model of a few thousand parameters, and a task of few classes, in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]
)

WORDS = ("good", "bad", "fine", "poor", "the", "film", "was", "a", "very", "so")


def write(folder: Path, classes: int = 3) -> dict[str, str]:
    """Write both; give their paths as ``model`` and ``task``, whose last words tell the class."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    model = folder / "tiny-bert"
    model.mkdir()
    (model / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(model / "vocab.txt")).save_pretrained(model)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(model)
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
