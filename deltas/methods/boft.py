"""BOFT: the input of a linear map is turned by a butterfly of rotations, its output scaled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

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

MOST_FACTORS = 32


@dataclass(frozen=True)
class BOFT(Delta):
    """x ↦ s ⊙ (x B_m ⋯ B_1 Wᵀ), B_i = P_i diag(R_i1, …, R_in) P_i' (Liu et al., Eq. 2–3).

    R_ij = (I - Q)(I + Q)⁻¹ with Q = (M - M')/2 is a rotation of b features. The permutation P_i
    brings features together that lie apart, so that m factors connect 2^{m-1} b features. M starts
    at zero and s at one, so training starts at the base model. The bias is not scaled.

    Attributes:
        block_size: b; it divides the width of the input.
        num_blocks: n; where it is not zero it decides instead of ``block_size``.
        num_factors: m; above 1, b is even and 2^{m-1} divides n. peft has more than one where its
            CUDA kernel compiles.
        sites: linear maps to control.
        layers: blocks to act in; None means all.
    """

    block_size: int = 4
    num_blocks: int = 0
    num_factors: int = 1
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None

    name = "boft"
    category = "reparametrisation"
    law = "s * (x B_m ... B_1 W), B_i = P_i diag(R_i1 ... R_in) transpose(P_i)"
    reference = "Liu et al., ICLR 2024, Eq. 2-3"
    bibtex = r"""
        @inproceedings{liu2024boft,
          author = {Liu, Weiyang and Qiu, Zeju and Feng, Yao and Xiu, Yuliang and Xue, Yuxuan and
            Yu, Longhui and Feng, Haiwen and Liu, Zhen and Heo, Juyeon and Peng, Songyou and
            Wen, Yandong and Black, Michael J. and Weller, Adrian and Sch{\"o}lkopf, Bernhard},
          title = {Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization},
          booktitle = {International Conference on Learning Representations},
          year = {2024},
        }
    """
    num_parameters_formula = "sum over sites of m b d_in + d_out"

    def __post_init__(self) -> None:
        """Check the sizes."""
        self._positive("block_size", "num_factors")
        if self.num_factors > MOST_FACTORS:
            raise InputError(
                f"boft: num_factors is {self.num_factors}; expected at most {MOST_FACTORS}, for "
                "each doubles the number of blocks that a width has to have."
            )
        if self.num_blocks < 0:
            raise InputError(f"boft: num_blocks is {self.num_blocks}; expected 0 or more.")

    def build(self, host: Host) -> None:
        """Turn the input and scale the output of every site."""
        found = [(site, *self.blocks(site)) for site in host.find(self.sites, self.layers)]
        for site, size, count in found:
            lay_on_weight(host, site, Butterfly(size, count, self.num_factors, site))

    def num_parameters(self, host: Host) -> int:
        """Σ m b d_in + d_out."""
        return sum(
            self.num_factors * self.blocks(site)[0] * site.in_features + site.out_features
            for site in host.find(self.sites, self.layers)
        )

    def blocks(self, site: Site) -> tuple[int, int]:
        """Size and number of the blocks at a site; InputError where there are none."""
        size, count = block_sizes(self.name, site.in_features, self.block_size, self.num_blocks)
        if self.num_factors > 1 and (size % 2 or count % 2 ** (self.num_factors - 1)):
            raise InputError(
                f"boft: num_factors={self.num_factors} needs blocks of an even size and a multiple "
                f"of {2 ** (self.num_factors - 1)} of them, and {site.path} has {count} of {size}; "
                "choose fewer factors or another block_size."
            )
        return size, count


class Butterfly(TurnedPath):
    """x ↦ (s - 1) ⊙ x Wᵀ + s ⊙ x (B - I) Wᵀ; M (m, n, b, b), s (out,)."""

    places: Tensor

    def __init__(self, size: int, count: int, num_factors: int, site: Site) -> None:
        super().__init__(site)
        self.M = nn.Parameter(torch.zeros(num_factors, count, size, size))
        self.s = nn.Parameter(torch.ones(site.out_features))
        orders = [
            _order(size * count, size * 2**i if num_factors > 1 else 0, size // 2)
            for i in range(num_factors)
        ]
        self.register_buffer("places", torch.stack(orders), persistent=False)

    def turn(self, x: Tensor) -> Tensor:
        """X (B - I), the last factor first."""
        rotations = cayley((self.M - self.M.mT) / 2)
        turned = x
        for places, rotation in zip(self.places.flip(0), rotations.flip(0), strict=True):
            parts = turned[..., places.argsort()].unflatten(-1, (-1, self.M.shape[-1]))
            parts = parts + (parts.unsqueeze(-2) @ rotation).squeeze(-2)
            turned = parts.flatten(-2)[..., places]
        return turned - x

    def change_of(self, base: Tensor) -> Tensor:
        """S W B' less W."""
        return self.s[:, None] * super().change_of(base) + (self.s - 1)[:, None] * base

    def through(self, x: Tensor) -> Tensor:
        """The same change, applied without forming B."""
        base = self.base()
        return self.s * linear(self.turn(x), base) + (self.s - 1) * linear(x, base)


def _order(width: int, length: int, run: int) -> Tensor:
    """In each stretch of ``length`` features: the even runs first, then the odd ones."""
    if not length:
        return torch.arange(width)
    runs = torch.arange(width).view(-1, length // run, run)
    return torch.cat([runs[:, ::2], runs[:, 1::2]], dim=1).flatten()
