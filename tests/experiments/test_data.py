"""Batches: complete, repeatable, padded as little as they can be."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from deltacontrol.experiments.tasks import Task, encoding
from deltacontrol.experiments.tasks.encoding import IGNORED, Encoded, encode_rows
from deltacontrol.theory.errors import InputError

PAD = 0


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Split at spaces; the word `w7` has the id 7."""
    words = {"<pad>": PAD, "<unk>": 1} | {f"w{i}": i for i in range(2, 200)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", model_max_length=64
    )


def frame(start: int, rows: int, kind: str) -> pd.DataFrame:
    """Row i starts with the word of its number, so that batches can be read back."""
    lengths = np.random.default_rng(start).integers(1, 12, rows)
    texts = [" ".join([f"w{start + i}"] + ["w199"] * n) for i, n in enumerate(lengths)]
    if kind == "causal-lm":
        return pd.DataFrame({"text": texts})
    scale = 0.5 if kind == "regression" else 1
    return pd.DataFrame({"text": texts, "label": scale * (np.arange(rows) % 3)})


def task(kind: str = "classification", rows: int = 100) -> Task:
    splits = frame(2, rows, kind), frame(110, 15, kind), frame(130, 33, kind)
    labels = ("a", "b", "c") if kind == "classification" else ()
    return Task("words", kind, labels, *splits, digest="", source="")


def encode(task: Task, tokenizer: PreTrainedTokenizerFast, *, max_length: int) -> Encoded:
    how = {"kind": task.kind, "max_length": max_length, "name": task.name}
    splits = ("train", "validation", "test")
    return Encoded(**{s: encode_rows(getattr(task, s), tokenizer, **how) for s in splits})


@pytest.fixture
def encoded(tokenizer: PreTrainedTokenizerFast) -> Encoded:
    return encode(task(), tokenizer, max_length=32)


