"""DeLoRA: a low-rank change whose directions are normalised and whose strength is one number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import linear

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import WeightPath, check_dropout, lay, low_rank_sites
from deltacontrol.deltas.editing.sites import Site

SMALLEST = 1e-4  # a direction that is shorter is not normalised, as in peft


@dataclass(frozen=True)
class DeLoRA(Delta):
    """W + (λ/r)·B Ξ A diag(w), Ξ_ii = 1/(‖a_i‖ ‖b_i‖) (Bini, Girrbach, Akata, Section 3).

    a_i are the rows of A and b_i the columns of B, so that λ alone bounds the size of the change.
    w holds the norms ‖W e_j‖ of the columns of the weight, one for each input feature; a checkpoint
    keeps it. A is uniform and B zero, so training starts at the base model.

    Attributes:
        rank: r.
        strength: start of λ, which is trained as well.
        sites: linear maps that get a path.
        layers: blocks to act in; None means all.
        dropout: probability of dropping an input of the path while training.
    """

    rank: int = 8
    strength: float = 15.0
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0

    name = "delora"
    category = "reparametrisation"
    law = "x (W + (lambda/r) diag(|W|) A Xi B)"
    reference = "Bini, Girrbach, Akata, ICLR 2025, Section 3"
    bibtex = r"""
        @inproceedings{bini2025delora,
          author = {Bini, Massimo and Girrbach, Leander and Akata, Zeynep},
          title = {{DeLoRA}: Decoupling Angles and Strength in Low-rank Adaptation},
          booktitle = {International Conference on Learning Representations},
          year = {2025},
        }
    """
    num_parameters_formula = "sum over sites of r (d_in + d_out) + 1"

    def __post_init__(self) -> None:
        """Check rank and dropout."""
        self._positive("rank")
        check_dropout(self.name, self.dropout)

    def build(self, host: Host) -> None:
        """Add a path at every site."""
        for site in self._checked_sites(host):
            norms = vector_norm(site.rows(host.weight(site).detach()), dim=0)
            down = host.kaiming(self.rank, site.in_features)
            lay(host, site, NormalisedPath(down, norms, self, site))

    def num_parameters(self, host: Host) -> int:
        """Σ r (d_in + d_out) + 1."""
        sites = self._checked_sites(host)
        return sum(self.rank * (site.in_features + site.out_features) + 1 for site in sites)

    def _checked_sites(self, host: Host) -> list[Site]:
        return low_rank_sites(host, self.sites, self.layers)


class NormalisedPath(WeightPath):
    """ΔW = (λ/r)·B Ξ A diag(w); A (r, in), B (out, r), lambda (1,), w (in,)."""

    norms: Tensor

    def __init__(self, down: Tensor, norms: Tensor, config: DeLoRA, site: Site) -> None:
        super().__init__(site, config.dropout)
        self.A = nn.Parameter(down)
        self.B = nn.Parameter(torch.zeros(site.out_features, config.rank))
        self.strength = nn.Parameter(torch.full((1,), float(config.strength)))
        self.register_buffer("norms", norms.clone())

    def _factors(self) -> Tensor:
        """(λ/r) Ξ, (r,)."""
        lengths = vector_norm(self.A, dim=1).clamp(min=SMALLEST)
        lengths = lengths * vector_norm(self.B, dim=0).clamp(min=SMALLEST)
        return self.strength / len(self.A) / lengths

    def weight(self) -> Tensor:
        """(λ/r)·B Ξ A diag(w)."""
        return (self.B * self._factors()) @ (self.A * self.norms)

    def through(self, x: Tensor) -> Tensor:
        """ΔW x, by way of r features."""
        return linear(linear(x * self.norms, self.A) * self._factors(), self.B)
