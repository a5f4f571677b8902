"""Prefix tuning: trained keys and values in front of every attention layer's own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from deltas.base import Delta
from deltas.host import Host


@dataclass(frozen=True)
class PrefixTuning(Delta):
    """Attn(h, [P_k; K], [P_v; V]) (Li & Liang, Eq. 3).

    Equal to (1-λ(h))·Attn(h) + λ(h)·softmax(h W_q P_kᵀ) P_v with λ the softmax mass on the prefix
    (He et al., ICLR 2022, Eq. 7). The prefix is visible to every token, whatever the padding.
    Keys and values start Gaussian; without training the model's output changes.

    Attributes:
        length: n, number of prefix positions a layer.
        init_std: standard deviation of the initial keys and values.
        layers: blocks to act in; None means all.
    """

    length: int = 16
    init_std: float = 0.02
    layers: tuple[int, ...] | None = None

    name = "prefix"
    category = "addition"
    law = "(1-lambda(h)) Attn(h) + lambda(h) softmax(h W_q P_k^T) P_v"
    reference = "Li & Liang, ACL 2021, Eq. 3; He et al., ICLR 2022, Eq. 7"
    num_parameters_formula = "2 n d_kv for each layer"
    unmergeable = "a prefix is no weight of the base model"
    identity_at_start = False

    def __post_init__(self) -> None:
        """Check the length."""
        self._positive("length")

    def build(self, host: Host) -> None:
        """Give every attention module its prefix."""
        heads, head_width = self._heads(host)
        for site in host.find(("attention",), self.layers):
            shape = (heads, self.length, head_width)
            keys, values = host.normal(2, *shape, std=self.init_std)
            like = next(site.module.parameters())
            prefix = host.add(site.path, KeyValuePrefix(keys, values), like=like)
            host.add_prefix(site.module, prefix)

    def num_parameters(self, host: Host) -> int:
        """2 n d_kv a layer; d_kv counts key/value heads, which grouped queries share."""
        heads, head_width = self._heads(host)
        sites = host.find(("attention",), self.layers)
        return len(sites) * 2 * self.length * heads * head_width

    def _heads(self, host: Host) -> tuple[int, int]:
        config = host.config
        queries = config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or queries
        width = (
            getattr(config, "d_kv", None)
            or getattr(config, "head_dim", None)
            or config.hidden_size // queries
        )
        return heads, width


class KeyValuePrefix(nn.Module):
    """Keys and values, each (heads, length, head width)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys = nn.Parameter(keys)
        self.values = nn.Parameter(values)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The prefix keys and values."""
        return self.keys, self.values
