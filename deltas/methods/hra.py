"""HRA: the input of a linear map goes through a chain of Householder reflections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.methods.parts.on_weight import TurnedPath, at_least_single, lay_on_weight


@dataclass(frozen=True)
class HRA(Delta):
    """W ↦ W H_1 ⋯ H_r, H_i = I - 2 u_i u_i'/‖u_i‖² (Yuan, Liu, Xu, Eq. 3–4).

    The chain is orthogonal, and its change of weight has rank at most r. The vectors start in equal
    pairs, whose reflections cancel, so with an even rank training starts at the base model. The
    change of a pair u, v is written as (H_u - H_v) H_v, which is zero without rounding at u = v. An
    odd rank ends with a single reflection, which is no identity wherever it starts.

    With ``gram_schmidt`` the vectors are made orthonormal first: I - 2 U U'. These reflections do
    not cancel, so they start at random and away from the base model.

    Attributes:
        rank: r.
        gram_schmidt: make the vectors orthonormal.
        sites: linear maps whose input is reflected.
        layers: blocks to act in; None means all.
    """

    rank: int = 8
    gram_schmidt: bool = False
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None

    name = "hra"
    category = "reparametrisation"
    law = "x H_r ... H_1 W, H_i = I - 2 u_i transpose(u_i) / |u_i|^2"
    reference = "Yuan, Liu, Xu, NeurIPS 2024, Eq. 3-4"
    bibtex = r"""
        @inproceedings{yuan2024hra,
          author = {Yuan, Shen and Liu, Haotian and Xu, Hongteng},
          title = {Bridging The Gap between Low-rank and Orthogonal Adaptation via {Householder}
            Reflection Adaptation},
          booktitle = {Advances in Neural Information Processing Systems},
          year = {2024},
        }
    """
    num_parameters_formula = "sum over sites of r d_in"

    def __post_init__(self) -> None:
        """Check the rank."""
        self._positive("rank")

    def build(self, host: Host) -> None:
        """Reflect the input of every site."""
        for site in host.find(self.sites, self.layers):
            width = site.in_features
            if self.gram_schmidt:
                vectors = host.kaiming(width, self.rank)
            else:
                pairs = host.kaiming(width, (self.rank + 1) // 2)
                vectors = pairs.repeat_interleave(2, dim=1)[:, : self.rank]
            lay_on_weight(host, site, Reflections(vectors, self.gram_schmidt, site))

    def num_parameters(self, host: Host) -> int:
        """Σ r d_in."""
        return sum(self.rank * site.in_features for site in host.find(self.sites, self.layers))


class Reflections(TurnedPath):
    """x ↦ x (H_r ⋯ H_1 - I) Wᵀ; U (in, r) holds the vectors as columns."""

    def __init__(self, vectors: Tensor, gram_schmidt: bool, site: Site) -> None:
        super().__init__(site)
        self.U = nn.Parameter(vectors)
        self.gram_schmidt = gram_schmidt

    def turn(self, x: Tensor) -> Tensor:
        """X (H_r ⋯ H_1 - I), from the last reflection to the first."""
        if self.gram_schmidt:
            basis = torch.linalg.qr(at_least_single(self.U)).Q.to(self.U.dtype)
            return -2 * (x @ basis) @ basis.T
        units = [*normalize(self.U, dim=0).unbind(1)]
        changed = torch.zeros_like(x)
        if len(units) % 2:
            changed = changed - 2 * _along(x, units.pop())
        while units:
            last, first = units.pop(), units.pop()
            z = x + changed
            z = z - 2 * _along(z, last)
            apart = last - first  # H_first - H_last = 2 (last last' - first first')
            inner = z @ last
            changed = changed + 2 * (inner[..., None] * apart + (z @ apart)[..., None] * first)
        return changed


def _along(x: Tensor, unit: Tensor) -> Tensor:
    """The part of x along a unit vector."""
    return (x @ unit)[..., None] * unit
