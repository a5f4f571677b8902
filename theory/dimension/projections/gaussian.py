"""Gaussian matrices: stored, or generated anew from a counter in every product."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.dimension.projections.base import Projection
from deltacontrol.theory.errors import InputError

_DENSE_LIMIT = 2**27
_TILE = 2**16
_BLOCK = 2**20


@typed
class DenseProjection(Projection):
    """A stored Gaussian matrix, with orthonormal columns (``P'P = I``) unless told otherwise.

    With orthonormal columns its range is uniform over all ``d``-dimensional subspaces and
    ``||P z|| = ||z||`` holds for each draw; they cost a QR decomposition, ``O(D d^2)``. Otherwise
    the entries are independent with variance ``1/D``. Memory: ``D d`` numbers.

    Args:
        full_dim: ``D``.
        sub_dim: ``d``.
        seed: of the matrix.
        dtype: of the matrix; it is drawn and orthonormalised in float64.
        device: where the matrix is stored.
        orthonormal: whether to orthonormalise the columns.

    Raises:
        InputError: if the matrix would have more than 2^27 entries.
    """

    def __init__(
        self,
        full_dim: int,
        sub_dim: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        orthonormal: bool = True,
    ) -> None:
        """Draw the matrix."""
        super().__init__(full_dim, sub_dim, dtype, device)
        if full_dim * sub_dim > _DENSE_LIMIT:
            raise InputError(
                f"a dense projection of {full_dim} x {sub_dim} = {full_dim * sub_dim} entries is "
                f"too large (limit {_DENSE_LIMIT}); use FastfoodProjection, or GaussianProjection, "
                "which stores nothing"
            )
        gaussian = np.random.default_rng(seed).standard_normal((full_dim, sub_dim))
        matrix = torch.from_numpy(gaussian)
        if orthonormal:
            matrix, upper = torch.linalg.qr(matrix)
            # With a positive diagonal of R the frame is unique and Haar distributed.
            matrix = matrix * torch.where(upper.diagonal() < 0, -1.0, 1.0)
        else:
            matrix = matrix / math.sqrt(full_dim)
        self._matrix = matrix.to(self.device, dtype)

    @property
    def num_bytes(self) -> int:
        """``D d`` entries."""
        return self._matrix.nbytes

    def _apply(self, z: Tensor) -> Tensor:
        return z @ self._matrix.mT

    def _apply_transpose(self, v: Tensor) -> Tensor:
        return v @ self._matrix


@typed
class GaussianProjection(Projection):
    """Independent Gaussian entries of variance ``1/D``, of which none is stored.

    Entry ``(i, j)`` is number ``i d + j`` of a stream that is cut into tiles of 2^16; tile ``t``
    comes from a generator of its own, Philox with the seed as key and ``t`` as counter. Rows are
    generated, multiplied and forgotten, block by block; the numbers do not depend on the blocks.

    The exact law, at the price of drawing ``D d`` numbers in each product (about 10 ns each):
    for small sizes, and as what structured projections are held against.

    Source: Salmon, Moraes, Dror & Shaw, *Parallel random numbers: as easy as 1, 2, 3*, SC 2011.

    Args:
        full_dim: ``D``.
        sub_dim: ``d``.
        seed: the key.
        dtype: of the products; entries are drawn in float64.
        device: of the products; entries are drawn on the CPU.
        block: numbers that are held at once, at least one row.
    """

    def __init__(
        self,
        full_dim: int,
        sub_dim: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        block: int = _BLOCK,
    ) -> None:
        """Keep the seed."""
        super().__init__(full_dim, sub_dim, dtype, device)
        self._seed = seed
        self._rows = max(1, block // sub_dim)

    @property
    def num_bytes(self) -> int:
        """Nothing."""
        return 0

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their entries ``(rows, d)``."""
        d = self.sub_dim
        tiles = _Tiles(self._seed, self.full_dim * d)
        for start in range(0, self.full_dim, self._rows):
            stop = min(start + self._rows, self.full_dim)
            entries = torch.from_numpy(tiles.numbers(start * d, stop * d)).view(-1, d)
            yield (
                slice(start, stop),
                (entries / math.sqrt(self.full_dim)).to(self.device, self.dtype),
            )

    def _apply(self, z: Tensor) -> Tensor:
        result = z.new_empty((*z.shape[:-1], self.full_dim))
        for rows, entries in self._blocks():
            result[..., rows] = z @ entries.mT
        return result

    def _apply_transpose(self, v: Tensor) -> Tensor:
        total = v.new_zeros((*v.shape[:-1], self.sub_dim))
        for rows, entries in self._blocks():
            total += v[..., rows] @ entries
        return total


class _Tiles:
    """A stream of ``count`` standard normal numbers of which any part can be had."""

    def __init__(self, seed: int, count: int) -> None:
        self._seed = seed
        self._count = count
        self._last: tuple[int, np.ndarray] | None = None

    def numbers(self, start: int, stop: int) -> np.ndarray:
        """Numbers ``start`` to ``stop``, excluded."""
        parts = []
        for index in range(start // _TILE, -(-stop // _TILE)):
            low = index * _TILE
            parts.append(self._tile(index)[max(start - low, 0) : stop - low])
        return np.concatenate(parts)

    def _tile(self, index: int) -> np.ndarray:
        # Consecutive blocks meet within a tile: the last one is kept.
        if self._last is None or self._last[0] != index:
            philox = np.random.Philox(key=self._seed, counter=[0, 0, index, 0])
            size = min(_TILE, self._count - index * _TILE)
            self._last = index, np.random.Generator(philox).standard_normal(size)
        return self._last[1]
