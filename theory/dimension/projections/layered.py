"""Projections with a structure of layers: one per layer, or one scale per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.dimension.projections.base import Projection
from deltacontrol.theory.errors import InputError


@typed
class BlockDiagonalProjection(Projection):
    """``P = diag(P_1, .., P_m)``: each layer has coordinates of its own.

    ``E ||P z||^2 = ||z||^2``, as it holds for every part.

    Args:
        parts: a projection for each layer, in the order of the layers.

    Raises:
        InputError: if there is none, or if dtypes or devices differ.
    """

    def __init__(self, parts: Sequence[Projection]) -> None:
        """Check and keep the parts."""
        kinds = {(part.dtype, part.device) for part in parts}
        if len(kinds) != 1:
            raise InputError(
                f"{len(parts)} parts have {len(kinds)} pairs of dtype and device; expected at "
                "least one part, and all of the same pair"
            )
        ((dtype, device),) = kinds
        full_dim, sub_dim = sum(p.full_dim for p in parts), sum(p.sub_dim for p in parts)
        super().__init__(full_dim, sub_dim, dtype, device)
        self.parts = tuple(parts)

    @property
    def num_bytes(self) -> int:
        """Those of all parts."""
        return sum(part.num_bytes for part in self.parts)

    def _apply(self, z: Tensor) -> Tensor:
        pieces = z.split([part.sub_dim for part in self.parts], -1)
        return torch.cat([p._apply(x) for p, x in zip(self.parts, pieces, strict=True)], -1)

    def _apply_transpose(self, v: Tensor) -> Tensor:
        pieces = v.split([part.full_dim for part in self.parts], -1)
        return torch.cat(
            [p._apply_transpose(x) for p, x in zip(self.parts, pieces, strict=True)], -1
        )


@typed
class LayerScaledProjection(Projection):
    """``diag(c lambda_i I) P``: one projection of all layers, each layer with a scale.

    With ``lambda_i`` trained beside ``z`` this is the parametrisation of SAID; here it is fixed,
    for instance the size of a layer's weights. ``c`` makes ``sum_i (c lambda_i)^2 D_i = D``, so
    that ``E ||P z||^2 = ||z||^2`` where all entries of ``P`` have variance ``1/D``.

    Source: Aghajanyan, Gupta & Zettlemoyer, ACL 2021, equation (2).

    Args:
        projection: ``P``, of all layers.
        sizes: ``D_i``.
        scales: ``lambda_i``.

    Raises:
        InputError: if the sizes do not sum to ``D``, or no scale differs from zero.
    """

    def __init__(
        self, projection: Projection, sizes: Sequence[int], scales: Sequence[float]
    ) -> None:
        """Normalise the scales."""
        full_dim = projection.full_dim
        super().__init__(full_dim, projection.sub_dim, projection.dtype, projection.device)
        if sum(sizes) != full_dim or len(scales) != len(sizes) or min(sizes) < 1:
            raise InputError(
                f"{len(scales)} scales of {len(sizes)} layers with {sum(sizes)} coordinates; "
                f"expected one scale a layer, and {full_dim} coordinates in all"
            )
        square = sum(size * scale**2 for size, scale in zip(sizes, scales, strict=True))
        if not (square > 0 and math.isfinite(square)):
            raise InputError(f"scales are {list(scales)}; expected finite ones, not all zero")
        self.projection = projection
        self._sizes = list(sizes)
        self._scales = [scale * math.sqrt(full_dim / square) for scale in scales]

    @property
    def num_bytes(self) -> int:
        """Those of ``P``."""
        return self.projection.num_bytes

    def _scale(self, v: Tensor) -> Tensor:
        pieces = zip(v.split(self._sizes, -1), self._scales, strict=True)
        return torch.cat([piece * scale for piece, scale in pieces], -1)

    def _apply(self, z: Tensor) -> Tensor:
        return self._scale(self.projection._apply(z))

    def _apply_transpose(self, v: Tensor) -> Tensor:
        return self.projection._apply_transpose(self._scale(v))
