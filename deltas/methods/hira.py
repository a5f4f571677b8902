"""HiRA: the change of weight is the weight itself times a low-rank matrix, entry by entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import check_dropout, low_rank_sites
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.methods.parts.on_weight import OnWeightPath, lay_on_weight


@dataclass(frozen=True)
class HiRA(Delta):
    """W + W ⊙ (B A): a change of high rank for the price of a low one (Huang et al., Eq. 3).

    A is uniform and B zero, so training starts at the base model. ΔW is formed in every pass.

    Attributes:
        rank: r.
        sites: linear maps that get a path.
        layers: blocks to act in; None means all.
        dropout: probability of dropping an input of the path while training.
    """

    rank: int = 8
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0

    name = "hira"
    category = "reparametrisation"
    law = "x (W + W * (A B))"
    reference = "Huang et al., ICLR 2025, Eq. 3"
    bibtex = r"""
        @inproceedings{huang2025hira,
          author = {Huang, Qiushi and Ko, Tom and Zhuang, Zhan and Tang, Lilian and Zhang, Yu},
          title = {{HiRA}: Parameter-Efficient {Hadamard} High-Rank Adaptation for Large Language
            Models},
          booktitle = {International Conference on Learning Representations},
          year = {2025},
        }
    """
    num_parameters_formula = "sum over sites of r (d_in + d_out)"

    def __post_init__(self) -> None:
        """Check rank and dropout."""
        self._positive("rank")
        check_dropout(self.name, self.dropout)

    def build(self, host: Host) -> None:
        """Add a path at every site."""
        for site in self._checked_sites(host):
            path = GatedWeight(host.kaiming(self.rank, site.in_features), site, self.dropout)
            lay_on_weight(host, site, path)

    def num_parameters(self, host: Host) -> int:
        """Σ r (d_in + d_out)."""
        sites = self._checked_sites(host)
        return sum(self.rank * (site.in_features + site.out_features) for site in sites)

    def _checked_sites(self, host: Host) -> list[Site]:
        return low_rank_sites(host, self.sites, self.layers)


class GatedWeight(OnWeightPath):
    """ΔW = W ⊙ (B A); A (r, in), B (out, r)."""

    def __init__(self, down: Tensor, site: Site, dropout: float) -> None:
        super().__init__(site, dropout)
        self.A = nn.Parameter(down)
        self.B = nn.Parameter(torch.zeros(site.out_features, len(down)))

    def change_of(self, base: Tensor) -> Tensor:
        """W ⊙ (B A)."""
        return base * (self.B @ self.A)
