"""OFT: the input of a linear map is turned, block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.methods.parts.on_weight import (
    TurnedPath,
    block_sizes,
    cayley,
    lay_on_weight,
)
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class OFT(Delta):
    """x ↦ x R Wᵀ with R = diag(R₁, …, R_n), R_i = (I - Q_i)(I + Q_i)⁻¹ (Qiu et al., Eq. 4).

    Q_i (b, b) is skew, so R_i is a rotation: it keeps the norms of the neurons and the angles
    between them. Q starts at zero, where R = I, so training starts at the base model.

    With ``neumann_terms`` n the inverse is a series: R_i = I + 2 Q + 2 Q² + … + 2 Q^{n-2} + Q^{n-1}
    (Qiu et al. 2025, OFTv2), a rotation up to the order of the last term. peft's default has 5
    terms; its series turns by Q where the exact form turns by -Q.

    Attributes:
        block_size: b; it divides the width of the input.
        num_blocks: n; where it is not zero it decides instead of ``block_size``.
        share: one Q for all blocks.
        neumann_terms: n of the series; 0 takes the exact inverse.
        sites: linear maps whose input is turned.
        layers: blocks to act in; None means all.
    """

    block_size: int = 16
    num_blocks: int = 0
    share: bool = False
    neumann_terms: int = 0
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None

    name = "oft"
    category = "reparametrisation"
    law = "x R W, R = diag((I - Q) inverse(I + Q)), Q skew"
    reference = "Qiu et al., NeurIPS 2023, Eq. 4; Qiu et al., arXiv 2506.19847 (OFTv2)"
    bibtex = r"""
        @inproceedings{qiu2023oft,
          author = {Qiu, Zeju and Liu, Weiyang and Feng, Haiwen and Xue, Yuxuan and Feng, Yao and
            Liu, Zhen and Zhang, Dan and Weller, Adrian and Sch{\"o}lkopf, Bernhard},
          title = {Controlling Text-to-Image Diffusion by Orthogonal Finetuning},
          booktitle = {Advances in Neural Information Processing Systems},
          year = {2023},
        }
    """
    num_parameters_formula = "sum over sites of n b (b - 1) / 2, n b = d_in"

    def __post_init__(self) -> None:
        """Check the sizes."""
        self._positive("block_size")
        for field in ("num_blocks", "neumann_terms"):
            if getattr(self, field) < 0:
                raise InputError(f"oft: {field} is {getattr(self, field)}; expected 0 or more.")
        if self.neumann_terms == 1:
            raise InputError("oft: neumann_terms is 1, which turns nothing; expected 0, or 2 up.")

    def build(self, host: Host) -> None:
        """Turn the input of every site."""
        found = [(site, *self.blocks(site)) for site in host.find(self.sites, self.layers)]
        for site, size, count in found:
            path = BlockTurn(size, 1 if self.share else count, self.neumann_terms, site)
            lay_on_weight(host, site, path)

    def num_parameters(self, host: Host) -> int:
        """Σ n b (b - 1) / 2; with shared blocks b (b - 1) / 2 a site."""
        found = [self.blocks(site) for site in host.find(self.sites, self.layers)]
        return sum((1 if self.share else n) * b * (b - 1) // 2 for b, n in found)

    def blocks(self, site: Site) -> tuple[int, int]:
        """Size and number of the blocks at a site; InputError where there are none."""
        return block_sizes(self.name, site.in_features, self.block_size, self.num_blocks)


class BlockTurn(TurnedPath):
    """x ↦ x (R - I) Wᵀ; q (n, b (b-1)/2) holds the entries of Q above its diagonal, by rows."""

    places: Tensor

    def __init__(self, size: int, count: int, num_terms: int, site: Site) -> None:
        super().__init__(site)
        number = size * (size - 1) // 2
        self.q = nn.Parameter(torch.zeros(count, number))
        self.size, self.num_terms = size, num_terms
        places = torch.full((size, size), number)  # behind the last entry stands a zero
        places[tuple(torch.triu_indices(size, size, 1))] = torch.arange(number)
        self.register_buffer("places", places, persistent=False)

    def turn(self, x: Tensor) -> Tensor:
        """X (R - I), block by block."""
        upper = torch.cat([self.q, torch.zeros_like(self.q[:, :1])], dim=1)[:, self.places]
        skew = upper - upper.mT
        rotation = _series(skew, self.num_terms) if self.num_terms else cayley(skew)
        parts = x.unflatten(-1, (-1, self.size))  # (..., n, b)
        return (parts.unsqueeze(-2) @ rotation).squeeze(-2).flatten(-2)


def _series(skew: Tensor, num_terms: int) -> Tensor:
    """2 Q + 2 Q² + … + 2 Q^{n-2} + Q^{n-1}; as in peft, n = 3 is n = 4."""
    if num_terms == 2:
        return 2 * skew
    power = skew @ skew
    total = 2 * skew + 2 * power
    for _ in range(3, num_terms - 1):
        power = power @ skew
        total = total + 2 * power
    return total + power @ skew
