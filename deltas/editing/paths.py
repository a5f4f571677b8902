"""A path beside a frozen linear map: y ↦ y + ΔW x, with ΔW a function of the controls.

LoRA and its kin differ in ΔW (out, in) alone. A path says what ΔW is, and, where that is cheaper,
how to apply it without forming it; where it acts, how slices of fused matrices are served and how
the base weight takes it up is the same for all.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import Site, add_change, spread
from deltacontrol.theory.errors import InputError


class WeightPath(nn.Module, ABC):
    """y ↦ y + ΔW x on the output features ``part`` of a site.

    Args:
        site: the linear map.
        dropout: probability of dropping an input of the path while training.
    """

    def __init__(self, site: Site, dropout: float = 0.0) -> None:
        super().__init__()
        self.margins, self.groups = site.margins, site.groups
        self.dropout = dropout

    @abstractmethod
    def weight(self) -> Tensor:
        """ΔW (out, in), differentiable in the controls."""

    def through(self, x: Tensor) -> Tensor:
        """ΔW x for x (..., in)."""
        return linear(x, self.weight())

    def change(self) -> Tensor:
        """The present ΔW, evaluated in float64."""
        with torch.no_grad():
            return copy.deepcopy(self).double().weight()

    def forward(self, inputs: tuple, output: Tensor) -> Tensor:
        """The site's output with the path's contribution added."""
        x = inputs[0]
        if self.dropout:
            x = dropout(x, self.dropout, self.training)
        change = self.through(x)
        return output + spread(change, self.margins, self.groups)


def lay(host: Host, site: Site, path: WeightPath) -> None:
    """Let a path act at a site, and tell how the base weight takes it up."""
    host.add(site.path, path, like=host.weight(site), key=site.key)
    host.on_output(site.module, path)
    host.on_merge(f"{site.path}.weight", partial(add_change, site, path.change))


def check_dropout(name: str, probability: float) -> None:
    """Refuse what is no probability below one; ``name`` is the method's."""
    if not 0 <= probability < 1:
        raise InputError(f"{name}: dropout is {probability}; expected 0 <= dropout < 1.")


def widths(site: Site) -> tuple[int, int]:
    """Width of the input and of the output of the map; an embedding maps one-hot tokens."""
    if isinstance(site.module, nn.Embedding):
        return site.module.num_embeddings, site.module.embedding_dim
    return site.in_features, site.out_features


def low_rank_sites(
    host: Host,
    sites: Iterable[str],
    layers: Iterable[int] | None,
    *,
    embeddings: bool = False,
) -> list[Site]:
    """Linear maps, and ``embeddings`` where they are wanted, that can take a low-rank path.

    A rank above a width is no error: it costs more numbers than the whole change, and peft has it.

    Raises:
        InputError: a site is no such map.
    """
    found = host.find(sites, layers)
    for site in found:
        _ = widths(site) if embeddings else (site.in_features, site.out_features)
    return found
