"""Sparse changes of the base parameters: θ = θ₀ + δ, with δ zero except at a few places.

All parameters of a delta are thought of as laid end to end, a vector of D numbers. Where the places
are known before training, a control holds one value for each of them and nothing else; where they
are found while training, it holds one for each of the D and a mask.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.quantised import refuse_quantised
from deltacontrol.theory.errors import InputError


def check_density(name: str, density: float) -> None:
    """Refuse what is no fraction; ``name`` is the method's."""
    if not 0 < density <= 1:
        raise InputError(
            f"{name}: density is {density}; expected a fraction of the parameters, above 0 and up "
            "to 1."
        )


def num_kept(density: float, size: int) -> int:
    """K, the density times the number of parameters, at least one."""
    return max(1, round(density * size))


def maskable(
    host: Host, sites: Iterable[str] | None, layers: Iterable[int] | None
) -> dict[str, nn.Parameter]:
    """The backbone's parameters that a mask may select from, tied ones once.

    Raises:
        InputError: there are none.
    """
    parameters = host.distinct(host.backbone_names(sites, layers))
    if not parameters:
        raise InputError(
            f"{host.namespace}: {sites} of {host.sites.model_type} have no parameters; choose "
            "modules that have some, or sites=none for the whole backbone."
        )
    refuse_quantised(dict(parameters), f"{host.namespace} cannot change")
    return parameters


def random_places(size: int, count: int, seed: int) -> Tensor:
    """``count`` of ``size`` places, each set of them equally likely; ascending."""
    chosen = np.random.default_rng(seed).choice(size, count, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(chosen))


def largest(scores: Tensor, count: int) -> Tensor:
    """A mask of the ``count`` largest entries of a vector."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.topk(count).indices] = True
    return mask


class SparseChange(nn.Module):
    """θ₀ and ``values`` (k,) added at the ascending ``places`` (k,) of the D numbers end to end.

    k numbers are trained; a forward pass forms θ₀ + δ densely and forgets it, and its backward pass
    the dense gradient, one parameter after another, from which it takes k entries.

    Args:
        parameters: θ₀ by name.
        count: k.
        places: where; None means that they are chosen later, and then saved.
        seed: what ``places`` follow from, saved in their stead.
    """

    places: Tensor

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        count: int,
        places: Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(count))
        later = torch.full((count,), -1) if places is None else places
        self.register_buffer("places", later, persistent=seed is None)
        if seed is not None:
            self.register_buffer("seed", torch.tensor(seed))
        self.base = (dict(parameters),)  # in a tuple: θ₀ stays the base model's own
        self._share: tuple[Tensor, int, list[int]] | None = None

    @property
    def chosen(self) -> bool:
        """Whether the places are known."""
        return self._shares() is not None  # type: ignore[call-arg]

    @torch.compiler.disable
    def _shares(self) -> list[int] | None:
        """How many places lie in each parameter; None before they are chosen.

        Asks the device once for each change of the places, so it is no part of a compiled graph.
        """
        made = self._share
        if made is None or made[0] is not self.places or made[1] != self.places._version:
            if bool(self.places[0] < 0):
                return None
            (base,) = self.base
            sizes = torch.tensor([p.numel() for p in base.values()], device=self.places.device)
            ends = torch.searchsorted(self.places, sizes.cumsum(0)).diff(prepend=sizes.new_zeros(1))
            made = self._share = (self.places, self.places._version, ends.tolist())
        return made[2]

    @torch.no_grad()
    def choose(self, mask: Tensor) -> None:
        """Put the values, at zero, where ``mask`` (D,) is true."""
        self.places.copy_(mask.nonzero().squeeze(1))
        self.values.zero_()

    def forward(self) -> dict[str, Tensor]:
        """All parameters at the present values."""
        (base,), shares = self.base, self._shares()  # type: ignore[call-arg]
        assert shares is not None, "the places are not chosen"
        changed, first = {}, 0
        cuts = zip(self.places.split(shares), self.values.split(shares), strict=True)
        for (name, theta), (places, values) in zip(base.items(), cuts, strict=True):
            moved = theta.flatten().index_add(0, places - first, values.to(theta.dtype))
            changed[name] = moved.view_as(theta)
            first += theta.numel()
        return changed
