"""Small random models of further architectures: `make slow` has their cells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import transformers as hf

from tests.deltas.family import (
    BLOCK,
    BLOCK_BIASES,
    CLASSES,
    DENSE_HEAD,
    LINEAR,
    LLAMA,
    LLAMA_BLOCK,
    T5,
    T5_BLOCK,
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

_HALF = d // 2  # width of keys and values that two queries share
_EXPERTS, _SMALL = 3, 16
_EXPERT = 3 * d * _SMALL
_ATTENTION = 2 * d * d + 2 * d * _HALF
_MOE: dict[str, Any] = {"moe_intermediate_size": _SMALL, "num_experts_per_tok": 2}
_LATENT = 8  # DeepSeek's latents of queries and of keys and values
_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_LLAMA: dict[str, Any] = LLAMA | _IDS
_KEY = d // H + 4  # its keys: without positions, and 4 features with
_LATENTS = 2 * d * _LATENT + 4 * d + 2 * _LATENT + _LATENT * H * (_KEY + 2 * (d // H)) + d * d
_MAMBA = 2 * d + 2 * 4  # features that its convolution mixes

_llama = Family(
    lambda: hf.MistralConfig(**_LLAMA, sliding_window=5),
    embedding=V * d,
    block=LLAMA_BLOCK,
    tail=d,
    head=CLASSES * d,
    biases=0,
    norms=L * 2 * d + d,
    key_width=_HALF,
    tolerance=1e-5,
)
_shifted = replace(  # normalisations with a shift
    _llama,
    config=lambda: hf.StableLmConfig(**_LLAMA),
    block=LLAMA_BLOCK + 2 * d,
    tail=2 * d,
    biases=L * 2 * d + d,
    norms=L * 4 * d + 2 * d,
    down_bias=0,
)

MORE: dict[str, Family] = {
    "camembert": Family(
        bert_like(hf.CamembertConfig, type_vocab_size=1),
        embedding=(V + P + 1) * d + 2 * d,
        block=BLOCK,
        tail=0,
        head=DENSE_HEAD,
        biases=d + L * BLOCK_BIASES,
        norms=2 * d + L * 4 * d,
    ),
    "albert": Family(
        bert_like(hf.AlbertConfig, embedding_size=e, classifier_dropout_prob=0.0),
        embedding=(V + P + 2) * e + 2 * e + e * d + d,
        block=BLOCK,
        tail=LINEAR,
        head=CLASSES * (d + 1),
        biases=e + d + BLOCK_BIASES + d,
        norms=2 * e + 4 * d,
        embedding_width=e,
        layers=1,  # called twice
    ),
    "mistral": _llama,
    "qwen2": replace(
        _llama,
        config=lambda: hf.Qwen2Config(**_LLAMA),
        block=LLAMA_BLOCK + 2 * d,
        biases=L * 2 * d,
        down_bias=0,
    ),
    "gemma": replace(_llama, config=lambda: hf.GemmaConfig(**_LLAMA, head_dim=d // H)),
    "gemma2": replace(
        _llama,
        config=lambda: hf.Gemma2Config(**_LLAMA, head_dim=d // H, sliding_window=5),
        block=LLAMA_BLOCK + 2 * d,
        norms=L * 4 * d + d,
        eager=True,
    ),
    "cohere": replace(
        _llama,
        config=lambda: hf.CohereConfig(**_LLAMA),
        block=LLAMA_BLOCK - d,  # attention and MLP read one normalised state
        norms=L * d + d,
        head=0,  # tied to the embedding
        kind=hf.AutoModelForCausalLM,
    ),
    "olmo2": replace(
        _llama,
        config=lambda: hf.Olmo2Config(**_LLAMA),
        block=LLAMA_BLOCK + d + _HALF,  # norms of queries and keys
        norms=L * (3 * d + _HALF) + d,
    ),
    "smollm3": replace(
        _llama, config=lambda: hf.SmolLM3Config(**_LLAMA, no_rope_layer_interval=2)
    ),
    "phi3": replace(_llama, config=lambda: hf.Phi3Config(**_LLAMA, resid_pdrop=0.0)),
    "stablelm": _shifted,
    "nemotron": replace(
        _shifted,
        config=lambda: hf.NemotronConfig(**_LLAMA),
        block=_ATTENTION + 2 * d * m + 4 * d,
    ),
    "phi": replace(
        _shifted,
        config=lambda: hf.PhiConfig(**_LLAMA, resid_pdrop=0.0),
        block=_ATTENTION + 3 * d + 2 * d * m + m + d + 2 * d,
        biases=L * (3 * d + m + d + d) + d,
        norms=L * 2 * d + 2 * d,
        down_bias=d,
    ),
    "gptj": Family(
        lambda: hf.GPTJConfig(
            n_embd=d, n_layer=L, n_head=H, n_inner=m, vocab_size=V, n_positions=P, rotary_dim=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_IDS,
        ),
        embedding=V * d,
        block=4 * d * d + 2 * d * m + m + d + 2 * d,
        tail=2 * d,
        head=CLASSES * d,
        biases=L * (m + d + d) + d,
        norms=L * 2 * d + 2 * d,
        tolerance=1e-5,
        eager=True,
    ),
    "bloom": Family(
        lambda: hf.BloomConfig(
            hidden_size=d, n_layer=L, n_head=H, vocab_size=V, hidden_dropout=0.0,
            attention_dropout=0.0, **_IDS,
        ),
        embedding=V * d + 2 * d,
        block=4 * LINEAR + 2 * d * 4 * d + 4 * d + d + 4 * d,
        tail=2 * d,
        head=CLASSES * d,
        biases=d + L * (4 * d + 4 * d + d + 2 * d) + d,
        norms=2 * d + L * 4 * d + 2 * d,
        inner=4 * d,
        tolerance=1e-5,
        eager=True,
    ),
    "mpt": Family(
        lambda: hf.MptConfig(
            d_model=d, n_heads=H, n_layers=L, vocab_size=V, max_seq_len=P, **_IDS
        ),
        embedding=V * d,
        block=4 * d * d + 2 * d * 4 * d + 2 * d,
        tail=d,
        head=CLASSES * d,
        biases=0,
        norms=L * 2 * d + d,
        inner=4 * d,
        tolerance=1e-5,
        eager=True,
    ),
    "falcon": Family(
        lambda: hf.FalconConfig(
            hidden_size=d, num_hidden_layers=L, num_attention_heads=H, num_kv_heads=H // 2,
            new_decoder_architecture=True, ffn_hidden_size=m, vocab_size=V, **_IDS,
        ),
        embedding=V * d,
        block=_ATTENTION + 2 * d * m + 4 * d,
        tail=2 * d,
        head=CLASSES * d,
        biases=L * 2 * d + d,
        norms=L * 4 * d + 2 * d,
        key_width=_HALF,
        down_bias=0,
        tolerance=1e-5,
    ),
    "falcon-alibi": Family(
        lambda: hf.FalconConfig(
            hidden_size=d, num_hidden_layers=L, num_attention_heads=H, alibi=True, bias=True,
            multi_query=False, parallel_attn=False, ffn_hidden_size=m, vocab_size=V, **_IDS,
        ),
        embedding=V * d,
        block=BLOCK,
        tail=2 * d,
        head=CLASSES * d,
        biases=L * BLOCK_BIASES + d,
        norms=L * 4 * d + 2 * d,
        tolerance=1e-5,
    ),
    "mixtral": replace(
        _llama,
        config=lambda: hf.MixtralConfig(**_LLAMA, num_local_experts=_EXPERTS),
        block=_ATTENTION + _EXPERTS * (d + 3 * d * m) + 2 * d,
    ),
    "qwen2-moe": replace(
        _llama,
        config=lambda: hf.Qwen2MoeConfig(
            **_LLAMA, **_MOE, num_experts=_EXPERTS, shared_expert_intermediate_size=_SMALL
        ),
        block=_ATTENTION + 2 * d + _EXPERTS * (d + _EXPERT) + _EXPERT + d + 2 * d,
        biases=L * 2 * d,
    ),
    "deepseek-v3": replace(
        _llama,
        config=lambda: hf.DeepseekV3Config(
            **{**_LLAMA, "num_key_value_heads": H}, **_MOE, n_routed_experts=_EXPERTS, n_group=1,
            topk_group=1, first_k_dense_replace=1, q_lora_rank=_LATENT, kv_lora_rank=_LATENT,
            qk_rope_head_dim=4, qk_nope_head_dim=d // H, v_head_dim=d // H,
        ),
        block=_LATENTS + _EXPERTS * (d + _EXPERT) + _EXPERT + 2 * d,
        first_block=_LATENTS + 3 * d * m + 2 * d,
        norms=L * (2 * d + 2 * _LATENT) + d,
        query=(_LATENT, H * _KEY),
        value=(_LATENT, d),
        by_formula=("lokr",),
    ),
    "mamba2": Family(
        lambda: hf.Mamba2Config(
            hidden_size=d, num_hidden_layers=L, num_heads=H, head_dim=_SMALL, vocab_size=V,
            state_size=4, n_groups=1, expand=2, chunk_size=4, **_IDS,
        ),
        embedding=V * d,
        block=d * (2 * d + _MAMBA + H) + 5 * _MAMBA + 3 * H + 2 * d + 2 * d * d + d,
        tail=d,
        head=0,
        biases=L * (_MAMBA + H),  # of the convolution, and of the steps
        norms=L * (d + 2 * d) + d,  # of the block, and gated inside
        tolerance=1e-5,
        kind=hf.Mamba2Model,
        eager=True,
    ),
    "pegasus": Family(
        lambda: hf.PegasusConfig(
            d_model=d, encoder_layers=1, decoder_layers=1, encoder_attention_heads=H,
            decoder_attention_heads=H, encoder_ffn_dim=m, decoder_ffn_dim=m, vocab_size=V,
            max_position_embeddings=P, dropout=0.0, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0, forced_eos_token_id=None,
        ),
        embedding=V * d + 2 * P * d,
        block=BLOCK + 4 * LINEAR + 2 * d,
        first_block=BLOCK,
        tail=2 * 2 * d,
        head=0,  # tied to the embedding
        biases=L * BLOCK_BIASES + 4 * d + d + 2 * d,
        norms=L * 4 * d + 2 * d + 4 * d,
        kind=hf.PegasusForConditionalGeneration,
        unused=("embed_positions.weight",),  # sines, which it looks up without a gradient
    ),
    "mt5": Family(
        lambda: hf.MT5Config(
            **T5, num_layers=1, num_decoder_layers=1, dropout_rate=0.0, decoder_start_token_id=0
        ),
        embedding=V * d,
        block=T5_BLOCK + d * m + 4 * d * d + d + 32 * H,
        first_block=T5_BLOCK + d * m + 32 * H,
        tail=2 * d,
        head=0,  # tied to the embedding
        biases=0,
        norms=5 * d + 2 * d,
        tolerance=1e-5,
        kind=hf.MT5ForConditionalGeneration,
    ),
}  # fmt: skip
MORE = {name: replace(family, is_more=True) for name, family in MORE.items()}
