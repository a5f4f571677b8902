"""What adapters share: the bottleneck, where it can sit, and which φ it can have."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from deltas.host import Host
from deltas.sites import Site
from theory.errors import InputError, unknown


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
