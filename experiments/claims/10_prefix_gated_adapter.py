"""Claim 10: prefix tuning is a parallel adapter with a gate that depends on the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.experiments.measures.attention_probe import Attention, Probe

MODEL, TASK = "minilm-l6", "movie"
EXAMPLES, TOKENS = 8, 24
LENGTHS = (1, 5, 16)
SEEDS = (0, 1)
SCALE = 1.0


def _probe() -> Probe:
    from deltacontrol.experiments.measures.attention_probe import Probe

    return Probe.load(MODEL, TASK, EXAMPLES, TOKENS)


def _adapter(controlled: Attention) -> tuple[Tensor, Tensor]:
    """softmax(h W_d) W_u with W_d = W_q P_k' and W_u = P_v; and the gate, from W_d and the keys.

    Neither uses what the controlled layer gave: both come from its input and the base weights.
    """
    import torch

    assert controlled.prefix is not None
    keys, values = controlled.prefix
    scale = keys.shape[-1] ** -0.5
    inner = controlled.query @ keys.mT * scale
    heads = keys.shape[0]
    own = controlled.module.key(controlled.state).detach()
    own = own.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = controlled.query @ own.mT * scale
    scores = scores.masked_fill(~controlled.real[:, None, None], -torch.inf)
    mass, other = inner.logsumexp(-1, keepdim=True), scores.logsumexp(-1, keepdim=True)
    return inner.softmax(-1) @ values, torch.sigmoid(mass - other)


def _difference(controlled: Attention, formula: Tensor) -> float:
    """Between the layer's output and the formula, both (h, tokens, w) and of real tokens only."""
    found = controlled.rows(controlled.output)
    return float((found - formula).norm() / found.norm())


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """Every layer of MiniLM by itself, at the inputs that real text gives it."""
    from deltacontrol.experiments.measures.attention_probe import each_layer

    exact, gates = {}, []
    for name, plain, controlled in each_layer(_probe(), LENGTHS, SCALE, SEEDS):
        change, gate = _adapter(controlled)
        formula = controlled.rows((1 - gate) * plain.output + gate * change)
        exact[name] = _difference(controlled, formula)
        gates.append(float(controlled.rows(gate).std() / controlled.rows(gate).mean()))
    return Evidence.worst(
        exact,
        details={"variation of the gate, least and largest": [min(gates), max(gates)]},
        note="MiniLM-L6 in float64, 8 snippets of movie, prefix at one layer alone, all 6 layers",
    )


def _best_gates(shared: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Differences with the best gate that is one number, and without any gate.

    The number is fitted to what the layer gave, for each head: to all tokens together (shared), or
    to each token by itself.
    """
    from deltacontrol.experiments.measures.attention_probe import each_layer

    constant, none = {}, {}
    for name, plain, controlled in each_layer(_probe(), LENGTHS, SCALE, SEEDS):
        change, own = controlled.rows(_adapter(controlled)[0]), controlled.rows(plain.output)
        towards, moved = change - own, controlled.rows(controlled.output) - own
        over = (1, 2) if shared else (2,)
        gate = (towards * moved).sum(over, keepdim=True) / towards.square().sum(over, keepdim=True)
        constant[name] = _difference(controlled, own + gate * towards)
        none[name] = _difference(controlled, own + change)
    return constant, none


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """The adapter with the best gate that does not depend on the state: one number for a head."""
    constant, none = _best_gates(shared=True)
    return Evidence.worst(
        constant,
        least=True,
        details={"no gate, Attn(h) + adapter": none},
        note="the best constant gate for each head instead of λ(h); the case that comes closest",
    )


def _passing_control(prediction: Mapping[str, Any]) -> Evidence:
    """The same fit to one token at a time, over which a gate cannot vary."""
    return Evidence.worst(_best_gates(shared=False)[0], note="the best gate for each single token")


CLAIM = Claim(
    id=10,
    name="prefix-gated-adapter",
    title="Prefix tuning is a gated parallel adapter",
    statement=(
        "In one attention layer, head by head, attention with prefix keys P_k and values P_v is "
        "(1 - λ(h)) Attn(h) + λ(h) softmax(h W_q P_k') P_v, λ(h) the softmax mass on the prefix"
    ),
    source="He, Zhou, Ma, Berg-Kirkpatrick & Neubig, ICLR 2022, equation (7)",
    notebook="10_prefix_gated_adapter",
    threshold=Threshold(
        "<=", 1e-12, "relative difference of attention with a prefix and the formula, float64"
    ),
    predict=dict,
    measure=_measure,
    negative_control=_negative_control,
    passing_control=_passing_control,
    on="real model, untrained",
)
