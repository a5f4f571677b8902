"""LoRA: a low-rank path beside a frozen linear map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, pad

from deltas.base import Delta
from deltas.host import Host
from deltas.sites import Site, add_change
from theory.errors import InputError


@dataclass(frozen=True)
class LoRA(Delta):
    """W + (α/r)·B A: linear in the state, bilinear in the control (Hu et al., Eq. 3).

    A ∈ R^{r×in} is uniform (Kaiming), B ∈ R^{out×r} is zero, so training starts at the base model.

    Attributes:
        rank: r.
        alpha: α; the path is scaled by α/r.
        sites: linear maps that get a path.
        layers: blocks to act in; None means all.
        dropout: probability of dropping an input of the path while training.
    """

    rank: int = 8
    alpha: float = 16.0
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0

    name = "lora"
    category = "reparametrisation"
    law = "x (W + (alpha/r) A B)"
    reference = "Hu et al., ICLR 2022, Eq. 3"
    num_parameters_formula = "sum over sites of r (d_in + d_out)"

    def __post_init__(self) -> None:
        """Check rank and dropout."""
        self._positive("rank")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora: dropout is {self.dropout}; expected 0 <= dropout < 1.")

    def build(self, host: Host) -> None:
        """Add a path at every site."""
        for site in self._checked_sites(host):
            down = torch.empty(self.rank, site.in_features)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=host.generator)
            path = LowRankPath(down, torch.zeros(site.out_features, self.rank), self, site)
            key = site.path if site.part is None else f"{site.path}.{site.part[0]}-{site.part[1]}"
            host.add(site.path, path, like=host.weight(site), key=key)
            host.on_output(site.module, path)
            host.on_merge(f"{site.path}.weight", partial(add_change, site, path.change))

    def num_parameters(self, host: Host) -> int:
        """Σ r (d_in + d_out)."""
        sites = self._checked_sites(host)
        return sum(self.rank * (site.in_features + site.out_features) for site in sites)

    def _checked_sites(self, host: Host) -> list[Site]:
        sites = host.find(self.sites, self.layers)
        for site in sites:
            bound = min(site.in_features, site.out_features)
            if self.rank > bound:
                raise InputError(
                    f"lora: rank {self.rank} is above the width {bound} of {site.path} "
                    f"({site.in_features} -> {site.out_features}); choose a rank from 1 to {bound}."
                )
        return sites


class LowRankPath(nn.Module):
    """y ↦ y + (α/r)·B A x, on the output features ``part`` of the site.

    Shapes: A (rank, in), B (out, rank).
    """

    def __init__(self, down: Tensor, up: Tensor, config: LoRA, site: Site) -> None:
        super().__init__()
        self.A = nn.Parameter(down)
        self.B = nn.Parameter(up)
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        start, stop = site.part or (0, site.total_out_features)
        self.margins = (start, site.total_out_features - stop)

    def change(self) -> Tensor:
        """(α/r)·B A, (out, in), in float64."""
        return self.scale * self.B.detach().double() @ self.A.detach().double()

    def forward(self, inputs: tuple, output: Tensor) -> Tensor:
        """The site's output with the path's contribution added."""
        x = inputs[0]
        if self.dropout:
            x = dropout(x, self.dropout, self.training)
        change = linear(linear(x, self.A) * self.scale, self.B)
        return output + (pad(change, self.margins) if any(self.margins) else change)
