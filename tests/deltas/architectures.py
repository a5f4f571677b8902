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

    @property
    def total(self) -> int:
        first = self.block if self.first_block is None else self.first_block
        return self.embedding + first + (L - 1) * self.block + self.tail + self.head


def _bert_like(kind: type, **more: Any) -> Callable[[], hf.PreTrainedConfig]:
    sizes = {"hidden_size": d, "num_hidden_layers": L, "num_attention_heads": H}
    sizes |= {"intermediate_size": m, "vocab_size": V, "max_position_embeddings": P}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return lambda: kind(**sizes, **off, **more)


_LINEAR = d * d + d
_BLOCK = 4 * _LINEAR + 2 * d * m + m + d + 2 * 2 * d
_BLOCK_BIASES = 4 * d + m + d + 2 * d
_DENSE_HEAD = _LINEAR + CLASSES * (d + 1)
_PATCHES, _PATCH = 4, 3 * 4 * 4
_LLAMA = {"hidden_size": d, "num_hidden_layers": L, "num_attention_heads": H}
_LLAMA |= {"num_key_value_heads": H // 2, "intermediate_size": m, "vocab_size": V}
_LLAMA |= {"max_position_embeddings": P, "pad_token_id": 0}
_LLAMA_BLOCK = 2 * d * d + 2 * d * (d // 2) + 3 * d * m + 2 * d
_VIT = {"hidden_size": d, "num_hidden_layers": L, "num_attention_heads": H}
_VIT |= {"image_size": 8, "patch_size": 4, "hidden_dropout_prob": 0.0}
_T5 = {"d_model": d, "num_heads": H, "d_ff": m, "d_kv": d // H, "vocab_size": V}
_T5_BLOCK = 4 * d * d + 2 * d * m + 2 * d

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
        lambda: hf.LlamaConfig(**_LLAMA),
        embedding=V * d,
        block=_LLAMA_BLOCK,
        tail=d,
        head=CLASSES * d,
        biases=0,
        norms=L * 2 * d + d,
        key_width=d // 2,
        tolerance=1e-5,
    ),
    "t5": Family(
        lambda: hf.T5Config(**_T5, num_layers=L, dropout_rate=0.0),
        embedding=V * d + 32 * H,  # the first block owns the 32 buckets for all
        block=_T5_BLOCK,
        tail=d,
        head=0,
        biases=0,
        norms=L * 2 * d + d,
        tolerance=1e-5,
        kind=hf.T5EncoderModel,
    ),
    "modernbert": Family(
        lambda: hf.ModernBertConfig(
            hidden_size=d, num_hidden_layers=L, num_attention_heads=H, intermediate_size=m,
            vocab_size=V, max_position_embeddings=P, pad_token_id=0, bos_token_id=1, eos_token_id=1,
            cls_token_id=1, sep_token_id=2, local_attention=4, global_attn_every_n_layers=2,
        ),
        embedding=V * d + d,
        block=4 * d * d + 3 * d * m + 2 * d,
        first_block=4 * d * d + 3 * d * m + d,  # it has no norm before its attention
        tail=d,
        head=d * d + d + CLASSES * (d + 1),
        biases=0,
        norms=d + L * 2 * d - d + d,
        tolerance=1e-5,
    ),
    "gpt_neox": Family(
        lambda: hf.GPTNeoXConfig(
            hidden_size=d, num_hidden_layers=L, num_attention_heads=H, intermediate_size=m,
            vocab_size=V, max_position_embeddings=P, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        ),
        embedding=V * d,
        block=_BLOCK,
        tail=2 * d,
        head=CLASSES * d,
        biases=L * _BLOCK_BIASES + d,
        norms=L * 4 * d + 2 * d,
        tolerance=1e-5,
    ),
    "qwen3": Family(
        lambda: hf.Qwen3Config(**_LLAMA, head_dim=d // H),
        embedding=V * d,
        block=_LLAMA_BLOCK + 2 * (d // H),  # norms of queries and keys
        tail=d,
        head=CLASSES * d,
        biases=0,
        norms=L * (2 * d + 2 * (d // H)) + d,
        key_width=d // 2,
        tolerance=1e-5,
    ),
    "gemma3": Family(
        lambda: hf.Gemma3TextConfig(
            **_LLAMA, head_dim=d // H, sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
        ),
        embedding=V * d,
        block=_LLAMA_BLOCK + 2 * d + 2 * (d // H),
        tail=d,
        head=CLASSES * d,
        biases=0,
        norms=L * (4 * d + 2 * (d // H)) + d,
        key_width=d // 2,
        tolerance=1e-5,
    ),
    "t5-seq2seq": Family(
        lambda: hf.T5Config(
            **_T5, num_layers=1, num_decoder_layers=1, dropout_rate=0.0, decoder_start_token_id=0
        ),
        embedding=V * d,
        block=_T5_BLOCK + 4 * d * d + d + 32 * H,  # the decoder's attends to the encoder as well
        first_block=_T5_BLOCK + 32 * H,
        tail=2 * d,
        head=0,  # tied to the embedding
        biases=0,
        norms=5 * d + 2 * d,
        tolerance=1e-5,
        kind=hf.T5ForConditionalGeneration,
    ),
    "bart": Family(
        lambda: hf.BartConfig(
            d_model=d, encoder_layers=1, decoder_layers=1, encoder_attention_heads=H,
            decoder_attention_heads=H, encoder_ffn_dim=m, decoder_ffn_dim=m, vocab_size=V,
            max_position_embeddings=P, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=2, forced_eos_token_id=None, dropout=0.0,
        ),
        embedding=V * d + 2 * (P + 2) * d + 2 * 2 * d,
        block=_BLOCK + 4 * _LINEAR + 2 * d,  # the decoder's attends to the encoder as well
        first_block=_BLOCK,
        tail=0,
        head=_DENSE_HEAD,
        biases=2 * d + L * _BLOCK_BIASES + 4 * d + d,
        norms=2 * 2 * d + L * 4 * d + 2 * d,
    ),
    "vit": Family(
        lambda: hf.ViTConfig(**_VIT, intermediate_size=m),
        embedding=d + (_PATCHES + 1) * d + (_PATCH + 1) * d,
        block=_BLOCK,
        tail=2 * d,
        head=CLASSES * (d + 1),
        biases=d + L * _BLOCK_BIASES + d,
        norms=L * 4 * d + 2 * d,
        tolerance=1e-5,
        reads="pixels",
        kind=hf.AutoModelForImageClassification,
    ),
    "dinov2": Family(
        lambda: hf.Dinov2Config(**_VIT, mlp_ratio=m // d),
        embedding=2 * d + (_PATCHES + 1) * d + (_PATCH + 1) * d,
        block=_BLOCK + 2 * d,  # the scales of both sub-layers
        tail=2 * d,
        head=CLASSES * (2 * d + 1),
        biases=d + L * _BLOCK_BIASES + d,
        norms=L * 4 * d + 2 * d,
        reads="pixels",
        kind=hf.AutoModelForImageClassification,
        unused=("mask_token",),  # for masked images
    ),
    "whisper": Family(
        lambda: hf.WhisperConfig(
            d_model=d, encoder_layers=L, decoder_layers=L, encoder_attention_heads=H,
            decoder_attention_heads=H, encoder_ffn_dim=m, decoder_ffn_dim=m, vocab_size=V,
            max_source_positions=6, max_target_positions=P, num_mel_bins=5, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, classifier_proj_size=8,
            dropout=0.0,
        ),
        embedding=3 * 5 * d + d + 3 * d * d + d + 6 * d,  # two convolutions, positions
        block=_BLOCK - d,  # keys have no bias
        tail=2 * d,
        head=8 * (d + 1) + CLASSES * (8 + 1),
        biases=2 * d + L * (_BLOCK_BIASES - d) + d,
        norms=L * 4 * d + 2 * d,
        reads="audio",
        kind=hf.AutoModelForAudioClassification,
    ),
}  # fmt: skip


ONE_STACK = [f for f in FAMILIES if f not in ("bart", "t5-seq2seq")]
TEXT = [f for f in ONE_STACK if FAMILIES[f].reads == "tokens"]


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
        "classification": FAMILIES[family].kind,
        "causal-lm": hf.AutoModelForCausalLM,
        "masked-lm": hf.AutoModelForMaskedLM,
        "backbone": hf.AutoModel,
    }[kind]
    torch.manual_seed(1)
    if family != "mpnet":
        config._attn_implementation = attention
    model = auto.from_config(config) if hasattr(auto, "from_config") else auto(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def batch_of(model: hf.PreTrainedModel, pad: int = 2) -> dict[str, Tensor]:
    """Three examples; of three texts, the first ends ``pad`` tokens before the others."""
    return texts(model, (TOKENS - pad, TOKENS, TOKENS))


def texts(
    model: hf.PreTrainedModel, lengths: tuple[int, ...], seed: int = 2, width: int = 0
) -> dict[str, Tensor]:
    """Random inputs of the model, one for each of ``lengths``; a row does not depend on the others.

    Texts are padded to the longest, or to ``width``. Images and sounds have one size.
    """
    config, count = model.config, len(lengths)
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)
        return {"pixel_values": pixels.to(model.dtype)}
    if model.main_input_name == "input_features":
        features = torch.randn(count, 5, 12, generator=generator, dtype=torch.float64)
        return {"input_features": features.to(model.dtype)}
    width = max(width, *lengths)
    ids = torch.randint(3, V, (count, width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    if config.model_type == "bart":  # it reads the classes from the end's state
        ids[torch.arange(count), torch.tensor(lengths) - 1] = config.eos_token_id
    batch = {"input_ids": ids.masked_fill(mask == 0, config.pad_token_id or 0)}
    batch["attention_mask"] = mask
    if isinstance(model, hf.T5ForConditionalGeneration):
        batch["decoder_input_ids"] = torch.randint(3, V, (count, 4), generator=generator)
    return batch
