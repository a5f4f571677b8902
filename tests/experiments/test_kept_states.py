"""States are kept by default only where a training with them is the training without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    FNetConfig,
    FNetForSequenceClassification,
    LongformerConfig,
    LongformerForSequenceClassification,
)

from deltacontrol.deltas import Delta, HeadTuning, LastLayers, LoRA, attach
from deltacontrol.experiments.training import kept_states
from deltacontrol.experiments.training.loop import train
from deltacontrol.theory.errors import InputError
from tests.experiments.training_models import VOCABULARY, WIDTH, settings

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 3,
    "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32,
    "pad_token_id": 0, "num_labels": 2,
}  # fmt: skip


class Lengths:
    """Eight texts of 2 to 12 tokens in batches of four, the longest one first, again and again."""

    def __init__(self) -> None:
        generator = np.random.default_rng(1)
        lengths = [12, 3, 5, 7, 2, 9, 4, 6]
        self.texts = [torch.from_numpy(generator.integers(2, VOCABULARY, n)) for n in lengths]

    def examples(self, step: int) -> Tensor:
        order = np.arange(8) if step < 2 else np.random.default_rng(step // 2).permutation(8)
        return torch.from_numpy(order.reshape(2, 4)[step % 2])

    def batch(self, step: int) -> dict[str, Tensor]:
        texts = [self.texts[int(number)] for number in self.examples(step)]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        labels = torch.tensor([len(text) % 2 for text in texts])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def made(config: Any, model: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    return model(config(**SHAPE, **more)).eval()


def shared() -> Any:
    """BERT whose last block is its first one once more."""
    model = made(BertConfig, BertForSequenceClassification)
    layers = model.bert.encoder.layer
    layers[2] = layers[0]
    return model


MODELS: dict[str, tuple[Callable[[], Any], Delta | None]] = {
    "one block for all": (
        lambda: made(AlbertConfig, AlbertForSequenceClassification, embedding_size=8), None,
    ),
    "a block twice": (shared, LoRA(rank=2, layers=(1,))),
    "no mask": (lambda: made(FNetConfig, FNetForSequenceClassification), None),
    "no mask, below": (
        lambda: made(FNetConfig, FNetForSequenceClassification), LastLayers(num_layers=1),
    ),
    "padded by itself": (
        lambda: made(LongformerConfig, LongformerForSequenceClassification, attention_window=4),
        LastLayers(num_layers=1),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_which_no_state_can_be_kept_are_passed_as_ever(name: str) -> None:
    build, delta = MODELS[name]
    found = []
    for cached in (None, False):
        model = attach(build(), *filter(None, [delta]), HeadTuning(), seed=0)
        found.append(
            train(model, Lengths(), settings(steps=8, cache_frozen=cached), progress=False)
        )
    assert "kept_blocks" not in found[0].measures
    assert list(found[0].curve["loss"]) == list(found[1].curve["loss"])
    asked = attach(build(), *filter(None, [delta]), HeadTuning(), seed=0)
    with pytest.raises(InputError, match="train without cache_frozen"):
        train(asked, Lengths(), settings(steps=8, cache_frozen=True), progress=False)


class Shown(Lengths):
    """Of the first batch no text is to be learned; with ``mask`` False, no batch has one."""

    def __init__(self, mask: bool) -> None:
        super().__init__()
        self.mask = mask

    def batch(self, step: int) -> dict[str, Tensor]:
        found = super().batch(step)
        if not self.mask:
            del found["attention_mask"]
        labels = found["input_ids"].masked_fill(found["input_ids"] == 0, -100)
        found["labels"] = torch.full_like(labels, -100) if step == 0 else labels
        return found


def test_each_attempt_decides_as_the_first_one() -> None:
    """A training that goes on at its fourth step has not seen the first batch itself."""
    model = attach(made(BertConfig, BertForSequenceClassification), HeadTuning())
    chosen = settings(steps=8, kind="masked-lm")
    found = [
        kept_states.kept(
            model, Shown(True), chosen, torch.device("cpu"), precision="fp32", first=first,
            replay=lambda step, frozen: None,
        )
        for first in (0, 3)
    ]  # fmt: skip
    assert found == [None, None]


def test_batches_without_a_mask_are_refused_where_states_were_asked_for() -> None:
    model = attach(made(BertConfig, BertForSequenceClassification), HeadTuning())
    with pytest.raises(InputError, match="attention_mask shows, and the batches have none"):
        train(model, Shown(False), settings(steps=8, cache_frozen=True), progress=False)
