"""Claim 9: a prefix leaves the relative attention over the content, and adds a fixed span."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

if TYPE_CHECKING:
    from deltacontrol.experiments.measures.attention_probe import Attention, Probe

MODEL, TASK = "minilm-l6", "movie"
EXAMPLES, TOKENS = 8, 24
LENGTHS = (1, 2, 5)
SEEDS = (0, 1)
SCALE = 1.0


def _predict() -> dict[str, Any]:
    """Relative attention moves by 0; l prefix positions add at most l dimensions to each head."""
    return {"attention_change": 0.0, "dimensions": {str(n): n for n in LENGTHS}}


def _probe() -> Probe:
    from deltacontrol.experiments.measures.attention_probe import Probe

    return Probe.load(MODEL, TASK, EXAMPLES, TOKENS)


def _attention_change(plain: Attention, controlled: Attention) -> float:
    """Largest change of the content's attention weights, once they sum to one."""
    change = (controlled.content - plain.content).abs().amax(-1)
    return float(controlled.rows(change[..., None]).max())


def _left_over(plain: Attention, controlled: Attention) -> float:
    """Share of a head's output that is added outside of the first l directions, worst head.

    σ_{l+1} of the added term over σ_1 of the output, because the output's rounding error is in the
    term, which itself is tiny in a head that ignores the prefix.
    """
    import torch

    assert controlled.prefix is not None
    added = controlled.rows(controlled.output - (1 - controlled.gate) * plain.output)
    outside = torch.linalg.svdvals(added)[:, controlled.prefix[0].shape[1]]
    return float((outside / torch.linalg.svdvals(controlled.rows(controlled.output))[:, 0]).max())


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """Every layer of MiniLM by itself, at the inputs that real text gives it."""
    from deltacontrol.experiments.measures.attention_probe import each_layer

    attention, span, gates = {}, {}, []
    for name, plain, controlled in each_layer(_probe(), LENGTHS, SCALE, SEEDS):
        attention[name] = _attention_change(plain, controlled) - prediction["attention_change"]
        span[name] = _left_over(plain, controlled)
        gates.append(float(controlled.rows(controlled.gate).mean()))
    return Evidence(
        value=max(*attention.values(), *span.values()),
        details={
            "largest change of relative attention": max(attention.values()),
            "largest share outside of l dimensions": max(span.values()),
            "mean softmax mass on the prefix, least": min(gates),
            "mean softmax mass on the prefix, largest": max(gates),
        },
        assumption_met=min(gates) > 1e-3,
        note=(
            "MiniLM-L6 in float64, 8 snippets of movie, prefix at one layer alone, 6 layers, "
            "lengths 1, 2, 5, two seeds; worst of all"
        ),
    )


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """Prefixes in all layers: they change the inputs of the later ones, and so both statements."""
    from deltacontrol.deltas import PrefixTuning

    probe = _probe()
    plain = probe.run()
    attention, span = {}, {}
    for length in LENGTHS:
        for seed in SEEDS:
            deep = probe.run(PrefixTuning(length=length, init_std=SCALE), seed=seed)
            for layer, (before, after) in enumerate(zip(plain, deep, strict=True)):
                if layer:
                    name = f"layer {layer}, length {length}, seed {seed}"
                    attention[name] = _attention_change(before, after)
                    span[name] = _left_over(before, after)
    return Evidence(
        value=min(*attention.values(), *span.values()) - prediction["attention_change"],
        details={"relative attention": attention, "share outside of l dimensions": span},
        note="prefixes in all layers, judged at layers 1 to 5; the layer that comes closest",
    )


CLAIM = Claim(
    id=9,
    name="prefix-bias",
    title="A prefix cannot change relative attention",
    statement=(
        "In one attention layer with given inputs a prefix of l positions leaves the attention "
        "weights over the content unchanged relative to each other, and each head's output becomes "
        "(1 - λ) Attn(h) plus a term that lies in a fixed space of at most l dimensions"
    ),
    source="Petrov, Torr & Bibi, ICLR 2024, section 4",
    notebook="09_prefix_bias",
    threshold=Threshold(
        "<=",
        1e-12,
        "change of relative attention, and share of the output outside l dimensions, float64",
    ),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
)
