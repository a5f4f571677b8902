"""Where the model families keep their blocks and sites.

The names are those of `deltacontrol.deltas.editing.sites`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Paths of one model family: block lists in the backbone, and sites inside a block.

    ``sites`` maps a semantic name to a regular expression relative to the block, with an optional
    ``[i/n]`` at its end: the i-th of n equal parts of the output features, or ``[i/n of a head]``:
    of every head's output features. ``head`` names the task head's modules in models that keep them
    beside the parts of the backbone, not beside the backbone.
    """

    blocks: tuple[str, ...]
    sites: dict[str, str]
    head: tuple[str, ...] = ()


def _bert(q="attention.self.query", k="attention.self.key", v="attention.self.value",
          o="attention.output.dense", core="attention.self") -> Architecture:  # fmt: skip
    return Architecture(
        ("encoder.layer",),
        {
            "attention.query": q,
            "attention.key": k,
            "attention.value": v,
            "attention.output": o,
            "mlp.up": "intermediate.dense",
            "mlp.down": "output.dense",
            "attention": core,
        },
    )


_LLAMA = Architecture(
    ("layers",),
    {
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
        "attention": "self_attn",
        "mlp": "mlp",
    },
)
_BART = Architecture(
    ("encoder.layers", "decoder.layers"),
    {
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.out_proj",
        "mlp.up": "fc1",
        "mlp.down": "fc2",
        "attention": "self_attn",
    },
    head=("projector", "classifier"),  # of WhisperForAudioClassification
)
_VIT = {
    "attention.query": "attention.q_proj",
    "attention.key": "attention.k_proj",
    "attention.value": "attention.v_proj",
    "attention.output": "attention.o_proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
    "attention": "attention",
    "mlp": "mlp",
}
_ATTN = "attention.attn"
ARCHITECTURES: dict[str, Architecture] = {
    "bert": _bert(),
    "roberta": _bert(),
    "xlm-roberta": _bert(),
    "electra": _bert(),
    "mpnet": _bert(f"{_ATTN}.q", f"{_ATTN}.k", f"{_ATTN}.v", f"{_ATTN}.o", _ATTN),
    "distilbert": Architecture(
        ("transformer.layer",),
        {
            "attention.query": "attention.q_lin",
            "attention.key": "attention.k_lin",
            "attention.value": "attention.v_lin",
            "attention.output": "attention.out_lin",
            "mlp.up": "ffn.lin1",
            "mlp.down": "ffn.lin2",
            "attention": "attention",
            "mlp": "ffn",
        },
    ),
    "gpt2": Architecture(
        ("h",),
        {
            "attention.query": "attn.c_attn[0/3]",
            "attention.key": "attn.c_attn[1/3]",
            "attention.value": "attn.c_attn[2/3]",
            "attention.output": "attn.c_proj",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
            "attention": "attn",
            "mlp": "mlp",
        },
    ),
    "opt": Architecture(("decoder.layers",), _BART.sites),
    "bart": _BART,
    "whisper": _BART,
    "gpt_neox": Architecture(
        ("layers",),
        {
            "attention.query": "attention.query_key_value[0/3 of a head]",
            "attention.key": "attention.query_key_value[1/3 of a head]",
            "attention.value": "attention.query_key_value[2/3 of a head]",
            "attention.output": "attention.dense",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
            "attention": "attention",
            "mlp": "mlp",
        },
    ),
    "modernbert": Architecture(
        ("layers",),
        {
            "attention.query": "attn.Wqkv[0/3]",
            "attention.key": "attn.Wqkv[1/3]",
            "attention.value": "attn.Wqkv[2/3]",
            "attention.output": "attn.Wo",
            "mlp.up": "mlp.Wi[1/2]",  # act(Wi[0/2]) ⊙ Wi[1/2]
            "mlp.down": "mlp.Wo",
            "attention": "attn",
            "mlp": "mlp",
        },
    ),
    "vit": Architecture(("layers",), _VIT),
    "dinov2": Architecture(("encoder.layer",), _VIT),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": _LLAMA,
    "t5": Architecture(
        ("encoder.block", "decoder.block"),
        {
            "attention.query": r"layer\.\d\.SelfAttention\.q",
            "attention.key": r"layer\.\d\.SelfAttention\.k",
            "attention.value": r"layer\.\d\.SelfAttention\.v",
            "attention.output": r"layer\.\d\.SelfAttention\.o",
            "mlp.up": r"layer\.\d\.DenseReluDense\.wi(_1)?",
            "mlp.down": r"layer\.\d\.DenseReluDense\.wo",
            "attention": r"layer\.\d\.SelfAttention",
            "mlp": r"layer\.\d\.DenseReluDense",
        },
    ),
}
