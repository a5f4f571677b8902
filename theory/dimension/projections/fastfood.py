"""Fastfood: a structured Gaussian matrix in ``O(D log d)``, laid out for matrix products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.dimension.hadamard import butterfly_reference, transform_columns
from deltacontrol.theory.dimension.projections.base import Projection
from deltacontrol.theory.errors import InputError

_CHUNK = {"cpu": 2**18}  # numbers worked on at once: two such buffers fit the cache of one core
_CHUNK_ELSEWHERE = 2**22
_DRAWN = 2**18
_MAX_SHARED, _MIN_SHARED_ROWS = 64, 2**12


@dataclass(frozen=True)
class _Piece:
    """Groups that are worked on together.

    Attributes:
        groups: which ones.
        num_blocks: blocks in each of them.
        start: the first of their rows.
        stop: behind the last of their rows, those beyond ``D`` included.
    """

    groups: slice
    num_blocks: int
    start: int
    stop: int

    @property
    def num_groups(self) -> int:
        return self.groups.stop - self.groups.start


@typed
class FastfoodProjection(Projection):
    """Fastfood: stacked blocks ``S H G Pi H B_k / sqrt(D n)``, ``O(D log d)``, never a matrix.

    ``n`` is the next power of two from ``d``, to which ``z`` is padded with zeros; ``H`` is the
    ``n x n`` Hadamard matrix of entries +-1, ``B_k`` random signs, ``Pi`` a permutation, ``G``
    independent Gaussians, and ``S_i = s_i / ||G||_F`` with ``s_i`` chi distributed with ``n``
    degrees of freedom, which gives each row the length that a Gaussian row has.

    *What is shared.* Every block has signs of its own; ``share`` blocks, a group, have ``Pi``,
    ``G`` and ``S`` in common: 64 where ``D`` is large, fewer where 64 blocks are many numbers (down
    to 16), and one where ``D`` is below 8192.
    Each entry has mean 0 and variance ``1/D``, entries of one row are uncorrelated, and so are rows
    of different blocks, by their signs alone; hence ``E ||P z||^2 = ||z||^2`` exactly. Sharing
    costs nothing in the norm that could be seen: given ``G`` and ``Pi`` each column of ``H G Pi H``
    has the same length ``sqrt(n) ||G||``, so that the mean over the signs of a block's ``P_k'
    P_k`` is diagonal, with entries that ``S`` alone moves from ``n/D``, by the relative deviation
    ``sqrt(6)/n``. Off the diagonal ``P'P`` has about the variance ``2/D``, shared or not, where a
    Gaussian matrix has ``1/D``.

    *Layout.* A group is an array ``(n, share)``, block by block in its columns, and its rows are
    consecutive coordinates of ``theta``. (Where Fastfood stacks block under block this is another
    order of the rows, fixed once.) So ``Pi`` gathers contiguous rows, ``H`` is two or three matrix
    products without a transposition, and 2^18 numbers pass from one buffer into another.

    Memory: a byte per row for the signs, and per group and ``n`` two numbers of the dtype and 8
    bytes for ``Pi`` and its inverse; two buffers of 2^18 numbers (or one group) while it works.

    Source: Le, Sarlos & Smola, *Fastfood*, ICML 2013, equations (7) and (8) for the product; Li et
    al., ICLR 2018 and Aghajanyan et al., ACL 2021 for its use on network weights.

    Args:
        full_dim: ``D``.
        sub_dim: ``d``.
        seed: of all random factors.
        dtype: of the factors; they are drawn in float64.
        device: where the factors are stored.
        share: blocks in a group; None takes the rule above.

    Raises:
        InputError: if ``share`` is below 1.
    """

    draws = 2

    def __init__(
        self,
        full_dim: int,
        sub_dim: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        share: int | None = None,
    ) -> None:
        """Draw the factors."""
        super().__init__(full_dim, sub_dim, dtype, device)
        n = self.block_size = 1 << (sub_dim - 1).bit_length()
        self.num_blocks = -(-full_dim // n)
        if share is not None and share < 1:
            raise InputError(f"share is {share}; expected at least 1 block in a group")
        self.share = min(share or self._share(), self.num_blocks)
        self.num_groups = -(-self.num_blocks // self.share)
        chunk = _CHUNK.get(self.device.type, _CHUNK_ELSEWHERE)
        self._together = max(1, chunk // (n * self.share))
        rng = np.random.default_rng(seed)
        shape = (self.num_groups, n)
        self._gaussians = torch.empty(shape, dtype=dtype, device=self.device)
        self._lengths = torch.empty(shape, dtype=dtype, device=self.device)
        self._permutation = torch.empty(shape, dtype=torch.int32, device=self.device)
        self._inverse = torch.empty(shape, dtype=torch.int32, device=self.device)
        at_once = max(1, _DRAWN // n)  # a part of the law: it orders the draws
        for first in range(0, self.num_groups, at_once):
            self._draw(slice(first, min(first + at_once, self.num_groups)), rng)
        self._signs = torch.empty(self.num_blocks * n, dtype=torch.int8, device=self.device)
        for start in range(0, len(self._signs), 2**20):
            part = self._signs[start : start + 2**20]
            bits = np.unpackbits(rng.integers(0, 256, -(-len(part) // 8), dtype=np.uint8))
            signs = 2 * bits[: len(part)].astype(np.int8) - 1
            part.copy_(torch.from_numpy(signs))

    def _share(self) -> int:
        """Fewer blocks where little is to be had, or where a group would leave the cache."""
        fitting = max(16, 2**18 // self.block_size)
        wanted = min(_MAX_SHARED, fitting, self.full_dim // _MIN_SHARED_ROWS)
        return 1 << max(0, wanted.bit_length() - 1)

    def _draw(self, groups: slice, rng: np.random.Generator) -> None:
        n = self.block_size
        shape = (groups.stop - groups.start, n)
        gaussians = rng.standard_normal(shape)
        norms = np.linalg.norm(gaussians, axis=1, keepdims=True)
        lengths = np.sqrt(rng.chisquare(n, shape)) / (norms * math.sqrt(self.full_dim * n))
        permutation = rng.permuted(np.broadcast_to(np.arange(n), shape), axis=1)
        # Rows are gathered from all groups that are worked on together; an unfinished one is alone.
        shift = np.arange(groups.start, groups.stop)[:, None] % self._together * n
        shift[max(0, self.num_blocks // self.share - groups.start) :] = 0
        for factor, values in (
            (self._gaussians, gaussians),
            (self._lengths, lengths),
            (self._permutation, permutation + shift),
            (self._inverse, np.argsort(permutation, axis=1) + shift),
        ):
            factor[groups].copy_(torch.from_numpy(values))

    @property
    def num_bytes(self) -> int:
        """The bytes of ``B``, ``G``, ``S`` and ``Pi``."""
        factors = (self._signs, self._gaussians, self._lengths, self._permutation, self._inverse)
        return sum(factor.nbytes for factor in factors)

    @property
    def working_bytes(self) -> int:
        """The bytes of the buffers of one product, its result not counted."""
        size = max(piece.stop - piece.start for piece in self._pieces())
        return 2 * size * self._gaussians.element_size()

    def _pieces(self) -> Iterator[_Piece]:
        """All groups in order; the last one may have fewer blocks and is alone."""
        full = self.num_blocks // self.share
        size = self.block_size * self.share
        for first in range(0, full, self._together):
            last = min(first + self._together, full)
            yield _Piece(slice(first, last), self.share, first * size, last * size)
        if rest := self.num_blocks % self.share:
            start = full * size
            yield _Piece(slice(full, full + 1), rest, start, start + rest * self.block_size)

    def _buffers(self) -> Tensor:
        size = max(piece.stop - piece.start for piece in self._pieces())
        return torch.empty(2, size, dtype=self.dtype, device=self.device)

    def _apply(self, z: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(z, (0, self.block_size - self.sub_dim))
        count = math.prod(z.shape[:-1])
        results = z.new_empty((count, self.full_dim))
        vectors = padded.reshape(count, self.block_size)
        buffers = self._buffers()
        for piece in self._pieces():
            shape = (piece.num_groups, self.block_size, piece.num_blocks)
            x, y = (buffer[: piece.stop - piece.start].view(shape) for buffer in buffers)
            signs = self._signs[piece.start : piece.stop].view(shape)
            for vector, into in zip(vectors, results, strict=True):
                x.copy_(signs).mul_(vector[:, None])
                x, y = transform_columns(x, y)
                x, y = _gather(x, self._permutation[piece.groups], y), x
                x.mul_(self._gaussians[piece.groups, :, None])
                x, y = transform_columns(x, y)
                lengths = self._lengths[piece.groups, :, None]
                if piece.stop <= self.full_dim:
                    torch.mul(x, lengths, out=into[piece.start : piece.stop].view(shape))
                else:
                    into[piece.start :] = x.mul_(lengths).view(-1)[: self.full_dim - piece.start]
        return results.view(*z.shape[:-1], self.full_dim)

    def _apply_transpose(self, v: Tensor) -> Tensor:
        vectors = v.reshape(math.prod(v.shape[:-1]), self.full_dim)
        total = v.new_zeros((len(vectors), self.block_size))
        buffers = self._buffers()
        for piece in self._pieces():
            shape = (piece.num_groups, self.block_size, piece.num_blocks)
            x, y = (buffer[: piece.stop - piece.start].view(shape) for buffer in buffers)
            signs = self._signs[piece.start : piece.stop].view(shape)
            for vector, into in zip(vectors, total, strict=True):
                part = vector[piece.start : piece.stop]
                x.view(-1)[: len(part)] = part
                x.view(-1)[len(part) :] = 0
                x.mul_(self._lengths[piece.groups, :, None])
                x, y = transform_columns(x, y)
                x.mul_(self._gaussians[piece.groups, :, None])
                x, y = _gather(x, self._inverse[piece.groups], y), x
                x, y = transform_columns(x, y)
                into += x.mul_(y.copy_(signs)).sum((0, 2))
        return total[:, : self.sub_dim].reshape(*v.shape[:-1], self.sub_dim)

    def product_reference(self, z: Tensor) -> Tensor:
        """``P z`` of one vector by the formula: whole arrays and plain butterfly loops, slow."""
        padded = torch.nn.functional.pad(z, (0, self.block_size - self.sub_dim))
        rows = []
        for first in range(0, self.num_blocks, self.share):
            blocks = slice(first * self.block_size, (first + self.share) * self.block_size)
            rows.append(self._signs[blocks].view(self.block_size, -1).mT)
        signs = torch.cat(rows)  # (blocks, n)
        group = torch.arange(self.num_blocks, device=self.device) // self.share
        x = butterfly_reference(padded * signs)
        local = self._permutation.long() % self.block_size
        x = x.gather(1, local[group]) * self._gaussians[group]
        x = butterfly_reference(x) * self._lengths[group]
        return torch.cat([part.mT.reshape(-1) for part in x.split(self.share)])[: self.full_dim]


def _gather(x: Tensor, index: Tensor, into: Tensor) -> Tensor:
    """Rows of all groups by their index among them."""
    groups, n, columns = x.shape
    flat = into.view(groups * n, columns)
    torch.index_select(x.view(groups * n, columns), 0, index.reshape(-1), out=flat)
    return into
