"""The fast Walsh-Hadamard transform as a few matrix products."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from theory.errors import InputError

__all__ = ["hadamard_transform"]

_FACTOR_BITS = 6


def hadamard_transform(x: Tensor) -> Tensor:
    """``H x`` along the last axis, ``H`` the Hadamard matrix in Sylvester's order, ``H H = n I``.

    ``H_{ab} = H_a (x) H_b``: the axis is viewed as axes of size at most 64, and each is multiplied
    by a small Hadamard matrix, which costs ``O(n log n)`` in few large matrix products.

    Args:
        x: ``(..., n)`` with ``n`` a power of two.

    Raises:
        InputError: if ``n`` is no power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise InputError(f"the last axis of {tuple(x.shape)} is no power of two; pad it first")
    bits = n.bit_length() - 1
    num_factors = max(1, -(-bits // _FACTOR_BITS))
    shape = x.shape
    for i in range(num_factors):
        size = 1 << (bits * (i + 1) // num_factors - bits * i // num_factors)
        x = x.reshape(*shape[:-1], n // size, size) @ _hadamard_matrix(size, x.dtype, x.device)
        # The axis just done moves to the front; after all factors the order is the first one again.
        x = x.mT.reshape(shape)
    return x


@lru_cache(maxsize=64)
def _hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
