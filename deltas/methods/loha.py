"""LoHa: the change of weight is the Hadamard product of two low-rank matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import WeightPath, check_dropout, lay, low_rank_sites
from deltacontrol.deltas.editing.sites import Site


@dataclass(frozen=True)
class LoHa(Delta):
    """W + (α/r)·(X₁ Y₁) ⊙ (X₂ Y₂): rank up to r² for the price of 2r (Hyeon-Woo et al., Prop. 1).

    X₁, Y₁, X₂ start uniform and Y₂ at zero, so training starts at the base model. ΔW is formed in
    every forward pass.

    Attributes:
        rank: r of each factor.
        alpha: α; the product is scaled by α/r.
        sites: linear maps that get a path.
        layers: blocks to act in; None means all.
        dropout: probability of dropping an input of the path while training.
    """

    rank: int = 8
    alpha: float = 16.0
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0

    name = "loha"
    searched_rates = (1e-3, 3e-3, 1e-2, 3e-2)
    category = "reparametrisation"
    law = "x (W + (alpha/r) (X1 Y1) * (X2 Y2))"
    reference = "Hyeon-Woo, Ye-Bin, Oh, ICLR 2022 (FedPara), Proposition 1"
    bibtex = r"""
        @inproceedings{hyeonwoo2022fedpara,
          author = {Hyeon-Woo, Nam and Ye-Bin, Moon and Oh, Tae-Hyun},
          title = {{FedPara}: Low-rank {Hadamard} Product for Communication-Efficient
            Federated Learning},
          booktitle = {International Conference on Learning Representations},
          year = {2022},
        }
    """
    num_parameters_formula = "sum over sites of 2 r (d_in + d_out)"

    def __post_init__(self) -> None:
        """Check rank and dropout."""
        self._positive("rank")
        check_dropout(self.name, self.dropout)

    def build(self, host: Host) -> None:
        """Add a path at every site."""
        for site in self._checked_sites(host):
            outer, inner = site.out_features, site.in_features
            factors = [
                host.kaiming(outer, self.rank),
                host.kaiming(self.rank, inner),
                host.kaiming(outer, self.rank),
                torch.zeros(self.rank, inner),
            ]
            lay(host, site, HadamardPath(factors, self, site))

    def num_parameters(self, host: Host) -> int:
        """Σ 2 r (d_in + d_out)."""
        sites = self._checked_sites(host)
        return sum(2 * self.rank * (site.in_features + site.out_features) for site in sites)

    def _checked_sites(self, host: Host) -> list[Site]:
        return low_rank_sites(host, self.sites, self.layers)


class HadamardPath(WeightPath):
    """ΔW = (α/r)·(X₁ Y₁) ⊙ (X₂ Y₂); shapes: X (out, r), Y (r, in)."""

    def __init__(self, factors: list[Tensor], config: LoHa, site: Site) -> None:
        super().__init__(site, config.dropout)
        self.X_1, self.Y_1, self.X_2, self.Y_2 = (nn.Parameter(factor) for factor in factors)
        self.scale = config.alpha / config.rank

    def weight(self) -> Tensor:
        """The scaled Hadamard product."""
        return self.scale * (self.X_1 @ self.Y_1) * (self.X_2 @ self.Y_2)
