"""Houlsby adapters: a bottleneck after both sub-layers of every block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from deltas.base import Delta
from deltas.host import Host
from deltas.sites import Site
from theory.errors import InputError, unknown


@dataclass(frozen=True)
class HoulsbyAdapter(Delta):
    """h + φ(h W_d + b_d) W_u + b_u after the attention's and the MLP's output projection.

    It acts before the block's own residual connection and normalisation (Houlsby et al., Fig. 2).
    W_u and the biases start at zero, so that the start is the identity exactly; W_d is Gaussian
    with variance 1/width.

    Attributes:
        bottleneck: m, the inner width.
        activation: φ, by its name in transformers.
        sites: linear maps whose output is adapted.
        layers: blocks to act in; None means all.
    """

    bottleneck: int = 32
    activation: str = "gelu"
    sites: tuple[str, ...] = ("attention.output", "mlp.down")
    layers: tuple[int, ...] | None = None

    name = "houlsby"
    category = "addition"
    law = "h + phi(h W_d) W_u"
    reference = "Houlsby et al., ICML 2019, Section 2.1"
    num_parameters_formula = "sum over sites of 2 m d + d + m"
    unmergeable = "its bottleneck is not linear in the state"

    def __post_init__(self) -> None:
        """Check the bottleneck and the activation."""
        self._positive("bottleneck")
        if self.activation not in ACT2FN:
            raise unknown("activation", self.activation, ACT2FN)
        if any(True for _ in ACT2FN[self.activation].parameters()):
            raise InputError(
                f"houlsby: the activation {self.activation!r} has parameters of its own; choose a "
                "fixed one such as gelu or relu."
            )

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
        sites = host.find(self.sites, self.layers)
        for site in sites:
            if site.part is not None:
                raise InputError(
                    f"houlsby: {host.sites.model_type} computes several maps in {site.path}, whose "
                    "output has no slice of its own to adapt; choose attention.output or mlp.down."
                )
            if self.bottleneck > site.out_features:
                raise InputError(
                    f"houlsby: bottleneck {self.bottleneck} is above the width "
                    f"{site.out_features} of {site.path}; choose 1 to {site.out_features}."
                )
        return sites


class Bottleneck(nn.Module):
    """h ↦ h + φ(h W_d + b_d) W_u + b_u; shapes: down (m, d), up (d, m)."""

    def __init__(self, down: Tensor, activation: str) -> None:
        super().__init__()
        inner, width = down.shape
        self.down = nn.Parameter(down)
        self.down_bias = nn.Parameter(torch.zeros(inner))
        self.up = nn.Parameter(torch.zeros(width, inner))
        self.up_bias = nn.Parameter(torch.zeros(width))
        self.activation = ACT2FN[activation]

    def forward(self, _inputs: tuple, state: Tensor) -> Tensor:
        """The adapted state."""
        inner = self.activation(linear(state, self.down, self.down_bias))
        return state + linear(inner, self.up, self.up_bias)
