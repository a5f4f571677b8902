"""What the attention of a BERT sees and gives, layer by layer, with a prefix and without.

All in float64, on a task's first training rows. Shapes: b examples, h heads, n tokens, l prefix
positions, w the width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltacontrol.deltas import Delta, attach
from deltacontrol.deltas.editing.sites import SiteMap
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.tasks.encoding import without_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention layer in one pass.

    Attributes:
        state: its input, (b, n, d).
        weights: softmax over prefix and content, (b, h, n, l + n).
        output: before the output projection, (b, h, n, w).
        prefix: keys and values, each (h, l, w), or None.
        module: the layer.
        real: which tokens are no padding, (b, n).
    """

    state: Tensor
    weights: Tensor
    output: Tensor
    prefix: tuple[Tensor, Tensor] | None
    module: Any
    real: Tensor

    @property
    def gate(self) -> Tensor:
        """λ, the softmax mass on the prefix, (b, h, n, 1)."""
        length = 0 if self.prefix is None else self.prefix[0].shape[1]
        return self.weights[..., :length].sum(-1, keepdim=True)

    @property
    def content(self) -> Tensor:
        """The weights on the content, summing to one."""
        length = self.weights.shape[-1] - self.weights.shape[-2]
        content = self.weights[..., length:]
        return content / content.sum(-1, keepdim=True)

    @property
    def query(self) -> Tensor:
        """H W_q + b_q by head, (b, h, n, w)."""
        heads = self.weights.shape[1]
        query = self.module.query(self.state).detach()
        return query.unflatten(-1, (heads, -1)).transpose(1, 2)

    def rows(self, values: Tensor) -> Tensor:
        """The rows (h, tokens, w) of (b, h, n, w) that belong to real tokens."""
        return values.transpose(0, 1)[:, self.real]


@dataclass(frozen=True, eq=False)
class Probe:
    """A BERT with eager attention, and a batch."""

    model: PreTrainedModel
    batch: Mapping[str, Tensor]

    @classmethod
    def load(
        cls, model: str = "minilm-l6", task: str = "movie", num_examples: int = 8, length: int = 24
    ) -> Probe:
        """A packaged or local BERT and the first rows of a task."""
        setting = Setting(
            model,
            task,
            train_rows=num_examples,
            expects="classification",
            max_length=length,
            dtype="float64",
        )
        setting.base.set_attn_implementation("eager")
        return cls(setting.base, without_labels(setting.batch()))

    @property
    def num_layers(self) -> int:
        """How many blocks."""
        return len(SiteMap(self.model).block_paths)

    @torch.no_grad()
    def run(self, *deltas: Delta, seed: int = 0) -> list[Attention]:
        """Every attention layer under these deltas; without any, of the base model."""
        sites = SiteMap(self.model).resolve(("attention",))
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        handles = [
            site.module.register_forward_hook(
                lambda _module, args, output: found.append((args[0], output[1], output[0]))
            )
            for site in sites
        ]
        controlled = attach(self.model, *deltas, seed=seed) if deltas else None
        try:
            self.model(**self.batch)
            prefixes = [_prefix(controlled, site.path) for site in sites]
        finally:
            if controlled is not None:
                controlled.detach()
            for handle in handles:
                handle.remove()
        real = self.batch["attention_mask"].bool()
        return [
            Attention(
                state,
                weights,
                output.unflatten(-1, (weights.shape[1], -1)).transpose(1, 2),
                prefix,
                site.module,
                real,
            )
            for (state, weights, output), prefix, site in zip(found, prefixes, sites, strict=True)
        ]


def _prefix(controlled: Any, path: str) -> tuple[Tensor, Tensor] | None:
    if controlled is None:
        return None
    values = {name: p.detach() for name, p in controlled.trainable().items() if path in name}
    keys = [v for name, v in values.items() if name.endswith(".keys")]
    return (keys[0], next(v for n, v in values.items() if n.endswith(".values"))) if keys else None


def each_layer(
    probe: Probe, lengths: Sequence[int], init_std: float, seeds: Sequence[int]
) -> Iterator[tuple[str, Attention, Attention]]:
    """A random prefix at one layer alone: a label, that layer without and with its prefix."""
    from deltacontrol.deltas import PrefixTuning

    plain = probe.run()
    for layer in range(probe.num_layers):
        for length in lengths:
            delta = PrefixTuning(length=length, init_std=init_std, layers=(layer,))
            for seed in seeds:
                controlled = probe.run(delta, seed=seed)[layer]
                yield f"layer {layer}, length {length}, seed {seed}", plain[layer], controlled
