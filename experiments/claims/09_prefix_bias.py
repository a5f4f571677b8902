"""Claim 9: a prefix leaves the relative attention over the content, and adds a fixed span."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from deltacontrol.theory.claims import Claim, Evidence, Part, Threshold

if TYPE_CHECKING:
    from deltacontrol.experiments.measures.attention_probe import Attention, Probe

MODEL, TASK = "minilm-l6", "movie"
EXAMPLES, TOKENS = 8, 24
LENGTHS = (1, 2, 5)
SEEDS = (0, 1)
SCALE = 1.0


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


@dataclass(frozen=True)
class _Found:
    """By case: the change of relative attention, what lies outside, the mass on the prefix."""

    attention: dict[str, float] = field(default_factory=dict)
    outside: dict[str, float] = field(default_factory=dict)
    mass: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, plain: Attention, controlled: Attention) -> None:
        self.attention[name] = _attention_change(plain, controlled)
        self.outside[name] = _left_over(plain, controlled)
        self.mass[name] = float(controlled.rows(controlled.gate).mean())


@cache
def _alone() -> _Found:
    """Every layer of MiniLM by itself, at the inputs that real text gives it."""
    from deltacontrol.experiments.measures.attention_probe import each_layer

    found = _Found()
    for name, plain, controlled in each_layer(_probe(), LENGTHS, SCALE, SEEDS):
        found.add(name, plain, controlled)
    return found


@cache
def _in_all_layers() -> tuple[_Found, _Found]:
    """Prefixes in all layers at once: the first layer, whose input is as before, and the others."""
    from deltacontrol.deltas import PrefixTuning

    probe = _probe()
    plain = probe.run()
    first, later = _Found(), _Found()
    for length in LENGTHS:
        for seed in SEEDS:
            deep = probe.run(PrefixTuning(length=length, init_std=SCALE), seed=seed)
            for layer, (before, after) in enumerate(zip(plain, deep, strict=True)):
                name = f"layer {layer}, length {length}, seed {seed}"
                (later if layer else first).add(name, before, after)
    return first, later


def _measured(quantity: str) -> Evidence:
    """The prefix at one layer alone."""
    found = _alone()
    least, most = min(found.mass.values()), max(found.mass.values())
    return Evidence.worst(
        getattr(found, quantity),
        details={"softmax mass on the prefix, least and largest mean": [least, most]},
        assumptions={"every prefix is attended to": least > 1e-3},
        note="MiniLM-L6 in float64, 8 snippets of movie, prefix at one layer alone, all 6 layers",
    )


def _broken(quantity: str) -> Evidence:
    """The input of a layer is not given: earlier layers have prefixes too."""
    found = getattr(_in_all_layers()[1], quantity)
    note = "prefixes in all layers, judged behind the first; the case that comes closest"
    return Evidence.worst(found, least=True, note=note)


def _harmless(quantity: str) -> Evidence:
    """The same prefixes in all layers, judged at the first, whose input they cannot change."""
    found = getattr(_in_all_layers()[0], quantity)
    return Evidence.worst(found, note="prefixes in all layers, judged at the first")


def _part(name: str, title: str, quantity: str, description: str) -> Part:
    return Part(
        name,
        title,
        Threshold("<=", 1e-12, description),
        measure=lambda prediction: _measured(quantity),
        negative_control=lambda prediction: _broken(quantity),
        passing_control=lambda prediction: _harmless(quantity),
        on="real model, untrained",
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
    revised="two quantities were joined by their maximum; each is judged by itself",
    predict=dict,
    parts=(
        _part("a", "relative attention", "attention", "change of relative attention, float64"),
        _part("b", "span", "outside", "share of the output outside of l dimensions, float64"),
    ),
)