def rows_of(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def test_a_batch_is_what_the_tokenizer_pads(
    encoded: Encoded, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = task().train
    chosen = np.array([5, 17, 60])
    batch = encoded.train.batch(chosen)
    reference = tokenizer(source["text"][chosen].tolist(), padding=True, return_tensors="pt")
    torch.testing.assert_close(batch["input_ids"], reference["input_ids"])
    torch.testing.assert_close(batch["attention_mask"], reference["attention_mask"])
    assert batch["labels"].tolist() == source["label"][chosen].tolist()
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_the_last_rows_batch_has_the_last_token(encoded: Encoded) -> None:
    batch = encoded.train.batch(np.array([99]))
    assert batch["attention_mask"].all() and batch["input_ids"][0, 0] == 101


def test_an_epoch_sees_each_row_at_most_once(encoded: Encoded) -> None:
    steps = encoded.steps_per_epoch(16)
    assert steps == 6
    epochs = [
        [
            rows_of(encoded.training_batch(e * steps + k, seed=3, batch_size=16))
            for k in range(steps)
        ]
        for e in range(20)
    ]
    for epoch in epochs:
        assert all(len(batch) == 16 for batch in epoch)
        assert len({row for batch in epoch for row in batch}) == 96
    # Other rows are left out in each epoch, so all are seen.
    assert {row for epoch in epochs for batch in epoch for row in batch} == set(range(2, 102))


def test_a_batch_depends_on_seed_step_and_size_alone(
    encoded: Encoded, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(1)
    forward = [encoded.training_batch(k, seed=0, batch_size=8) for k in range(30)]
    torch.manual_seed(2)
    other = encode(task(), tokenizer, max_length=32)
    for k in reversed(range(30)):
        batch = other.training_batch(k, seed=0, batch_size=8)
        for key, value in batch.items():
            torch.testing.assert_close(value, forward[k][key], rtol=0, atol=0)
    again = [rows_of(encoded.training_batch(k, seed=1, batch_size=8)) for k in range(12)]
    assert again != [rows_of(batch) for batch in forward[:12]]
    assert [rows_of(b) for b in forward[:12]] != [rows_of(b) for b in forward[12:24]]


def test_the_global_generators_are_left_alone(encoded: Encoded) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    encoded.training_batch(0, seed=0, batch_size=8)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_rows_of_a_batch_have_similar_lengths(encoded: Encoded) -> None:
    steps = encoded.steps_per_epoch(10)
    batches = [encoded.training_batch(k, seed=0, batch_size=10) for k in range(steps)]
    filled = sum(int(b["attention_mask"].sum()) for b in batches)
    assert filled / sum(b["attention_mask"].numel() for b in batches) > 0.9
    longest = [b["input_ids"].shape[1] for b in batches]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_evaluation_covers_every_row_once(encoded: Encoded) -> None:
    for split, size in (("train", 100), ("validation", 15), ("test", 33)):
        batches = list(encoded.eval_batches(split, 8))
        assert len(batches) == -(-size // 8)
        seen = [row for batch in batches for row in rows_of(batch)]
        assert len(seen) == len(set(seen)) == size
        longest = [batch["input_ids"].shape[1] for batch in batches]
        assert longest == sorted(longest, reverse=True)
    with pytest.raises(InputError, match="unknown split 'tset'; nearest: test"):
        list(encoded.eval_batches("tset", 8))


def test_labels_have_the_type_of_the_kind(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (
        encode(task(), tokenizer, max_length=8)
        .training_batch(0, seed=0, batch_size=4)["labels"]
        .dtype
        == torch.int64
    )
    batch = encode(task("regression"), tokenizer, max_length=8).training_batch(
        0, seed=0, batch_size=4
    )
    assert batch["labels"].dtype == torch.float32
    assert set(batch["labels"].tolist()) <= {0.0, 0.5, 1.0}


def test_a_language_model_predicts_no_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    source = task("causal-lm")
    source.train.loc[0, "text"] = "w2"
    encoded = encode(source, tokenizer, max_length=8)
    assert len(encoded.train) == 99
    for batch in encoded.eval_batches("train", 16):
        attended = batch["attention_mask"].bool()
        assert (batch["labels"][~attended] == IGNORED).all()
        torch.testing.assert_close(batch["labels"][attended], batch["input_ids"][attended])


def test_long_texts_are_cut_and_empty_ones_keep_a_position(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    source = task()
    source.train.loc[0, "text"] = " ".join(["w5"] * 100)
    source.train.loc[1, "text"] = "   "
    split = encode(source, tokenizer, max_length=8).train
    assert split.lengths.max() == 8
    assert split.batch(np.array([1]))["input_ids"].tolist() == [[PAD]]


def test_rows_in_order(encoded: Encoded) -> None:
    split = encoded.train
    assert rows_of(split.batch()) == list(range(2, 102))
    assert [rows_of(batch) for batch in split.batches(60)] == [
        list(range(2, 62)),
        list(range(62, 102)),
    ]
    assert split.majority_share == 34 / 100
    with pytest.raises(InputError, match="a batch of no rows"):
        split.batch([])


def test_a_prompt_follows_the_cut_text_and_nothing_is_cut_where_that_is_asked_for(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = pd.DataFrame({"text": ["w2 w3", "w4 w5 w6 w7"], "label": [0, 1]})
    prompted = encode_rows(
        rows, tokenizer, kind="classification", max_length=3, suffix=[8, 9]
    ).batch()
    assert prompted["input_ids"].tolist() == [[2, 3, 8, 9, PAD], [4, 5, 6, 8, 9]]
    assert prompted["attention_mask"].sum(1).tolist() == [4, 5]
    whole = encode_rows(rows, tokenizer, kind="classification", max_length=None)
    assert whole.lengths.tolist() == [2, 4]
    assert len(encode_rows(rows[:0], tokenizer, kind="classification", max_length=3)) == 0


def test_a_split_smaller_than_a_batch_is_one_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    limited = encode(task(rows=5), tokenizer, max_length=8)
    for step in range(3):
        batch = limited.training_batch(step, seed=0, batch_size=16)
        assert sorted(rows_of(batch)) == [2, 3, 4, 5, 6]


def test_a_length_without_room_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="max_length=1 leaves no room"):
        encode(task(), tokenizer, max_length=1)


def test_texts_of_one_token_leave_nothing_to_predict(tokenizer: PreTrainedTokenizerFast) -> None:
    source = task("causal-lm")
    source.validation["text"] = "w5"
    with pytest.raises(InputError, match="words: no text .* nothing to predict"):
        encode(source, tokenizer, max_length=8)


def with_types() -> PreTrainedTokenizerFast:
    """Words as tokens, and pairs as BERT has them."""
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])}
    words |= {f"w{i}": i for i in range(4, 60)}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.mark.parametrize("max_length", [None, 9])
def test_pairs_are_as_the_tokenizer_has_them(max_length: int | None) -> None:
    tokenizer = with_types()
    rows = frame(4, 12, "classification")
    rows["text_pair"] = rows["text"].iloc[::-1].to_numpy()
    split = encode_rows(rows, tokenizer, kind="classification", max_length=max_length)
    batch = split.batch([1, 7, 11])
    expected = tokenizer(
        rows["text"].iloc[[1, 7, 11]].tolist(), rows["text_pair"].iloc[[1, 7, 11]].tolist(),
        padding=True, truncation=max_length is not None, max_length=max_length, return_tensors="pt",
    )  # fmt: skip
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        torch.testing.assert_close(batch[name], expected[name])
    assert batch["token_type_ids"].any()
    alone = encode_rows(
        rows.drop(columns="text_pair"), tokenizer, kind="classification", max_length=max_length
    )
    assert "token_type_ids" not in alone.batch()


@pytest.mark.parametrize("max_length", [9, 10, 24])
def test_long_pairs_are_cut_as_the_tokenizer_cuts_them(
    max_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left out beforehand is nothing that the tokenizer would have kept."""
    tokenizer, random = with_types(), np.random.default_rng(0)
    texts = [
        [" ".join(f"w{k}" for k in random.integers(4, 60, length)) for length in lengths]
        for lengths in (random.integers(1, 60, 300), [*random.integers(1, 60, 200), *[40] * 100])
    ]
    rows = pd.DataFrame({"text": texts[0], "text_pair": texts[1], "label": [0, 1] * 150})
    given: list[list[list[str]]] = []
    cut = encoding._without_ends

    def watched(*arguments: Any) -> list[list[str]]:
        given.append(cut(*arguments))
        return given[-1]

    monkeypatch.setattr(encoding, "_without_ends", watched)
    split = encode_rows(rows, tokenizer, kind="classification", max_length=max_length)
    expected = tokenizer(*texts, truncation=True, max_length=max_length, padding=True)
    for name in ("input_ids", "token_type_ids"):
        assert split.batch()[name].tolist() == expected[name]
    assert sum(map(len, given[0][0])) < 0.7 * sum(map(len, texts[0]))
