"""Sparse random signs: few entries in each row, their places computed anew from a hash."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.dimension.projections.base import Projection
from deltacontrol.theory.errors import InputError

_ROWS = 2**16


@typed
class SparseSignProjection(Projection):
    """``s`` entries ``+-sqrt(d_r / D)`` in each row, one in each of ``s`` ranges of columns.

    The ``d`` columns are cut into ``s`` ranges, ``d_r`` long; range ``r`` of row ``i`` has one
    entry, at a place and with a sign that are a hash of ``(seed, i, r)``. Each entry has mean 0 and
    variance ``1/D`` and entries of one row are uncorrelated: ``E ||P z||^2 = ||z||^2``. With
    ``s = 1`` columns have no row in common: they are orthogonal, and ``P`` is the transpose of a
    count sketch. Every coordinate of ``theta`` then follows a single one of ``z``, and with ``d_r``
    columns in a range their numbers of rows vary by the relative deviation ``sqrt(d_r / D)``.

    Nothing is stored: the hash is computed in each product, 2^16 rows at once. On a GPU ``P.T @ v``
    adds in no fixed order, so that its last digits may differ from call to call.

    Sources: Achlioptas, JCSS 66, 2003 and Li, Hastie & Church, KDD 2006 (sparse signs); Kane &
    Nelson, JACM 61(1), 2014 (one entry in each of ``s`` ranges); Steele, Lea & Flood, OOPSLA 2014
    (SplitMix, the hash).

    Args:
        full_dim: ``D``.
        sub_dim: ``d``.
        seed: of the hash.
        dtype: of its arguments and values.
        device: of its arguments and values.
        nonzeros: ``s``; at most ``d`` of them are used.

    Raises:
        InputError: unless ``s`` is at least 1.
    """

    def __init__(
        self,
        full_dim: int,
        sub_dim: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        nonzeros: int = 4,
    ) -> None:
        """Lay out the ranges."""
        super().__init__(full_dim, sub_dim, dtype, device)
        if nonzeros < 1:
            raise InputError(f"nonzeros is {nonzeros}; expected at least 1 entry in each row")
        self.nonzeros = min(nonzeros, sub_dim)
        edges = [sub_dim * r // self.nonzeros for r in range(self.nonzeros + 1)]
        self._ranges = list(zip(edges, edges[1:], strict=False))
        self._seed = seed

    @property
    def num_bytes(self) -> int:
        """Nothing."""
        return 0

    def _entries(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows with the column and the value of one entry in each, range after range."""
        for start in range(0, self.full_dim, _ROWS):
            rows = slice(start, min(start + _ROWS, self.full_dim))
            index = torch.arange(rows.start, rows.stop, device=self.device)
            for r, (low, high) in enumerate(self._ranges):
                hashed = _mix(index * self.nonzeros + r, self._seed)
                column = low + ((hashed >> 32 & 0x7FFFFFFF) * (high - low) >> 31)
                sign = 1 - 2 * (hashed & 1)
                yield rows, column, sign.to(self.dtype) * math.sqrt((high - low) / self.full_dim)

    def _apply(self, z: Tensor) -> Tensor:
        result = z.new_zeros((*z.shape[:-1], self.full_dim))
        for rows, column, value in self._entries():
            result[..., rows] += z[..., column] * value
        return result

    def _apply_transpose(self, v: Tensor) -> Tensor:
        total = v.new_zeros((*v.shape[:-1], self.sub_dim))
        for rows, column, value in self._entries():
            total.index_add_(-1, column, v[..., rows] * value)
        return total


def _mix(counter: Tensor, seed: int) -> Tensor:
    """SplitMix's finaliser of ``counter + seed``: 64 bits, as a signed integer."""
    # Wrapped into the signed range by hand; products of tensors wrap by themselves.
    x = counter * _signed(0x9E3779B97F4A7C15) + _signed((seed + 1) * 0xD1342543DE82EF95)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _logical(x, shift)) * _signed(factor)
    return x ^ _logical(x, 31)


def _logical(x: Tensor, shift: int) -> Tensor:
    return x >> shift & (1 << (64 - shift)) - 1


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value
