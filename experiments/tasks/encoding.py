"""From texts to batches: tokenised once, batched by length, the same on every machine.

The tokenizer is called here alone, by `encode_rows` and for the template that a text is put into.

A split is stored ragged: all token ids in one array (tokens,), and offsets (rows + 1,). A batch
is the dictionary that a model's forward takes:

    input_ids       (batch, longest)  int64, padded on the right
    attention_mask  (batch, longest)  int64, 1 on tokens
    token_type_ids  (batch, longest)  int64, 0 on the first text of a pair and 1 on the second; only
                                      where rows are pairs and the tokenizer tells them apart
    labels          (batch,)          int64 classes, or float32 targets
                    (batch, longest)  for causal-lm: the ids, -100 on padding

Training batches have no state: the batch of optimiser step k is a function of (seed, k, batch
size), so a run that was killed goes on with the batch it would have had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from deltacontrol.experiments.tasks import Kind

Batch = dict[str, torch.Tensor]

IGNORED = -100
# Rows are shuffled, cut into stretches of this many batches, and sorted by length inside each:
# little padding, yet each batch is drawn from the whole split.
BATCHES_SORTED_TOGETHER = 50


@dataclass(frozen=True, eq=False)
class EncodedSplit:
    """One split, tokenised.

    Attributes:
        tokens: token ids (tokens,) of all rows, one after the other.
        offsets: where each row starts, and the end (rows + 1,).
        labels: (rows,) int64 or float32; None for causal-lm.
        pad: the id that fills rows up.
        types: which text of a pair each token is of (tokens,); None where that is not told.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None
    pad: int
    types: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield all rows in order, `size` of them a batch."""
        for start in range(0, len(self), size):
            yield self.batch(np.arange(start, min(start + size, len(self))))

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield every row exactly once, longest first."""
        # The first batch needs the most memory: too large a batch fails at once.
        order = np.argsort(-self.lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size])

    def renumbered(self, order: np.ndarray) -> EncodedSplit:
        """The rows with class order[c] in the place of class c, order (classes,)."""
        if self.labels is None:
            return self
        return replace(self, labels=order.astype(self.labels.dtype)[self.labels])

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each row (rows,)."""
        return np.diff(self.offsets)

    @property
    def majority_share(self) -> float:
        """Share of the most frequent label: the accuracy of always guessing it.

        Raises:
            InputError: the rows have no labels.
        """
        if self.labels is None:
            raise InputError("rows of a language-model task have no labels, so no majority.")
        return float(np.unique(self.labels, return_counts=True)[1].max() / len(self.labels))

    def batch(self, rows: np.ndarray | Sequence[int] | None = None) -> Batch:
        """Return the rows (batch,) as one batch, padded to the longest among them.

        Args:
            rows: their numbers; all rows in order by default.

        Raises:
            InputError: no rows, or one that is not there.
        """
        rows = np.arange(len(self)) if rows is None else np.asarray(rows)
        if not len(rows):
            raise InputError("a batch of no rows; ask for one row or more.")
        if rows.min() < 0 or rows.max() >= len(self):
            raise InputError(
                f"a batch of rows {rows.min()} to {rows.max()}; there are {len(self)}, from 0 on."
            )
        starts, lengths = self.offsets[rows], self.lengths[rows]
        columns = np.arange(lengths.max())
        mask = columns < lengths[:, None]
        positions = np.minimum(starts[:, None] + columns, len(self.tokens) - 1)
        ids = torch.from_numpy(np.where(mask, self.tokens[positions], self.pad))
        attended = torch.from_numpy(mask)
        if self.labels is None:
            labels = ids.masked_fill(~attended, IGNORED)
        else:
            labels = torch.from_numpy(self.labels[rows])
        batch = {"input_ids": ids, "attention_mask": attended.long(), "labels": labels}
        if self.types is not None:
            batch["token_type_ids"] = torch.from_numpy(np.where(mask, self.types[positions], 0))
        return batch


@dataclass(frozen=True, eq=False)
class Encoded:
    """A task, each split tokenised by `encode_rows`."""

    train: EncodedSplit
    validation: EncodedSplit
    test: EncodedSplit
    _plans: dict[tuple[int, int, int], np.ndarray] = field(
        default_factory=dict, init=False, repr=False
    )

    def split(self, name: str) -> EncodedSplit:
        """Return a split by its name.

        Raises:
            InputError: not one of train, validation and test.
        """
        if name not in ("train", "validation", "test"):
            raise unknown("split", name, ("train", "validation", "test"))
        return getattr(self, name)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of batches in which each row appears at most once, all of the same size."""
        return max(1, len(self.train) // batch_size)

    def training_batch(self, step: int, *, seed: int, batch_size: int) -> Batch:
        """Return the batch of optimiser step `step` (0, 1, 2 and so on).

        An epoch is one permutation, seeded by (seed, epoch). Its last `rows mod batch_size` rows
        are left out, others in each epoch, so that every step averages over the same number of
        rows. A split smaller than a batch is one batch.
        """
        return self.train.batch(self.training_rows(step, seed=seed, batch_size=batch_size))

    def training_rows(self, step: int, *, seed: int, batch_size: int) -> np.ndarray:
        """Return the rows of the training split that are in the batch of a step (batch,)."""
        epoch, position = divmod(step, self.steps_per_epoch(batch_size))
        key = (seed, epoch, batch_size)
        if key not in self._plans:
            # One epoch at a time is in use; the plan is only a cache of a pure function.
            self._plans.clear()
            self._plans[key] = _epoch_plan(self.train.lengths, *key)
        return self._plans[key][position]

    def eval_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Yield every row of a split exactly once, longest first.

        Raises:
            InputError: as in `split`.
        """
        yield from self.split(split).eval_batches(batch_size)


def without_labels(batch: Batch) -> Batch:
    """The arguments of a model that is to compute no loss."""
    return {name: value for name, value in batch.items() if name != "labels"}


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokens of each text, special ones included, whole."""
    if not texts:
        return []
    # Who asks for whole texts cuts them, so that the tokenizer need not warn of long ones.
    kept: Any = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return [list(ids) for ids in tokenizer(texts, **kept)["input_ids"]]  # type: ignore[union-attr]


def token_starts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The letter at which each token of a text begins, without special tokens."""
    asked: Any = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    found = tokenizer(texts, **asked)["offset_mapping"]
    return [[begin for begin, _ in offsets] for offsets in found]  # type: ignore[union-attr]


def _without_ends(
    tokenizer: PreTrainedTokenizerBase, columns: list[list[str]], most: int
) -> list[list[str]]:
    """Pairs of texts, each up to a word behind so many tokens; the longer one stays the longer one.

    A tokenizer that cuts a pair pairs all the parts that it cuts off, too, in a time that grows
    with the square of the length; what cannot be among the first tokens is left out before that.
    """
    if tokenizer.truncation_side != "right":
        return columns
    found: list[list[str]] = [[], []]
    starts = (token_starts(tokenizer, texts) for texts in columns)
    for first, second, *both in zip(*columns, *starts, strict=True):
        texts = (first, second)
        places = [_word_starts(*one, most) for one in zip(texts, both, strict=True)]
        longer = len(both[0]) > len(both[1])  # which decides who of them has an odd token more
        while (places[0][0][0] > places[1][0][0]) is not longer:
            places[not longer].pop(0)
        for text, place, kept in zip(texts, places, found, strict=True):
            kept.append(text[: place[0][1]])
    return found


def _word_starts(text: str, starts: list[int], most: int) -> list[tuple[int, int]]:
    """Numbers of tokens, from ``most`` on, behind which a word begins, and where; last, the end."""
    words = [(n, at) for n, at in enumerate(starts) if n >= most and text[at - 1 : at].isspace()]
    return [*words, (len(starts), len(text))]


def encode_rows(
    frame: pd.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: Kind,
    max_length: int | None,
    suffix: Sequence[int] = (),
    template: Callable[[pd.DataFrame, int | None, str], list[list[int]]] | None = None,
    name: str = "the task",
) -> EncodedSplit:
    """Tokenise rows of a task.

    Args:
        frame: columns `text` and, unless causal-lm, `label`; with `text_pair`, the second text of
            each row follows the first as the tokenizer has it.
        tokenizer: a fast tokenizer with a padding token, as `deltacontrol.experiments.models.load`
        gives.
        kind: what the labels are.
        max_length: longer texts are cut at this many tokens, special ones included; None cuts none.
            Of a pair the longer text is cut first.
        suffix: tokens that follow every text, after the cut: a prompt.
        template: gives the tokens of rows, ``max_length`` and ``name`` in its own way, as
            `deltacontrol.experiments.tasks.templates.BoundTemplate.rows` does.
        name: of the task, for errors.

    Raises:
        InputError: a `max_length` that is too small, no padding token, or no text with two tokens
            for causal-lm (a single one has nothing to predict; such rows are left out).
    """
    pairs = "text_pair" in frame
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length is not None and max_length < 2 + special:
        raise InputError(f"max_length={max_length} leaves no room for text; give 8 or more.")
    pad = tokenizer.pad_token_id
    if not isinstance(pad, int):
        raise InputError("the tokenizer has no padding token; set one, its end token for example.")
    told = pairs and template is None and "token_type_ids" in tokenizer.model_input_names
    ids: list[list[int]] = []
    types: list[list[int]] | None = [] if told else None
    if template is not None:
        ids = template(frame, max_length, name)
    elif len(frame):
        columns = [frame[name].tolist() for name in ("text", "text_pair")[: 1 + pairs]]
        if pairs and max_length is not None:
            columns = _without_ends(tokenizer, columns, max_length)
        found = tokenizer(
            columns[0],
            columns[1] if pairs else None,
            truncation=max_length is not None,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=told,
        )
        ids = [[*row, *suffix] for row in found["input_ids"]]  # type: ignore[union-attr]
        if told:
            types = [[*row, *[0] * len(suffix)] for row in found["token_type_ids"]]  # type: ignore[union-attr]
    labels = None
    if kind == "causal-lm":
        ids = [row for row in ids if len(row) > 1]
        if not ids:
            raise InputError(f"{name}: no text of a split has two tokens; nothing to predict.")
    else:
        # A text of none of the tokenizer's tokens still needs one position to be read out from.
        ids = [row or [pad] for row in ids]
        types = None if types is None else [row or [0] for row in types]
        dtype = np.float32 if kind == "regression" else np.int64
        labels = frame["label"].to_numpy(dtype=dtype, copy=True)
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.fromiter((token for row in ids for token in row), np.int64, count=offsets[-1])
    kinds = None
    if types is not None:
        kinds = np.fromiter((k for row in types for k in row), np.int64, count=offsets[-1])
    return EncodedSplit(tokens, offsets, labels, pad, kinds)


def _epoch_plan(lengths: np.ndarray, seed: int, epoch: int, batch_size: int) -> np.ndarray:
    """Return the rows of each batch of an epoch (batches, batch size)."""
    generator = np.random.default_rng([seed, epoch])
    size = min(batch_size, len(lengths))
    batches = len(lengths) // size
    order = generator.permutation(len(lengths))[: batches * size]
    stretch = np.arange(len(order)) // (size * BATCHES_SORTED_TOGETHER)
    # The last key is the first to sort by: inside each stretch, by length.
    order = order[np.lexsort((lengths[order], stretch))]
    return generator.permutation(order.reshape(batches, size))
