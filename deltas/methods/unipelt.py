"""UniPELT: LoRA, prefix and adapter in every block, each behind a gate that the state sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.positions import count_from_text
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.editing.spans import by_layer
from deltacontrol.deltas.editing.visibility import Visibility
from deltacontrol.deltas.methods.parts.adapters import check_activation, check_inner
from deltacontrol.deltas.methods.prefix import key_value_heads


@dataclass(frozen=True)
class UniPELT(Delta):
    """Three gated controls a block (Mao et al., Section 3).

        query, value   h W + G_L(h) h A B                           LoRA, G_L for its scale
        attention      keys [G_P(h) P_k; K], values [G_P(h) P_v; V]
        mlp.down       y + G_A(y) (φ(y W_d + b_d) W_u + b_u)        adapter after the MLP

    with h the input of the attention and y the MLP's output. A gate is the mean of σ(h_j w + c)
    over the tokens j of the text. Here it is the mean over the tokens that the block's own
    attention lets a token see: the same for encoders, without the padding; in causal models every
    token has its own mean, over those before it.

    LoRA's B and the adapter's W_u start at zero, the gates at 1/2.

    Attributes:
        rank: r of LoRA.
        bottleneck: m of the adapter.
        length: n, number of prefix positions a layer.
        activation: φ, by its name in transformers.
        init_std: standard deviation of the initial prefix.
        layers: blocks to act in; None means all.
    """

    rank: int = 8
    bottleneck: int = 32
    length: int = 10
    activation: str = "relu"
    init_std: float = 0.02
    layers: tuple[int, ...] | None = None

    name = "unipelt"
    acts_on = "q, v; keys; mlp"
    category = "combined"
    law = "h (W + G_L A B); [G_P P; K], [G_P P; V]; y + G_A phi(y W_d) W_u"
    reference = "Mao et al., ACL 2022, Section 3"
    bibtex = r"""
        @inproceedings{mao2022unipelt,
          author = {Mao, Yuning and Mathias, Lambert and Hou, Rui and Almahairi, Amjad and Ma,
            Hao and Han, Jiawei and Yih, Wen-tau and Khabsa, Madian},
          title = {{UniPELT}: A Unified Framework for Parameter-Efficient Language Model
            Tuning},
          booktitle = {Annual Meeting of the Association for Computational Linguistics},
          year = {2022},
        }
    """
    num_parameters_formula = (
        "sum over blocks of r (2 d + d_q + d_kv) + 2 n d_kv + 2 m d + m + d + 3 (d + 1)"
    )
    unmergeable = "its gates depend on the state"
    identity_at_start = False

    def __post_init__(self) -> None:
        """Check the sizes and the activation."""
        self._positive("rank", "bottleneck", "length")
        check_activation(self.name, self.activation)

    def build(self, host: Host) -> None:
        """Lay the three controls and their gates in every block."""
        heads, head_width = key_value_heads(host)
        blocks = by_layer(host, "block")
        for layer, sites in self._sites(host).items():
            query, value, attention, down = sites
            width = down.out_features
            controls = GatedTriple(
                lora={s: host.kaiming(self.rank, s.in_features) for s in (query, value)},
                prefix=host.normal(2, heads, self.length, head_width, std=self.init_std),
                down=host.normal(self.bottleneck, width, std=1 / math.sqrt(width)),
                activation=self.activation,
                visibility=Visibility(host, blocks[layer]),
                key=f"{host.namespace}.{layer}",
            )
            host.add(blocks[layer].path, controls, like=host.weight(down))
            host.on_output(query.module, controls.path(query, controls.query))
            host.on_output(value.module, controls.path(value, controls.value))
            host.add_prefix(attention.module, controls)
            host.on_output(down.module, controls.adapt)
        count_from_text(host)

    def num_parameters(self, host: Host) -> int:
        """Σ r (2 d + d_q + d_kv) + 2 n d_kv + 2 m d + m + d + 3 (d + 1)."""
        heads, head_width = key_value_heads(host)
        total = 0
        for query, value, _, down in self._sites(host).values():
            d, m = down.out_features, self.bottleneck
            lora = sum(self.rank * (s.in_features + s.out_features) for s in (query, value))
            prefix = 2 * self.length * heads * head_width
            gates = 2 * (query.in_features + 1) + d + 1
            total += lora + prefix + 2 * m * d + m + d + gates
        return total

    def _sites(self, host: Host) -> dict[int, tuple[Site, Site, Site, Site]]:
        """Query, value, attention and MLP output of every block."""
        names = ("attention.query", "attention.value", "attention", "mlp.down")
        query, value, attention, down = (by_layer(host, name, self.layers) for name in names)
        found = {t: (query[t], value[t], attention[t], down[t]) for t in query}
        for q, v, _, out in found.values():
            for site in (q, v):
                width = min(site.in_features, site.out_features)
                check_inner(self.name, "rank", self.rank, width, site.path)
            check_inner(self.name, "bottleneck", self.bottleneck, out.out_features, out.path)
        return found


class Gate(nn.Module):
    """h ↦ the mean of σ(h_j w + c) over the tokens j that a token sees; w (1, d), c (1,)."""

    def __init__(self, width: int, visibility: Visibility, key: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1))
        self.visibility = visibility
        self.key = key

    def forward(self, state: Tensor) -> Tensor:
        """(batch, tokens, 1)."""
        rows = self.visibility.rows(state)
        opened = linear(rows, self.weight, self.bias).sigmoid()
        others = self.visibility.keep(opened, self.key)
        seen = self.visibility.seen(rows.shape[1], others.shape[1], rows.device).to(others.dtype)
        return seen @ others / seen.sum(-1, keepdim=True).clamp_min(1)


class GatedTriple(nn.Module):
    """LoRA on query and value, prefix and adapter of one block, and their gates.

    Shapes: LoRA's A (r, in) and B (out, r); keys and values (heads, n, head width); down (m, d),
    up (d, m). It is the `Prefix` of the block's attention.
    """

    def __init__(
        self,
        lora: dict[Site, Tensor],
        prefix: Tensor,
        down: Tensor,
        activation: str,
        visibility: Visibility,
        key: str,
    ) -> None:
        super().__init__()
        (query, a_query), (value, a_value) = lora.items()
        self.query = LowRankFactors(a_query, query.out_features)
        self.value = LowRankFactors(a_value, value.out_features)
        self.keys, self.values = nn.Parameter(prefix[0]), nn.Parameter(prefix[1])
        self.down = nn.Parameter(down)
        self.down_bias = nn.Parameter(torch.zeros(len(down)))
        self.up = nn.Parameter(torch.zeros(down.shape[1], len(down)))
        self.up_bias = nn.Parameter(torch.zeros(down.shape[1]))
        self.lora_gate = Gate(query.in_features, visibility, f"{key}.lora")
        self.prefix_gate = Gate(query.in_features, visibility, f"{key}.prefix")
        self.adapter_gate = Gate(down.shape[1], visibility, f"{key}.adapter")
        self.activation = ACT2FN[activation]
        self.opened: tuple[Tensor, ...] | None = None

    def _open(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """G_L and G_P of the attention's input, computed once for query, value and prefix."""
        if self.opened is None or self.opened[0] is not state:
            self.opened = (state, self.lora_gate(state), self.prefix_gate(state))
        return self.opened[1], self.opened[2]

    def path(self, site: Site, factors: LowRankFactors) -> Callable[[tuple, Tensor], Tensor]:
        """The law of LoRA at a site."""

        def law(inputs: tuple, output: Tensor) -> Tensor:
            gate, _ = self._open(inputs[0])
            return output + site.spread(gate * factors(inputs[0]))

        return law

    def forward(self) -> tuple[Tensor, Tensor]:
        """The prefix keys and values, which the attention scales by :meth:`gate`."""
        return self.keys, self.values

    def gate(self) -> Tensor:
        """G_P of the present pass, (batch, queries)."""
        assert self.opened is not None, "the attention read no query and no value"
        return self.opened[2].squeeze(-1)

    def adapt(self, _inputs: tuple, state: Tensor) -> Tensor:
        """The MLP's output behind the gated adapter."""
        self.opened = None  # gradient checkpointing must compute it again
        inner = self.activation(linear(state, self.down, self.down_bias))
        change = linear(inner, self.up, self.up_bias)
        gate = self.adapter_gate(state)
        return state + (gate * change.view(*gate.shape[:2], -1)).view_as(state)


class LowRankFactors(nn.Module):
    """x ↦ x A B; A (r, in), B (out, r) as linear maps."""

    def __init__(self, down: Tensor, width_out: int) -> None:
        super().__init__()
        self.A = nn.Parameter(down)
        self.B = nn.Parameter(torch.zeros(width_out, len(down)))

    def forward(self, x: Tensor) -> Tensor:
        """The change."""
        return linear(linear(x, self.A), self.B)
