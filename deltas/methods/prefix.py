"""Prefix tuning: trained keys and values in front of every attention layer's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.positions import count_from_text, shift_positions
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.editing.spans import state_width


@dataclass(frozen=True)
class PrefixTuning(Delta):
    """Attn(h, [P_k; K], [P_v; V]) (Li & Liang, Eq. 3).

    Equal to (1-λ(h))·Attn(h) + λ(h)·softmax(h W_q P_kᵀ) P_v with λ the softmax mass on the prefix
    (He et al., ICLR 2022, Eq. 7). The prefix is visible to every token, whatever the padding.
    Keys and values start Gaussian; without training the model's output changes.

    With ``projection`` they are what an MLP makes of rows of the width of the states, which trains
    more steadily (Li & Liang, Section 4.3): [P_k; P_v] of a layer is tanh(P W_1 + b_1) W_2 + b_2
    with P, W_1 and b_1 shared by all layers.

    Attributes:
        length: n, number of prefix positions a layer.
        init_std: standard deviation of the initial keys and values (of the rows and of W_2, with
            ``projection``).
        layers: blocks to act in; None means all.
        projection: k, inner width of the MLP; None trains keys and values themselves.
        shift: the text's positions start behind the prefix's n, as they do where a prefix is a
            cache (peft); otherwise they are those of the text alone.
    """

    length: int = 16
    init_std: float = 0.02
    layers: tuple[int, ...] | None = None
    projection: int | None = None
    shift: bool = False

    name = "prefix"
    look = ("prefix", "#009E73", "v", 5)
    acts_on = "keys, values"
    default_rate = 1e-2
    category = "addition"
    law = "(1-lambda(h)) Attn(h) + lambda(h) softmax(h W_q P_k^T) P_v"
    reference = "Li & Liang, ACL 2021, Eq. 3; He et al., ICLR 2022, Eq. 7"
    bibtex = r"""
        @inproceedings{li2021prefix,
          author = {Li, Xiang Lisa and Liang, Percy},
          title = {Prefix-Tuning: Optimizing Continuous Prompts for Generation},
          booktitle = {Annual Meeting of the Association for Computational Linguistics},
          year = {2021},
        }
        @inproceedings{he2022unified,
          author = {He, Junxian and Zhou, Chunting and Ma, Xuezhe and Berg-Kirkpatrick, Taylor
            and Neubig, Graham},
          title = {Towards a Unified View of Parameter-Efficient Transfer Learning},
          booktitle = {International Conference on Learning Representations},
          year = {2022},
        }
    """
    num_parameters_formula = (
        "2 n d_kv for each layer; n d + (d+1) k + (k+1) 2 d_kv for each layer (projection)"
    )
    unmergeable = "a prefix is no weight of the base model"
    identity_at_start = False

    @property
    def num_positions(self) -> int:
        """The prefix's length where positions of the text start behind it."""
        return self.length if self.shift else 0

    def __post_init__(self) -> None:
        """Check the sizes."""
        self._positive("length")
        if self.projection is not None:
            self._positive("projection")

    def build(self, host: Host) -> None:
        """Give every attention module its prefix."""
        heads, head_width = key_value_heads(host)
        sites = host.find(("attention",), self.layers)
        rows = self._lay_rows(host, sites[0]) if self.projection else None
        for site in sites:
            if rows is None:
                shape = (heads, self.length, head_width)
                made = KeyValuePrefix(*host.normal(2, *shape, std=self.init_std))
            else:
                size = (2 * heads * head_width, rows.inner)
                made = ProjectedPrefix(rows, host.normal(*size, std=self.init_std), heads)
            prefix = host.add(site.path, made, like=host.like(site))
            host.add_prefix(site.module, prefix)
        count_from_text(host)
        if self.shift:
            shift_positions(host, self.length)

    def _lay_rows(self, host: Host, first: Site) -> PrefixRows:
        width, inner = state_width(host), self.projection or 0
        rows = host.normal(self.length, width, std=self.init_std)
        made = PrefixRows(rows, host.kaiming(inner, width))
        host.add(first.path, made, like=host.like(first), key="rows")
        host.shared += [f"{host.namespace}.rows.{name}" for name, _ in made.named_parameters()]
        return made

    def num_parameters(self, host: Host) -> int:
        """2 n d_kv a layer; d_kv counts key/value heads, which grouped queries share."""
        heads, head_width = key_value_heads(host)
        layers = len(host.find(("attention",), self.layers))
        if self.projection is None:
            return layers * 2 * self.length * heads * head_width
        width, k = state_width(host), self.projection
        shared = self.length * width + (width + 1) * k
        return shared + layers * (k + 1) * 2 * heads * head_width


def key_value_heads(host: Host) -> tuple[int, int]:
    """Number of key and value heads, which grouped queries share, and their width."""
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


class PrefixRows(nn.Module):
    """Rows P (n, d) and the first map of the MLP, (k, d), shared by all layers."""

    def __init__(self, rows: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight)))
        self.inner = len(weight)

    def forward(self) -> Tensor:
        """tanh(P W_1 + b_1), (n, k)."""
        return linear(self.rows, self.weight, self.bias).tanh()


class ProjectedPrefix(nn.Module):
    """One layer's share of the second map, (2 d_kv, k): first the keys', then the values'."""

    def __init__(self, rows: PrefixRows, weight: Tensor, heads: int) -> None:
        super().__init__()
        self.__dict__["rows"] = rows  # one module for all layers, so no submodule of each
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight)))
        self.heads = heads

    def forward(self) -> tuple[Tensor, Tensor]:
        """The prefix keys and values, each (heads, length, head width)."""
        made = linear(self.__dict__["rows"](), self.weight, self.bias)
        keys, values = made.unflatten(-1, (2, self.heads, -1)).permute(1, 2, 0, 3)
        return keys, values
