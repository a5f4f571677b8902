"""Configurations of the real peft by type: options on several architectures.

`test_interop` holds the ten types that came first in detail; here every type has its options, and
the whole is a few hundred adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.deltas.peft_models import peft

LM = "causal-lm"
KINDS = {"gpt2": LM, "llama": LM, "opt": LM, "gemma3": LM, "qwen3": LM, "gpt_neox": LM}
QV = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
QV |= {"t5": ["q", "v"], "roberta": ["query"], "distilbert": ["q_lin"], "gemma3": ["q_proj"]}
QV |= {"qwen3": ["q_proj", "k_proj"], "opt": ["q_proj", "out_proj"], "electra": ["key"]}
QV |= {"gpt_neox": ["query_key_value"]}
UP = {"bert": "intermediate.dense", "gpt2": "c_fc", "llama": "up_proj", "t5": "wi"}
UP |= {"qwen3": "gate_proj", "opt": "fc1", "roberta": "intermediate.dense", "distilbert": "lin1"}
DOWN = {"bert": "output.dense", "gpt2": "mlp.c_proj", "llama": "down_proj", "t5": "wo"}
TABLE = {"bert": "word_embeddings", "gpt2": "wte", "llama": "embed_tokens", "t5": "embed_tokens"}
TABLE |= {"gemma3": "embed_tokens"}
FOUR = ("bert", "gpt2", "llama", "t5")
# Where peft acts at Linear modules alone.
LINEAR = ("bert", "llama", "t5")
WITH_BIAS = ("bert",)

Case = tuple[str, str, type, dict[str, Any]]


def _options() -> Iterator[tuple[str, type, tuple[str, ...], list[dict[str, Any]], bool]]:
    """Type, its class, architectures, options, and whether it has the field ``bias``."""
    small = {"r": 4, "lora_alpha": 7}
    lora = [small, {**small, "use_rslora": True}, {**small, "use_dora": True}]
    yield "lora", peft.LoraConfig, FOUR, lora, True
    start = {"init_r": 4, "target_r": 2, "total_step": 100}
    yield "adalora", peft.AdaLoraConfig, FOUR, [start, {**start, "lora_alpha": 9}], True
    yield "ia3", peft.IA3Config, FOUR, [{"feedforward_modules": []}], False
    vera = [{"r": 6, "projection_prng_key": 3}, {"r": 40, "save_projection": False}]
    yield "vera", peft.VeraConfig, FOUR, vera, True
    yield "loha", peft.LoHaConfig, LINEAR, [{"r": 3, "alpha": 5}], False
    kronecker = [{"r": 2}, {"r": 2, "decompose_both": True}, {"r": 9, "decompose_factor": 4}]
    yield "lokr", peft.LoKrConfig, LINEAR, kronecker, False
    oft = [
        {"oft_block_size": 8},
        {"oft_block_size": 0, "r": 2, "block_share": True},
        {"oft_block_size": 4, "use_cayley_neumann": False},
        {"oft_block_size": 16, "num_cayley_neumann_terms": 7},
    ]
    yield "oft", peft.OFTConfig, LINEAR, oft, True
    boft = [{"boft_block_size": 4}, {"boft_block_size": 0, "boft_block_num": 4}]
    yield "boft", peft.BOFTConfig, LINEAR, boft, True
    yield "hra", peft.HRAConfig, LINEAR, [{"r": 4}, {"r": 3}, {"r": 3, "apply_GS": True}], True
    road = [{"variant": f"road_{n}", "group_size": g} for n, g in ((1, 8), (2, 16), (4, 4))]
    yield "road", peft.RoadConfig, LINEAR, road, False
    # peft transforms in float32, and its rounding grows with the scaling; its default of 150 is
    # held by the weights themselves in test_interop_types.
    fourier = [
        {"n_frequency": 40, "scaling": 7.5},
        {"n_frequency": 200, "random_loc_seed": 5, "scaling": 9},
    ]
    yield "fourierft", peft.FourierFTConfig, FOUR, fourier, True
    yield "c3a", peft.C3AConfig, LINEAR, [{"block_size": 8}, {"block_size": 16}], True
    yield "hira", peft.HiraConfig, FOUR, [{"r": 4}, {"r": 2, "rank_pattern": {"x": 3}}], False
    yield "delora", peft.DeloraConfig, LINEAR, [{"r": 4}, {"r": 3, "delora_lambda": 2}], True
    miss = [
        {"r": 4},
        {"r": 5},
        {"r": 4, "init_weights": "mini", "mini_r": 8},
        {"r": 8, "init_weights": "bat"},
    ]
    yield "miss", peft.MissConfig, LINEAR, miss, True
    gralora = [{"r": 4, "gralora_k": 4}, {"r": 4, "gralora_k": 2, "hybrid_r": 3, "alpha": 7}]
    yield "gralora", peft.GraloraConfig, FOUR, gralora, True
    rand = [
        {"r": 5, "projection_prng_key": 3},
        {"r": 4, "sparse": True, "randlora_alpha": 8, "save_projection": False},
        {"r": 8, "very_sparse": True},
    ]
    yield "randlora", peft.RandLoraConfig, FOUR, rand, True
    bank = [{"r": 3, "vector_length": 8, "num_vectors": 12, "topk": 3}]
    yield "vblora", peft.VBLoRAConfig, FOUR, bank, True
    yield "beft", peft.BeftConfig, WITH_BIAS, [{}], False


# Fields of single types that hold other values by module.
_PATTERNS: list[tuple[str, type, tuple[str, ...], dict[str, Any], dict[str, Any]]] = [
    ("lora", peft.LoraConfig, FOUR, {"r": 4}, {"rank_pattern": 2, "alpha_pattern": 5}),
    ("loha", peft.LoHaConfig, LINEAR, {"r": 3}, {"rank_pattern": 2}),
    ("delora", peft.DeloraConfig, LINEAR, {"r": 4}, {"rank_pattern": 3, "lambda_pattern": 2}),
    ("fourierft", peft.FourierFTConfig, FOUR, {"n_frequency": 40}, {"n_frequency_pattern": 30}),
    ("c3a", peft.C3AConfig, LINEAR, {"block_size": 8}, {"block_size_pattern": 16}),
]


def cases() -> Iterator[Case]:
    """Name, family, peft's class and its fields."""
    for name, config, families, options, has_bias in _options():
        fields = set(config.__dataclass_fields__)  # type: ignore[attr-defined]
        for i, option in enumerate(options):
            for f in families:
                targets = [*QV[f], UP[f]] if i == 0 else QV[f]
                yield f"{name}-{i}", f, config, {"target_modules": targets, **option}
        first, f = options[0], families[0]
        if "layers_to_transform" in fields:
            chosen = {"target_modules": QV[f], "layers_to_transform": [1]}
            yield f"{name}-layers", f, config, {**chosen, **first}
        if has_bias:
            word = "MiSS_only" if name == "miss" else f"{name}_only"
            word = {"adalora": "lora_only", "fourierft": "fourier_only"}.get(name, word)
            for bias in ("all", word):
                yield f"{name}-{bias}", f, config, {"target_modules": QV[f], **first, "bias": bias}
        if "modules_to_save" in fields and name not in ("beft",):
            saved = {"target_modules": QV[f], "modules_to_save": ["pooler"]}
            yield f"{name}-saved", f, config, {**saved, **first}
        for f in ("qwen3", "opt", "roberta", "distilbert"):
            if name not in ("beft",):
                yield f"{name}-more", f, config, {"target_modules": [*QV[f], UP[f]], **first}
    for name, config, families, first, patterns in _PATTERNS:
        for f in families:
            at = {field: {UP[f]: value} for field, value in patterns.items()}
            yield f"{name}-pattern", f, config, {"target_modules": [*QV[f], UP[f]], **first, **at}
    wide = {"bert": ["query"], "gpt2": ["c_attn"]}
    for f, names in wide.items():  # ranks above the width
        yield "lora-wide", f, peft.LoraConfig, {"target_modules": names, "r": 48}
    for kind in (peft.HiraConfig, peft.DeloraConfig, peft.LoHaConfig):
        yield "wide", "bert", kind, {"target_modules": ["query"], "r": 48}
    heads = {"target_modules": ["query"], "r": 4, "bias": "all"}
    yield "lora-head-bias", "roberta", peft.LoraConfig, heads
    yield "lora-dora-wide", "bert", peft.LoraConfig, {**heads, "r": 48, "use_dora": True}
    for f, name in TABLE.items():
        table = {"target_modules": [*QV[f], name], "r": 4, "use_dora": True}
        yield "lora-dora-table", f, peft.LoraConfig, table
    down = {"r": 5, "projection_prng_key": 1}  # a module that is wider at its input
    for f in FOUR:
        yield "randlora-down", f, peft.RandLoraConfig, {"target_modules": [DOWN[f]], **down}
        tokens = {"token_indices": [*range(5, 60)]}
        yield "tokens", f, peft.TrainableTokensConfig, tokens
    yield "tokens", "gemma3", peft.TrainableTokensConfig, {"token_indices": [9, 4, 31, 50]}


CASES: list[Case] = list(cases())
