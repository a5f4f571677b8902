"""Pfeiffer adapters: one bottleneck a block, after the MLP."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deltas.adapters import Bottleneck, check_activation, output_sites
from deltas.base import Delta
from deltas.host import Host
from deltas.sites import Site


@dataclass(frozen=True)
class PfeifferAdapter(Delta):
    """h + φ(h W_d + b_d) W_u + b_u after the MLP's output projection alone.

    Half of Houlsby's adapters, which Pfeiffer et al. found to do as well. Their adapter reads the
    MLP's output behind one more use of the block's normalisation; here it reads that output itself,
    which also serves blocks that normalise before the MLP.

    Attributes:
        bottleneck: m, the inner width.
        activation: φ, by its name in transformers.
        sites: linear maps whose output is adapted.
        layers: blocks to act in; None means all.
    """

    bottleneck: int = 32
    activation: str = "relu"
    sites: tuple[str, ...] = ("mlp.down",)
    layers: tuple[int, ...] | None = None

    name = "pfeiffer"
    category = "addition"
    law = "h + phi(h W_d) W_u"
    reference = "Pfeiffer et al., EACL 2021, Section 4; Pfeiffer et al., EMNLP 2020, Eq. 1"
    num_parameters_formula = "sum over blocks of 2 m d + d + m"
    unmergeable = "its bottleneck is not linear in the state"

    def __post_init__(self) -> None:
        """Check the bottleneck and the activation."""
        self._positive("bottleneck")
        check_activation(self.name, self.activation)

    def build(self, host: Host) -> None:
        """Add an adapter at every site."""
        for site in self._checked_sites(host):
            width = site.out_features
            down = host.normal(self.bottleneck, width, std=1 / math.sqrt(width))
            adapter = Bottleneck(down, self.activation)
            host.add(site.path, adapter, like=host.weight(site))
            host.on_output(site.module, adapter)

    def num_parameters(self, host: Host) -> int:
        """Σ 2 m d + d + m."""
        m = self.bottleneck
        widths = [site.out_features for site in self._checked_sites(host)]
        return sum(2 * m * d + d + m for d in widths)

    def _checked_sites(self, host: Host) -> list[Site]:
        return output_sites(self.name, host, self.sites, self.layers, self.bottleneck)
