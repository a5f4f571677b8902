"""The Walsh-Hadamard transform as a few matrix products.

``H`` is the Hadamard matrix in Sylvester's order: entries +-1, symmetric, ``H H = n I``, and
``H_{ab} = H_a (x) H_b``. An axis of ``n = 2^k`` numbers is therefore an array of axes of size at
most 32, and the transform multiplies each of them by a small matrix: ``O(n log n)`` numbers through
``k/5`` matrix products, on any device. An axis that is not the last needs no transposition.

Source: Fino & Algazi, IEEE Transactions on Computers C-25(11), 1976 (the Kronecker factors).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError

__all__ = [
    "butterfly_reference",
    "hadamard_transform",
    "orthonormal_transform",
    "transform_columns",
]

_FACTOR_BITS = 5  # 32 x 32: the matrix stays in the first cache, the product is not yet dense


@typed
def hadamard_transform(x: Tensor, *, pad: bool = False) -> Tensor:
    """``H x`` along the last axis; differentiable to any order, safe under `torch.func`.

    Args:
        x: ``(..., n)``.
        pad: fill the axis with zeros up to the next power of two; the result has that length.

    Raises:
        InputError: if ``n`` is no power of two and is not to be padded; if they are no floats.
    """
    if not x.ndim or not x.is_floating_point():
        raise InputError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; expected floats (..., n)"
        )
    n = x.shape[-1]
    if pad and n:
        x = torch.nn.functional.pad(x, (0, (1 << (n - 1).bit_length()) - n))
        n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise InputError(
            f"the last axis of {tuple(x.shape)} is no power of two; pad it (pad=True), or use "
            "orthonormal_transform, which takes any length"
        )
    shape = x.shape
    for size, inner in _factors(n):
        matrix = _hadamard_matrix(size, x.dtype, x.device)
        if inner == 1:
            x = x.reshape(*shape[:-1], n // size, size) @ matrix
        else:
            x = matrix @ x.reshape(*shape[:-1], n // (size * inner), size, inner)
    return x.reshape(shape)


@typed
def orthonormal_transform(x: Tensor) -> Tensor:
    """An orthonormal transform of any length, by chunks: ``T = diag(H_m / sqrt(m))``.

    The ``m`` are the powers of two whose sum is ``n``, the largest first, so that ``T`` is
    symmetric and ``T T = I`` without a padded number. A power of two is a single chunk.

    Args:
        x: ``(..., n)``.

    Raises:
        InputError: it is a single number, or holds no floats.
    """
    if not x.ndim:
        raise InputError("x is one number; expected (..., n)")
    chunks, start, n = [], 0, x.shape[-1]
    for bit in reversed(range(n.bit_length())):
        if n >> bit & 1:
            piece = x[..., start : start + (1 << bit)]
            chunks.append(hadamard_transform(piece) / math.sqrt(1 << bit))
            start += 1 << bit
    return torch.cat(chunks, -1) if chunks else x


def transform_columns(x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """``H`` along the middle axis, between two buffers: nothing is allocated or transposed.

    Args:
        x: ``(groups, n, columns)``, contiguous, ``n`` a power of two; overwritten.
        scratch: a contiguous tensor of the same shape.

    Returns:
        The buffer with the result and the other one.
    """
    groups, n, columns = x.shape
    for size, inner in _factors(n):
        matrix = _hadamard_matrix(size, x.dtype, x.device)
        outer, width = groups * n // (size * inner), inner * columns
        if width == 1:
            torch.mm(x.view(outer, size), matrix, out=scratch.view(outer, size))
        elif outer == 1:
            torch.mm(matrix, x.view(size, width), out=scratch.view(size, width))
        else:
            matrices = matrix.expand(outer, size, size)
            into = scratch.view(outer, size, width)
            torch.bmm(matrices, x.view(outer, size, width), out=into)
        x, scratch = scratch, x
    return x, scratch


def butterfly_reference(x: Tensor) -> Tensor:
    """``H x`` along the last axis by the plain loop of butterflies, the slow reference.

    ``(a, b) -> (a + b, a - b)`` for neighbours at distance 1, 2, 4, ...
    """
    shape, n = x.shape, x.shape[-1]
    distance = 1
    while distance < n:
        pairs = x.reshape(*shape[:-1], n // (2 * distance), 2, distance)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([a + b, a - b], -2).reshape(shape)
        distance *= 2
    return x


def _factors(n: int) -> Iterator[tuple[int, int]]:
    """Sizes ``r`` of the Kronecker factors of ``H_n`` and the product of those further inside."""
    bits = n.bit_length() - 1
    count = -(-bits // _FACTOR_BITS)
    for i in range(count):
        low, high = bits * (count - i - 1) // count, bits * (count - i) // count
        yield 1 << (high - low), 1 << low


@lru_cache(maxsize=64)
def _hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
