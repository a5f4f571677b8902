"""Folders of tiny models: copied and changed, and language models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests import tiny_model


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


def masked(folder: Path, words: Sequence[str]) -> str:
    """A tiny random BertForMaskedLM that knows these words; its path."""
    tiny_model.bert(folder, words, BertForMaskedLM, max_position_embeddings=24)
    return str(folder)


def causal(folder: Path, words: Sequence[str]) -> str:
    """A tiny random LlamaForCausalLM that knows these words; its path."""
    vocabulary = ["<pad>", "<unk>", *words]
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    folder.mkdir()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="<pad>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        max_position_embeddings=24,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
        **tiny_model.SIZES,
    )
    tiny_model.saved(LlamaForCausalLM, config, folder)
    return str(folder)
