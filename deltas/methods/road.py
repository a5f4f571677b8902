"""RoAd: the output of a linear map is turned and scaled, two features at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class RoAd(Delta):
    """h ↦ R h with 2 x 2 blocks on the pairs of features (i, i + g/2) of groups of g (Liao, Monz).

    A block maps (h₁, h₂) to (c₁ h₁ - s₁ h₂, c₂ h₂ + s₂ h₁) with c = α cos θ and s = α sin θ. The
    variant says what a block shares (their Eq. 3 and Table 1): with "one" θ and α, with "two" each
    row has its own, with "four" each of the four entries. θ starts at zero and α at one, so
    training starts at the base model. The bias is turned with the rest.

    Attributes:
        variant: how many pairs (θ, α) a block has.
        group_size: g, even; it divides the width of the output.
        sites: linear maps whose output is turned.
        layers: blocks to act in; None means all.
    """

    variant: Literal["one", "two", "four"] = "one"
    group_size: int = 16
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None

    name = "road"
    category = "reparametrisation"
    law = "R h, R = blocks of alpha (cos theta, -sin theta; sin theta, cos theta)"
    reference = "Liao, Monz, NeurIPS 2024, Eq. 3"
    bibtex = r"""
        @inproceedings{liao2024road,
          author = {Liao, Baohao and Monz, Christof},
          title = {3-in-1: {2D} Rotary Adaptation for Efficient Finetuning, Efficient Batching and
            Composability},
          booktitle = {Advances in Neural Information Processing Systems},
          year = {2024},
        }
    """
    num_parameters_formula = "sum over sites of k d_out, k = 1, 2 or 4"

    def __post_init__(self) -> None:
        """Check the variant and the group."""
        self._one_of("variant")
        if self.group_size < 2 or self.group_size % 2:
            raise InputError(f"road: group_size is {self.group_size}; expected an even number.")

    def build(self, host: Host) -> None:
        """Turn the output of every site."""
        for site in self._checked_sites(host):
            path = PairTurn(self.num_angles(site), self.variant, self.group_size, site)
            host.add(site.path, path, like=host.weight(site), key=site.key)
            host.on_output(site.module, path)
            host.on_merge(f"{site.path}.weight", partial(path.merged, transposed=True))
            if getattr(site.module, "bias", None) is not None:
                host.on_merge(f"{site.path}.bias", path.merged)

    def num_parameters(self, host: Host) -> int:
        """Σ k d_out: as many θ as α."""
        return sum(2 * self.num_angles(site) for site in self._checked_sites(host))

    def num_angles(self, site: Site) -> int:
        """Number of the θ at a site: one, two or four for each pair of features."""
        return {"one": 1, "two": 2, "four": 4}[self.variant] * site.out_features // 2

    def _checked_sites(self, host: Host) -> list[Site]:
        found = host.find(self.sites, self.layers)
        for site in found:
            if site.out_features % self.group_size:
                raise InputError(
                    f"road: group_size={self.group_size} does not divide the width "
                    f"{site.out_features} of {site.path}; choose an even divisor."
                )
        return found


class PairTurn(nn.Module):
    """h ↦ h + (R - I) h on the site's features; theta and alpha as the variant says.

    Shapes: (d_out/2,) for "one", by groups of g/2; (d_out,) for "two", by features; (2 d_out,) for
    "four", by groups: of each g of the factors c, then g of the factors s.
    """

    def __init__(self, number: int, variant: str, group_size: int, site: Site) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(number))
        self.alpha = nn.Parameter(torch.ones(number))
        self.variant, self.group_size, self.site = variant, group_size, site

    def factors(self) -> tuple[Tensor, Tensor]:
        """C and s of each output feature, (out,)."""
        theta, alpha = self.theta, self.alpha
        if self.variant == "four":
            theta, alpha = (v.view(-1, 2, self.group_size) for v in (theta, alpha))
            cosine = alpha[:, 0] * theta[:, 0].cos()
            return cosine.flatten(), (alpha[:, 1] * theta[:, 1].sin()).flatten()
        if self.variant == "one":  # both halves of a group share
            halves = [v.view(-1, 1, self.group_size // 2) for v in (theta, alpha)]
            theta, alpha = (v.expand(-1, 2, -1).flatten() for v in halves)
        return alpha * theta.cos(), alpha * theta.sin()

    def change(self, h: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """(R - I) h for h (..., out)."""
        pairs = h.unflatten(-1, (-1, 2, self.group_size // 2))
        across = torch.stack([-pairs[..., 1, :], pairs[..., 0, :]], dim=-2).flatten(-3)
        return (cosine - 1) * h + sine * across

    def forward(self, _inputs: tuple, output: Tensor) -> Tensor:
        """The site's output, turned."""
        return output + self.site.spread(self.change(self.site.take(output), *self.factors()))

    def merged(self, tensor: Tensor, *, transposed: bool = False) -> Tensor:
        """The weight (``transposed``) or the bias, turned, in float64."""
        theta, alpha = self.theta, self.alpha
        with torch.no_grad():
            wide = PairTurn(len(theta), self.variant, self.group_size, self.site).double()
            wide.theta.copy_(theta)
            wide.alpha.copy_(alpha)
            flip = transposed and not isinstance(self.site.module, Conv1D)
            last = tensor.T if flip else tensor  # output features last
            change = self.site.spread(wide.change(self.site.take(last), *wide.factors()))
            return tensor + (change.T if flip else change)
