"""Small random models of eighteen architectures, and their sizes.

The sizes are formulas of the dimensions below, written here a second time on purpose: they never
ask a delta or a model. V tokens, P positions, d width, e embedding width, m inner width, H heads,
L blocks (encoder and decoder together).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor

V, P, d, e, m, H, L, CLASSES = 100, 40, 32, 16, 48, 4, 2, 2
TOKENS = 7


@dataclass(frozen=True)
class Family:
    """One architecture: its configuration and its sizes.

    Attributes:
        config: makes the configuration.
        embedding: parameters before the blocks; a block's own; behind the blocks; of the head.
        biases: bias entries of the backbone.
        norms: entries of the gains and shifts of its normalisations.
        key_width: width of keys and values.
        embedding_width: width of the token embeddings.
        tolerance: of identities; Llama, OPT and T5 compute norms or softmax in float32 always.
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

    @property
    def total(self) -> int:
        return self.embedding + L * self.block + self.tail + self.head


def _bert_like(kind: type, **more: Any) -> Callable[[], hf.PreTrainedConfig]:
    sizes = {"hidden_size": d, "num_hidden_layers": L, "num_attention_heads": H}
    sizes |= {"intermediate_size": m, "vocab_size": V, "max_position_embeddings": P}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return lambda: kind(**sizes, **off, **more)


_LINEAR = d * d + d
_BLOCK = 4 * _LINEAR + 2 * d * m + m + d + 2 * 2 * d
_BLOCK_BIASES = 4 * d + m + d + 2 * d
_DENSE_HEAD = _LINEAR + CLASSES * (d + 1)

FAMILIES: dict[str, Family] = {
    "bert": Family(
        _bert_like(hf.BertConfig),
        embedding=(V + P + 2) * d + 2 * d,
        block=_BLOCK,
        tail=_LINEAR,  # the pooler
        head=CLASSES * (d + 1),
        biases=d + L * _BLOCK_BIASES + d,
        norms=2 * d + L * 4 * d,
    ),
    "roberta": Family(
        _bert_like(hf.RobertaConfig, type_vocab_size=1),
        embedding=(V + P + 1) * d + 2 * d,
        block=_BLOCK,
        tail=0,
        head=_DENSE_HEAD,
        biases=d + L * _BLOCK_BIASES,
        norms=2 * d + L * 4 * d,
    ),
    "electra": Family(
        _bert_like(hf.ElectraConfig, embedding_size=e, summary_last_dropout=0.0),
        embedding=(V + P + 2) * e + 2 * e + e * d + d,
        block=_BLOCK,
        tail=0,
        head=_DENSE_HEAD,
        biases=e + d + L * _BLOCK_BIASES,
        norms=2 * e + L * 4 * d,
        embedding_width=e,
    ),
    "distilbert": Family(
        lambda: hf.DistilBertConfig(
            dim=d, n_layers=L, n_heads=H, hidden_dim=m, vocab_size=V, max_position_embeddings=P,
            dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
        ),
        embedding=(V + P) * d + 2 * d,
        block=_BLOCK,
        tail=0,
        head=_DENSE_HEAD,
        biases=d + L * _BLOCK_BIASES,
        norms=2 * d + L * 4 * d,
    ),
    "mpnet": Family(
        _bert_like(hf.MPNetConfig),
        embedding=(V + P) * d + 2 * d + 32 * H,  # 32 buckets of relative positions
        block=_BLOCK,
        tail=0,
        head=_DENSE_HEAD,
        biases=d + L * _BLOCK_BIASES,
        norms=2 * d + L * 4 * d,
    ),
    "gpt2": Family(
        lambda: hf.GPT2Config(
            n_embd=d, n_layer=L, n_head=H, n_inner=m, vocab_size=V, n_positions=P, pad_token_id=0,
            bos_token_id=1, eos_token_id=1, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        ),
        embedding=(V + P) * d,
        block=_BLOCK,
        tail=2 * d,
        head=CLASSES * d,
        biases=L * _BLOCK_BIASES + d,
        norms=L * 4 * d + 2 * d,
    ),
    "opt": Family(
        lambda: hf.OPTConfig(
            hidden_size=d, num_hidden_layers=L, num_attention_heads=H, ffn_dim=m, vocab_size=V,
            word_embed_proj_dim=e, max_position_embeddings=P, dropout=0.0, attention_dropout=0.0,
        ),
        embedding=V * e + (P + 2) * d + 2 * e * d,
        block=_BLOCK,
        tail=2 * d,
        head=CLASSES * e,
        biases=L * _BLOCK_BIASES + d,
        norms=L * 4 * d + 2 * d,
        embedding_width=e,
        tolerance=1e-5,
    ),
    "llama": Family(
        lambda: hf.LlamaConfig(
            hidden_size=d, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=H // 2,
            intermediate_size=m, vocab_size=V, max_position_embeddings=P, pad_token_id=0,
        ),
        embedding=V * d,
        block=2 * d * d + 2 * d * (d // 2) + 3 * d * m + 2 * d,
        tail=d,
        head=CLASSES * d,
        biases=0,
        norms=L * 2 * d + d,
        key_width=d // 2,
        tolerance=1e-5,
    ),
    "t5": Family(
        lambda: hf.T5Config(
            d_model=d, num_layers=L, num_heads=H, d_ff=m, d_kv=d // H, vocab_size=V,
            dropout_rate=0.0,
        ),
        embedding=V * d + 32 * H,  # the first block owns the 32 buckets for all
        block=4 * d * d + 2 * d * m + 2 * d,
        tail=d,
        head=0,
        biases=0,
        norms=L * 2 * d + d,
        tolerance=1e-5,
    ),
}  # fmt: skip


@cache
def build(
    family: str,
    kind: str = "classification",
    attention: str = "eager",
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> hf.PreTrainedModel:
    """A model in evaluation mode, all of its parameters random (biases and norms too)."""
    config = FAMILIES[family].config()
    config.update({"num_labels": CLASSES} | changes)
    auto = {
        "classification": hf.AutoModelForSequenceClassification,
        "causal-lm": hf.AutoModelForCausalLM,
        "masked-lm": hf.AutoModelForMaskedLM,
        "backbone": hf.AutoModel,
    }[kind]
    torch.manual_seed(1)
    if family == "t5" and kind == "classification":
        config._attn_implementation = attention
        model = hf.T5EncoderModel(config)
    else:
        chosen = {} if family == "mpnet" else {"attn_implementation": attention}
        model = auto.from_config(config, **chosen)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def batch_of(model: hf.PreTrainedModel, pad: int = 2) -> dict[str, Tensor]:
    """Three texts; the first ends ``pad`` tokens before the others."""
    ids = torch.randint(3, V, (3, TOKENS), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if pad:
        ids[0, -pad:] = model.config.pad_token_id or 0
        mask[0, -pad:] = 0
    return {"input_ids": ids, "attention_mask": mask}
