"""Small random models of nine families, and what each delta must cost on them.

The counts are formulas of the dimensions below, written here a second time on purpose: they never
ask a delta or a model. V tokens, P positions, d width, e embedding width, m inner width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from deltas import (
    BitFit,
    Delta,
    DeltaModel,
    FullFineTuning,
    HeadTuning,
    HoulsbyAdapter,
    LastLayers,
    LayerNormTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    SelectedModules,
    Subspace,
    attach,
)

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

METHODS: dict[str, tuple[Delta, Callable[[Family], int]]] = {
    "full": (FullFineTuning(), lambda f: f.total),
    "head": (HeadTuning(), lambda f: f.head),
    "bitfit": (BitFit(), lambda f: f.biases),
    "lora": (LoRA(rank=3), lambda f: L * 3 * (2 * d + d + f.key_width)),
    "houlsby": (HoulsbyAdapter(bottleneck=5), lambda f: L * 2 * (2 * 5 * d + d + 5)),
    "prefix": (PrefixTuning(length=3, init_std=1.0), lambda f: L * 2 * 3 * f.key_width),
    "prompt": (PromptTuning(length=4), lambda f: 4 * f.embedding_width),
    "last-layers": (LastLayers(num_layers=1), lambda f: f.block),
    "layer-norm": (LayerNormTuning(), lambda f: f.norms),
    "selected-modules": (
        SelectedModules(("mlp.down",)),
        lambda f: L * (m * d + (d if f.biases else 0)),
    ),
    "subspace": (Subspace(dimension=11), lambda _: 11),
}

# What an architecture has not; each refusal is tested for its message in test_strictness.py.
REFUSED = {("llama", "bitfit"), ("t5", "bitfit"), ("t5", "head"), ("mpnet", "prefix")}
# Methods with a random start or random constants: the seed of `attach` matters to them.
RANDOM = {"lora", "houlsby", "prefix", "prompt", "subspace"}
PAIRS = [(f, name) for f in FAMILIES for name in METHODS if (f, name) not in REFUSED]


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


def out(model: nn.Module, batch: dict[str, Tensor], **more: Any) -> Tensor:
    """The logits; the last hidden states, where there are none."""
    output = model(**batch, **more)
    return output.logits if hasattr(output, "logits") else output[0]


def move(controlled: DeltaModel, scale: float = 0.2, seed: int = 3) -> DeltaModel:
    """Move all controls away from their start, which often is a stationary point."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in controlled.trainable().values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter.dtype))
    return controlled


def attached(model: hf.PreTrainedModel, *deltas: Delta, seed: int = 0) -> DeltaModel:
    """The controlled model, shown two batches where a delta depends on the data."""
    controlled = attach(model, *deltas, seed=seed)
    if controlled.needs_data:
        batches = [batch_of(model, pad) for pad in (0, 2)]
        controlled.prepare(lambda: (out(controlled, b).square().sum() for b in batches))
    return controlled


def snapshot(model: hf.PreTrainedModel) -> dict[str, Any]:
    """Everything that detaching has to give back."""
    modules = list(model.named_modules())
    return {
        "state": {k: (id(v), v.clone()) for k, v in model.state_dict(keep_vars=True).items()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "attention": [m_.config._attn_implementation for _, m_ in modules if hasattr(m_, "config")],
        "hooks": [(n, len(h._forward_hooks), len(h._forward_pre_hooks)) for n, h in modules],
        "modules": [(n, id(h)) for n, h in modules],
        "marks": [(n, a) for n, h in modules for a in h.__dict__ if "deltacontrol" in a],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Fails with the first difference between two snapshots."""
    old, new = before["state"], after["state"]
    assert list(old) == list(new)
    for key, (identity, value) in old.items():
        assert new[key][0] == identity, f"{key} is another tensor"
        assert torch.equal(new[key][1], value), f"{key} has changed"
    for part in before.keys() - {"state"}:
        assert before[part] == after[part], part


def gradients(loss: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Gradients; zero where the loss does not depend on a parameter."""
    parameters = list(parameters)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def relative(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """||a - b|| / ||b|| over all tensors together."""
    left = torch.cat([x.detach().reshape(-1) for x in a])
    right = torch.cat([x.detach().reshape(-1) for x in b])
    return float((left - right).norm() / right.norm().clamp_min(1e-300))
