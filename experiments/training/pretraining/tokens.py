"""The tokenizer of the family, and its text as rows of tokens, kept in the cache.

The tokenizer is a byte-level BPE of lower-case text, trained on the training documents: no text is
beyond it. Of it come rows of `BODY` tokens, cut out of the documents one after the other with
[SEP] between them:

    tokens/                  tokenizer.json and what goes with it
    rows.safetensors         training (rows, BODY) and held_out (rows, BODY), int16
    text.json                counts of documents, of rows, and of the bytes that the rows stand for
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltacontrol.experiments.models.family import LENGTH, RECIPE, VOCABULARY, Member
from deltacontrol.experiments.sources import build_once, cache_dir
from deltacontrol.experiments.tasks import corpus
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL))
BODY = LENGTH - 2  # an encoder's row has [CLS] before it and [SEP] behind it
_BATCH = 1000


@dataclass(frozen=True)
class Tokens:
    """The text of the family in tokens.

    Attributes:
        folder: where it is kept.
    """

    folder: Path

    @cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """Arrays training and held_out (rows, BODY) of token ids, int16."""
        from safetensors.numpy import load_file

        return load_file(self.folder / "rows.safetensors")

    @cached_property
    def counts(self) -> dict[str, Any]:
        """What `corpus.Text` counts, and documents and rows of each part."""
        return json.loads((self.folder / "text.json").read_text(encoding="utf-8"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of tokenizer.json and the rows: what a pre-training reads."""
        total = hashlib.sha256((self.folder / "tokenizer.json").read_bytes())
        total.update((self.folder / "rows.safetensors").read_bytes())
        return total.hexdigest()

    @cached_property
    def unigram_loss(self) -> float:
        """-Σ_t p(t) log q(t) in nats a token: what the frequencies of single tokens alone reach.

        p are the frequencies of the held-out rows, q those of the training rows with one more of
        every token. A model of a greater loss has learnt no context.
        """
        counts = {
            part: np.bincount(rows.ravel(), minlength=self.vocabulary).astype(float)
            for part, rows in self.rows.items()
        }
        held, known = counts["held_out"], counts["training"] + 1.0
        return float(-(held / held.sum()) @ np.log(known / known.sum()))

    @cached_property
    def vocabulary(self) -> int:
        """Number of tokens, special ones among them."""
        return self._inner().get_vocab_size()

    def tokenizer(self, member: Member) -> PreTrainedTokenizerBase:
        """The tokenizer of a member: an encoder's puts [SEP] behind a text, a decoder's does not.

        A decoder classifies at the last token of a text.
        """
        from tokenizers.processors import TemplateProcessing
        from transformers import PreTrainedTokenizerFast

        inner = self._inner()
        marks = [(SPECIAL[CLS], CLS), (SPECIAL[SEP], SEP)]
        single = "[CLS] $A [SEP]" if member.family == "encoder" else "[CLS] $A"
        second = "$B:1 [SEP]:1" if member.family == "encoder" else "[SEP] $B:1"
        inner.post_processor = TemplateProcessing(  # type: ignore[assignment] - a setter
            single=single, pair=f"{single} {second}", special_tokens=marks
        )
        own = {"pad_token": SPECIAL[PAD], "unk_token": SPECIAL[UNK], "mask_token": SPECIAL[MASK]}
        ends = {"cls_token": SPECIAL[CLS], "sep_token": SPECIAL[SEP]}
        if member.family == "decoder":
            ends |= {"bos_token": SPECIAL[CLS], "eos_token": SPECIAL[SEP]}
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, model_max_length=LENGTH, **own, **ends
        )

    def special(self, member: Member) -> dict[str, int]:
        """Numbers of special tokens for a member's configuration."""
        ends = {"pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP}
        if member.family == "encoder":
            return ends | {"cls_token_id": CLS, "sep_token_id": SEP}
        return ends

    def _inner(self) -> Tokenizer:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))


def tokens() -> Tokens:
    """The text of the family in tokens, made the first time: a minute or two.

    Raises:
        InputError: as in `corpus.text`, or there is too little of it.
    """
    own = [corpus.digest(), VOCABULARY, LENGTH, RECIPE]
    digest = hashlib.sha256(json.dumps(own).encode()).hexdigest()
    return Tokens(build_once(cache_dir() / "tasks" / f"family-text-{digest[:8]}", _build))


def train_tokenizer(documents: Sequence[str]) -> Tokenizer:
    """A byte-level BPE of the documents, which is a function of them alone."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    made: Any = Tokenizer(BPE(unk_token=SPECIAL[UNK]))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # A word is the same token at the start of a text as inside it.
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        # A mask takes the space before it, as the word in its place does.
        special_tokens=[AddedToken(mark, lstrip=mark == SPECIAL[MASK]) for mark in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with _in_one_thread():
        made.train_from_iterator(documents, trainer)
    return made


def packed(tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray:
    """The documents as rows of tokens (rows, BODY), int16; what fills no row is left out."""
    stream: list[np.ndarray] = []
    with _in_one_thread():
        for start in range(0, len(documents), _BATCH):
            found = tokenizer.encode_batch(list(documents[start : start + _BATCH]))
            stream += [np.array([*one.ids, SEP], dtype=np.int16) for one in found]
    joined = np.concatenate(stream) if stream else np.zeros(0, dtype=np.int16)
    count = len(joined) // BODY
    return joined[: count * BODY].reshape(count, BODY)


def _build(folder: Path) -> None:
    from safetensors.numpy import save_file

    text = corpus.text()
    tokenizer = train_tokenizer(text.training)
    rows = {part: packed(tokenizer, getattr(text, part)) for part in ("training", "held_out")}
    for part, found in rows.items():
        if not len(found):
            raise InputError(
                f"the text has too few {part} documents for one row of {BODY} tokens; add corpora"
            )
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(rows, folder / "rows.safetensors")
    counts = {
        "corpora": text.counts,
        "documents": {"training": len(text.training), "held_out": len(text.held_out)},
        "rows": {part: len(found) for part, found in rows.items()},
    }
    (folder / "text.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _in_one_thread() -> Iterator[None]:
    """Let the tokenizer start no threads, which would forbid later forks of this process."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
