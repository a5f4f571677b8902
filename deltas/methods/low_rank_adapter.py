"""Low-rank adapters: a bottleneck whose two matrices are products of thin ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.methods.parts.adapters import check_activation, check_inner, output_sites


@dataclass(frozen=True)
class LowRankAdapter(Delta):
    """h + φ(h S_d T_d + b_d) S_u T_u + b_u: Houlsby's adapter with W_d and W_u of rank r.

    The baseline "Adapter-LowRank" of Karimi Mahabadi et al., there with r = 1. T_u and the biases
    start at zero, so that the start is the identity exactly.

    Attributes:
        bottleneck: m, the inner width.
        rank: r of both matrices.
        activation: φ, by its name in transformers.
        sites: linear maps whose output is adapted.
        layers: blocks to act in; None means all.
    """

    bottleneck: int = 32
    rank: int = 1
    activation: str = "gelu"
    sites: tuple[str, ...] = ("attention.output", "mlp.down")
    layers: tuple[int, ...] | None = None

    name = "low-rank-adapter"
    default_rate = 3e-3
    searched_rates = (1e-3, 3e-3, 1e-2, 3e-2)
    category = "addition"
    law = "h + phi(h S_d T_d) S_u T_u"
    reference = "Karimi Mahabadi, Henderson, Ruder, NeurIPS 2021, Section 4 (Adapter-LowRank)"
    bibtex = r"""
        @inproceedings{karimimahabadi2021compacter,
          author = {Karimi Mahabadi, Rabeeh and Henderson, James and Ruder, Sebastian},
          title = {{Compacter}: Efficient Low-Rank Hypercomplex Adapter Layers},
          booktitle = {Advances in Neural Information Processing Systems},
          year = {2021},
        }
    """
    num_parameters_formula = "sum over sites of 2 r (d + m) + d + m"
    unmergeable = "its bottleneck is not linear in the state"

    def __post_init__(self) -> None:
        """Check the sizes and the activation."""
        self._positive("bottleneck", "rank")
        check_activation(self.name, self.activation)
        check_inner(self.name, "rank", self.rank, self.bottleneck, "the bottleneck")

    def build(self, host: Host) -> None:
        """Add an adapter at every site."""
        for site in self._checked_sites(host):
            width = site.out_features
            adapter = LowRankBottleneck(
                host.normal(self.rank, width, std=1 / math.sqrt(width)),
                host.normal(self.bottleneck, self.rank, std=1 / math.sqrt(self.rank)),
                host.normal(self.rank, self.bottleneck, std=1 / math.sqrt(self.bottleneck)),
                self.activation,
            )
            host.add(site.path, adapter, like=host.weight(site))
            host.on_output(site.module, adapter)

    def num_parameters(self, host: Host) -> int:
        """Σ 2 r (d + m) + d + m."""
        m = self.bottleneck
        widths = [site.out_features for site in self._checked_sites(host)]
        return sum((2 * self.rank + 1) * (d + m) for d in widths)

    def _checked_sites(self, host: Host) -> list[Site]:
        return output_sites(self.name, host, self.sites, self.layers, self.bottleneck)


class LowRankBottleneck(nn.Module):
    """h ↦ h + φ(h S_d T_d + b_d) S_u T_u + b_u.

    Shapes, as linear maps: down_in (r, d), down_out (m, r), up_in (r, m), up_out (d, r).
    """

    def __init__(self, down_in: Tensor, down_out: Tensor, up_in: Tensor, activation: str) -> None:
        super().__init__()
        (rank, width), inner = down_in.shape, down_out.shape[0]
        self.down_in = nn.Parameter(down_in)
        self.down_out = nn.Parameter(down_out)
        self.down_bias = nn.Parameter(torch.zeros(inner))
        self.up_in = nn.Parameter(up_in)
        self.up_out = nn.Parameter(torch.zeros(width, rank))
        self.up_bias = nn.Parameter(torch.zeros(width))
        self.activation = ACT2FN[activation]

    def forward(self, _inputs: tuple, state: Tensor) -> Tensor:
        """The adapted state."""
        inner = linear(linear(state, self.down_in), self.down_out, self.down_bias)
        return state + linear(linear(self.activation(inner), self.up_in), self.up_out, self.up_bias)
