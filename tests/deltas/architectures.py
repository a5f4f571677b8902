"""Small random models of eighteen architectures and of those of ``more_architectures``."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.deltas.family import (  # noqa: F401 - tests take all of it from here
    BLOCK,
    BLOCK_BIASES,
    CLASSES,
    DENSE_HEAD,
    LINEAR,
    LLAMA,
    LLAMA_BLOCK,
    PATCH,
    PATCHES,
    T5,
    T5_BLOCK,
    TOKENS,
    VIT,
    Family,
    H,
    L,
    P,
    V,
    bert_like,
    d,
    e,
    m,
)  # fmt: skip
from tests.deltas.more_architectures import MORE

MAIN: dict[str, Family] = {
    "bert": Family(
        bert_like(hf.BertConfig),
        embedding=(V + P + 2) * d + 2 * d,
        block=BLOCK,
        tail=LINEAR,  # the pooler
        head=CLASSES * (d + 1),
        biases=d + L * BLOCK_BIASES + d,
        norms=2 * d + L * 4 * d,
    ),
    "roberta": Family(
        bert_like(hf.RobertaConfig, type_vocab_size=1),
        embedding=(V + P + 1) * d + 2 * d,
        block=BLOCK,
        tail=0,
        head=DENSE_HEAD,
        biases=d + L * BLOCK_BIASES,
        norms=2 * d + L * 4 * d,
    ),
    "electra": Family(
        bert_like(hf.ElectraConfig, embedding_size=e, summary_last_dropout=0.0),
        embedding=(V + P + 2) * e + 2 * e + e * d + d,
        block=BLOCK,
        tail=0,
        head=DENSE_HEAD,
        biases=e + d + L * BLOCK_BIASES,
        norms=2 * e + L * 4 * d,
        embedding_width=e,
    ),
    "distilbert": Family(
        lambda: hf.DistilBertConfig(
            dim=d, n_layers=L, n_heads=H, hidden_dim=m, vocab_size=V, max_position_embeddings=P,
            dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
        ),
        embedding=(V + P) * d + 2 * d,
        block=BLOCK,
        tail=0,
        head=DENSE_HEAD,
        biases=d + L * BLOCK_BIASES,
        norms=2 * d + L * 4 * d,
    ),
    "mpnet": Family(
        bert_like(hf.MPNetConfig),
        embedding=(V + P) * d + 2 * d + 32 * H,  # 32 buckets of relative positions
        block=BLOCK,
        tail=0,
        head=DENSE_HEAD,
        biases=d + L * BLOCK_BIASES,
        norms=2 * d + L * 4 * d,
        eager=True,
    ),
    "gpt2": Family(
        lambda: hf.GPT2Config(
            n_embd=d, n_layer=L, n_head=H, n_inner=m, vocab_size=V, n_positions=P, pad_token_id=0,
            bos_token_id=1, eos_token_id=1, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        ),
        embedding=(V + P) * d,
        block=BLOCK,
        tail=2 * d,
        head=CLASSES * d,
        biases=L * BLOCK_BIASES + d,
        norms=L * 4 * d + 2 * d,
    ),
    "opt": Family(
        lambda: hf.OPTConfig(
            hidden_size=d, num_hidden_layers=L, num_attention_heads=H, ffn_dim=m, vocab_size=V,
            word_embed_proj_dim=e, max_position_embeddings=P, dropout=0.0, attention_dropout=0.0,
        ),
        embedding=V * e + (P + 2) * d + 2 * e * d,
        block=BLOCK,
        tail=2 * d,
        head=CLASSES * e,
        biases=L * BLOCK_BIASES + d,
        norms=L * 4 * d + 2 * d,
        embedding_width=e,
        tolerance=1e-5,
    ),
    "llama": Family(
        lambda: hf.LlamaConfig(**LLAMA),
        embedding=V * d,
        block=LLAMA_BLOCK,
        tail=d,
        head=CLASSES * d,
        biases=0,
        norms=L * 2 * d + d,
        key_width=d // 2,
        tolerance=1e-5,
    ),
    "t5": Family(
        lambda: hf.T5Config(**T5, num_layers=L, dropout_rate=0.0),
        embedding=V * d + 32 * H,  # the first block owns the 32 buckets for all
        block=T5_BLOCK,
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
        block=BLOCK,
        tail=2 * d,
        head=CLASSES * d,
        biases=L * BLOCK_BIASES + d,
        norms=L * 4 * d + 2 * d,
        tolerance=1e-5,
    ),
    "qwen3": Family(
        lambda: hf.Qwen3Config(**LLAMA, head_dim=d // H),
        embedding=V * d,
        block=LLAMA_BLOCK + 2 * (d // H),  # norms of queries and keys
        tail=d,
        head=CLASSES * d,
        biases=0,
        norms=L * (2 * d + 2 * (d // H)) + d,
        key_width=d // 2,
        tolerance=1e-5,
    ),
    "gemma3": Family(
        lambda: hf.Gemma3TextConfig(
            **LLAMA, head_dim=d // H, sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
        ),
        embedding=V * d,
        block=LLAMA_BLOCK + 2 * d + 2 * (d // H),
        tail=d,
        head=CLASSES * d,
        biases=0,
        norms=L * (4 * d + 2 * (d // H)) + d,
        key_width=d // 2,
        tolerance=1e-5,
    ),
    "t5-seq2seq": Family(
        lambda: hf.T5Config(
            **T5, num_layers=1, num_decoder_layers=1, dropout_rate=0.0, decoder_start_token_id=0
        ),
        embedding=V * d,
        block=T5_BLOCK + 4 * d * d + d + 32 * H,  # the decoder's attends to the encoder as well
        first_block=T5_BLOCK + 32 * H,
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
        block=BLOCK + 4 * LINEAR + 2 * d,  # the decoder's attends to the encoder as well
        first_block=BLOCK,
        tail=0,
        head=DENSE_HEAD,
        biases=2 * d + L * BLOCK_BIASES + 4 * d + d,
        norms=2 * 2 * d + L * 4 * d + 2 * d,
    ),
    "vit": Family(
        lambda: hf.ViTConfig(**VIT, intermediate_size=m),
        embedding=d + (PATCHES + 1) * d + (PATCH + 1) * d,
        block=BLOCK,
        tail=2 * d,
        head=CLASSES * (d + 1),
        biases=d + L * BLOCK_BIASES + d,
        norms=L * 4 * d + 2 * d,
        tolerance=1e-5,
        reads="pixels",
        kind=hf.AutoModelForImageClassification,
    ),
    "dinov2": Family(
        lambda: hf.Dinov2Config(**VIT, mlp_ratio=m // d),
        embedding=2 * d + (PATCHES + 1) * d + (PATCH + 1) * d,
        block=BLOCK + 2 * d,  # the scales of both sub-layers
        tail=2 * d,
        head=CLASSES * (2 * d + 1),
        biases=d + L * BLOCK_BIASES + d,
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
        block=BLOCK - d,  # keys have no bias
        tail=2 * d,
        head=8 * (d + 1) + CLASSES * (8 + 1),
        biases=2 * d + L * (BLOCK_BIASES - d) + d,
        norms=L * 4 * d + 2 * d,
        reads="audio",
        kind=hf.AutoModelForAudioClassification,
    ),
}  # fmt: skip

FAMILIES: dict[str, Family] = {**MAIN, **MORE}
# Those that tests take which go through each family: `make slow` has the cells of the others.
ONE_STACK = [f for f in MAIN if f not in ("bart", "t5-seq2seq")]
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
    config._experts_implementation = "eager"  # the others have no float64
    if not FAMILIES[family].eager:
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
    batch = {"input_ids": ids.masked_fill(mask == 0, getattr(config, "pad_token_id", None) or 0)}
    batch["attention_mask"] = mask
    if config.is_encoder_decoder and model.get_output_embeddings() is not None:
        batch["decoder_input_ids"] = torch.randint(3, V, (count, 4), generator=generator)
    return batch
