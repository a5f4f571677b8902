"""What adapters share: the bottleneck, where it can sit, its φ, and how it is laid."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.theory.errors import InputError, unknown


def check_activation(method: str, activation: str) -> None:
    """Refuse what is no fixed function.

    Raises:
        InputError: the name is unknown, or the activation has parameters of its own.
    """
    if activation not in ACT2FN:
        raise unknown("activation", activation, ACT2FN)
    if any(True for _ in ACT2FN[activation].parameters()):
        raise InputError(
            f"{method}: the activation {activation!r} has parameters of its own; choose a "
            "fixed one such as gelu or relu."
        )


def check_inner(method: str, field: str, inner: int, width: int, where: str) -> None:
    """Refuse an inner width above the width of the state.

    Raises:
        InputError: it is.
    """
    if inner > width:
        raise InputError(
            f"{method}: {field} {inner} is above the width {width} of {where}; choose 1 to {width}."
        )


def output_sites(
    method: str,
    host: Host,
    sites: Iterable[str],
    layers: Iterable[int] | None,
    bottleneck: int,
) -> list[Site]:
    """Linear maps behind which an adapter of this inner width can sit.

    Raises:
        InputError: a site is a slice of a matrix, or narrower than the bottleneck.
    """
    found = host.find(sites, layers)
    for site in found:
        if site.part is not None:
            raise InputError(
                f"{method}: {host.sites.model_type} computes several maps in {site.path}, whose "
                "output has no slice of its own to adapt; choose attention.output or mlp.down."
            )
        check_inner(method, "bottleneck", bottleneck, site.out_features, site.path)
    return found


class Bottleneck(nn.Module):
    """h ↦ h + φ(h W_d + b_d) W_u + b_u; shapes: down (m, d), up (d, m).

    W_u and the biases start at zero, so that the start is the identity exactly.
    """

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


@dataclass(frozen=True)
class OutputAdapter(Delta):
    """h + φ(h W_d + b_d) W_u + b_u behind linear maps; methods differ in which, and in φ.

    W_d starts Gaussian with variance 1/width.
    """

    bottleneck: int = 32
    activation: str = "gelu"
    sites: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None

    category = "addition"
    law = "h + phi(h W_d) W_u"
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
