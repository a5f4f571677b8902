"""What a small random model of an architecture is, and its sizes.

The sizes are formulas of the dimensions below, written here a second time on purpose: they never
ask a delta or a model. V tokens, P positions, d width, e embedding width, m inner width, H heads,
L blocks (encoder and decoder together).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers as hf

V, P, d, e, m, H, L, CLASSES = 100, 40, 32, 16, 64, 4, 2, 2
TOKENS = 7


@dataclass(frozen=True)
class Family:
    """One architecture: its configuration and its sizes.

    Attributes:
        config: makes the configuration.
        embedding: parameters before the blocks.
        block: of the last block.
        tail: behind the blocks.
        head: of the task head.
        biases: bias entries of the backbone.
        norms: entries of the gains and shifts of its normalisations.
        key_width: width of keys and values.
        embedding_width: width of the token embeddings.
        tolerance: of identities; many compute norms, rotations or softmax in float32 always.
        first_block: parameters of the first block, where it is another one than the last.
        reads: what goes in: "tokens", "pixels" or "audio".
        kind: what ``build`` makes of "classification".
        unused: ends of the names of parameters that the forward pass does not touch.
        layers: blocks that are modules of their own.
        inner: width inside of the MLP.
        down_bias: size of the bias of the MLP's last map.
        query: widths of input and output of the query's map.
        value: of the value's; None means d and ``key_width``.
        by_formula: methods whose count is the formula in their own file.
        eager: whether transformers has no other attention for it.
        is_more: whether `make test` takes one cell of it alone; see ``zoo.cells``.
    """

    config: Callable[[], hf.PreTrainedConfig]
    embedding: int
    block: int
    tail: int
    head: int
    biases: int
    norms: int
    key_width: int = d
    embedding_width: int = d
    tolerance: float = 1e-12
    first_block: int | None = None
    reads: str = "tokens"
    kind: type = hf.AutoModelForSequenceClassification
    unused: tuple[str, ...] = ()
    layers: int = L
    inner: int = m
    down_bias: int | None = None
    query: tuple[int, int] = (d, d)
    value: tuple[int, int] | None = None
    by_formula: tuple[str, ...] = ()
    eager: bool = False
    is_more: bool = False

    @property
    def ends(self) -> int:
        """Widths of the inputs and outputs of the maps of query and value."""
        return sum(self.query) + self.outputs + (self.value or (d, 0))[0] - self.query[1]

    @property
    def outputs(self) -> int:
        """Widths of the outputs of the maps of query and value."""
        return self.query[1] + (self.value or (d, self.key_width))[1]

    @property
    def down(self) -> int:
        """Parameters of the MLP's last map."""
        bias = (d if self.biases else 0) if self.down_bias is None else self.down_bias
        return self.inner * d + bias

    @property
    def total(self) -> int:
        first = self.block if self.first_block is None else self.first_block
        return self.embedding + first + (self.layers - 1) * self.block + self.tail + self.head


def bert_like(kind: type, **more: Any) -> Callable[[], hf.PreTrainedConfig]:
    sizes = {"hidden_size": d, "num_hidden_layers": L, "num_attention_heads": H}
    sizes |= {"intermediate_size": m, "vocab_size": V, "max_position_embeddings": P}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return lambda: kind(**sizes, **off, **more)


LINEAR = d * d + d
BLOCK = 4 * LINEAR + 2 * d * m + m + d + 2 * 2 * d
BLOCK_BIASES = 4 * d + m + d + 2 * d
DENSE_HEAD = LINEAR + CLASSES * (d + 1)
PATCHES, PATCH = 4, 3 * 4 * 4
LLAMA: dict[str, Any] = {"hidden_size": d, "num_hidden_layers": L, "num_attention_heads": H}
LLAMA |= {"num_key_value_heads": H // 2, "intermediate_size": m, "vocab_size": V}
LLAMA |= {"max_position_embeddings": P, "pad_token_id": 0}
LLAMA_BLOCK = 2 * d * d + 2 * d * (d // 2) + 3 * d * m + 2 * d
VIT: dict[str, Any] = {"hidden_size": d, "num_hidden_layers": L, "num_attention_heads": H}
VIT |= {"image_size": 8, "patch_size": 4, "hidden_dropout_prob": 0.0}
T5: dict[str, Any] = {"d_model": d, "num_heads": H, "d_ff": m, "d_kv": d // H, "vocab_size": V}
T5_BLOCK = 4 * d * d + 2 * d * m + 2 * d
