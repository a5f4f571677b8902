"""Paths whose change of weight is a function of the base weight as well.

Vectors are rows: a site maps x to x Wᵀ with W (out, in). A path that turns the input, x ↦ x R, is
written as the change x ↦ x (R - I) Wᵀ beside the map, so that R = I leaves the model as it is, bit
for bit, and a slice of a fused matrix can be turned alone.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import WeightPath
from deltacontrol.deltas.editing.sites import Site, add_change
from deltacontrol.deltas.quantised import values_of
from deltacontrol.theory.errors import InputError


class OnWeightPath(WeightPath):
    """ΔW = φ(W; controls), W the base weight, without what else acts beside it."""

    def __init__(self, site: Site, dropout: float = 0.0) -> None:
        super().__init__(site, dropout)
        self.site = site

    @abstractmethod
    def change_of(self, base: Tensor) -> Tensor:
        """ΔW (out, in) for the base weight ``base`` (out, in)."""

    def base(self) -> Tensor:
        """W (out, in), the rows of the site; the values of a quantised weight in float32."""
        return self.site.rows(values_of(self.site.module, torch.float32))

    def weight(self) -> Tensor:
        """ΔW of the present base weight."""
        return self.change_of(self.base())

    def merged(self, parameter: Callable[[], Tensor], weight: Tensor) -> Tensor:
        """The weight with ΔW added, in float64.

        Args:
            parameter: gives the base parameter, without what acts beside it.
            weight: the weight with all that acted before.
        """
        with torch.no_grad():
            own = copy.deepcopy(self, {id(self.site): self.site}).double()
            base = self.site.rows(parameter().double())
            return add_change(self.site, lambda: own.change_of(base), weight)


class TurnedPath(OnWeightPath):
    """x ↦ x R Wᵀ: the input is turned before the map."""

    @abstractmethod
    def turn(self, x: Tensor) -> Tensor:
        """X (R - I) for x (..., in)."""

    def change_of(self, base: Tensor) -> Tensor:
        """W (R - I)'."""
        eye = torch.eye(base.shape[1], dtype=base.dtype, device=base.device)
        return base @ self.turn(eye).T

    def through(self, x: Tensor) -> Tensor:
        """X (R - I) Wᵀ, without forming R."""
        return linear(self.turn(x), self.base())


def lay_on_weight(host: Host, site: Site, path: OnWeightPath) -> None:
    """Let a path act at a site, and tell how the base weight takes it up."""
    host.add(site.path, path, like=host.weight(site), key=site.key)
    host.on_output(site.module, path)
    name = f"{site.path}.weight"
    host.on_merge(name, partial(path.merged, partial(host.controlled, name)))


def block_sizes(name: str, width: int, size: int, count: int) -> tuple[int, int]:
    """Size and number of the equal blocks of a width; ``count`` decides where it is not zero.

    Raises:
        InputError: the width has no such blocks.
    """
    part = count or size
    if width % part:
        what = f"num_blocks={count}" if count else f"block_size={size}"
        fitting = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise InputError(f"{name}: {what} does not divide the width {width}; choose of {fitting}.")
    return (width // part, part) if count else (part, width // part)


def cayley(skew: Tensor) -> Tensor:
    """R - I = -2 Q (I + Q)⁻¹ for skew Q (..., b, b): R = (I - Q)(I + Q)⁻¹ is a rotation."""
    wide = at_least_single(skew)
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    return torch.linalg.solve(eye + wide, -2 * wide, left=False).to(skew.dtype)


def at_least_single(values: Tensor) -> Tensor:
    """Values in float32 where their format is a narrower one, which solvers and transforms lack."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
