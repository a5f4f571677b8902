"""Random linear maps ``P`` from a small space into a large one, ``theta = theta_0 + P z``.

``z`` is ``(d,)`` and ``P z`` is ``(D,)``, ``d <= D``; further axes in front are a batch. ``lift``
applies ``P`` and ``adjoint`` its transpose. Both are linear, so that each is the other's backward
pass; they work under `torch.func` (vmap, jvp, vjp) and to any order.

Every projection is normalised such that its columns have unit norm in expectation and

    E ||P z||^2 = ||z||^2.

All random numbers come from numpy's PCG64 with the given seed: the same projection on every device
and, up to rounding, in every dtype.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theory.errors import InputError
from theory.hadamard import hadamard_transform

__all__ = ["DenseProjection", "FastfoodProjection", "Projection"]

_DENSE_LIMIT = 2**27
_CHUNK = 2**20


class Projection(ABC):
    """A linear map ``P`` of shape ``(D, d)``.

    Attributes:
        full_dim: ``D``.
        sub_dim: ``d``.
        dtype: of its arguments and values.
        device: of its arguments and values.

    Raises:
        InputError: unless ``1 <= d <= D``.
    """

    def __init__(
        self, full_dim: int, sub_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Check and keep the sizes."""
        if not 1 <= sub_dim <= full_dim:
            raise InputError(
                f"a projection from dimension {sub_dim} into {full_dim} does not exist; "
                "expected 1 <= sub_dim <= full_dim"
            )
        self.full_dim = full_dim
        self.sub_dim = sub_dim
        self.dtype = dtype
        self.device = torch.device(device)

    def lift(self, z: Tensor) -> Tensor:
        """``P z``, from ``(..., d)`` to ``(..., D)``."""
        self._check("lift", z, self.sub_dim)
        return _Lift.apply(z, self)

    def adjoint(self, v: Tensor) -> Tensor:
        """``P' v``, from ``(..., D)`` to ``(..., d)``: ``<v, P z> = <P' v, z>``."""
        self._check("adjoint", v, self.full_dim)
        return _Adjoint.apply(v, self)

    def dense(self) -> Tensor:
        """``P`` as a matrix ``(D, d)``, for small sizes."""
        return self.lift(torch.eye(self.sub_dim, dtype=self.dtype, device=self.device)).mT

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """The memory that the projection holds."""

    @abstractmethod
    def _apply(self, z: Tensor) -> Tensor:
        """``P z`` for any number of axes in front, without automatic differentiation."""

    @abstractmethod
    def _apply_transpose(self, v: Tensor) -> Tensor:
        """``P' v`` likewise."""

    def _check(self, name: str, x: Tensor, size: int) -> None:
        if x.shape[-1:] != (size,) or x.dtype != self.dtype:
            raise InputError(
                f"{name} got shape {tuple(x.shape)} of {x.dtype}; "
                f"expected (..., {size}) of {self.dtype}"
            )

    def __repr__(self) -> str:
        """The kind and the sizes."""
        return f"{type(self).__name__}({self.full_dim}, {self.sub_dim}, dtype={self.dtype})"


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
                f"too large (limit {_DENSE_LIMIT}); use FastfoodProjection"
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


class FastfoodProjection(Projection):
    """Fastfood: stacked blocks ``S H G Pi H B / sqrt(D n)``, ``O(D log d)`` and never a matrix.

    ``n`` is the next power of two from ``d``, to which ``z`` is padded with zeros; ``H`` is the
    ``n x n`` Hadamard matrix of entries +-1, ``B`` random signs, ``Pi`` a permutation, ``G``
    independent Gaussians, and ``S_i = s_i / ||G||_F`` with ``s_i`` chi distributed with ``n``
    degrees of freedom, which gives each row the length that a Gaussian row has. Blocks differ in
    ``B``, ``G``, ``S`` and share ``Pi``; rows beyond ``D`` are cut off.

    Each entry has mean 0 and variance ``1/D``, and entries of one row are uncorrelated; hence
    ``E ||P z||^2 = ||z||^2`` exactly.

    Memory: two numbers of the dtype and one byte (a sign) per row, and 16 bytes per column for the
    permutation and its inverse; about 2^20 numbers (or one block) are worked on at once.

    Source: Le, Sarlos & Smola, *Fastfood*, ICML 2013, equations (7) and (8) for the product; Li et
    al., ICLR 2018 and Aghajanyan et al., ACL 2021 for its use on network weights.

    Args:
        full_dim: ``D``.
        sub_dim: ``d``.
        seed: of all random factors.
        dtype: of the factors; they are drawn in float64.
        device: where the factors are stored.
    """

    def __init__(
        self,
        full_dim: int,
        sub_dim: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Draw the factors, chunk by chunk."""
        super().__init__(full_dim, sub_dim, dtype, device)
        n = self.block_size = 1 << (sub_dim - 1).bit_length()
        self.num_blocks = -(-full_dim // n)
        shape = (self.num_blocks, n)
        rng = np.random.default_rng(seed)
        permutation = torch.from_numpy(rng.permutation(n))
        self._permutation = permutation.to(self.device)
        self._inverse = torch.argsort(permutation).to(self.device)
        self._signs = torch.empty(shape, dtype=torch.int8, device=self.device)
        self._gaussians = torch.empty(shape, dtype=dtype, device=self.device)
        self._lengths = torch.empty(shape, dtype=dtype, device=self.device)
        for rows in self._chunks():
            size = self._signs[rows].shape
            gaussians = rng.standard_normal(size)
            norms = np.linalg.norm(gaussians, axis=1, keepdims=True)
            lengths = np.sqrt(rng.chisquare(n, size)) / (norms * math.sqrt(full_dim * n))
            signs = 2 * rng.integers(0, 2, size, dtype=np.int8) - 1
            self._signs[rows] = torch.from_numpy(signs).to(self.device)
            self._gaussians[rows] = torch.from_numpy(gaussians).to(self.device, dtype)
            self._lengths[rows] = torch.from_numpy(lengths).to(self.device, dtype)

    @property
    def num_bytes(self) -> int:
        """The bytes of ``B``, ``G``, ``S`` and ``Pi``."""
        factors = (self._signs, self._gaussians, self._lengths, self._permutation, self._inverse)
        return sum(factor.nbytes for factor in factors)

    def _chunks(self) -> list[slice]:
        size = max(1, _CHUNK // self.block_size)
        return [slice(start, start + size) for start in range(0, self.num_blocks, size)]

    def _apply(self, z: Tensor) -> Tensor:
        padding = self.block_size - self.sub_dim
        padded = torch.nn.functional.pad(z, (0, padding)).unsqueeze(-2)
        pieces = []
        for rows in self._chunks():
            x = hadamard_transform(padded * self._signs[rows])
            x = x.index_select(-1, self._permutation).mul_(self._gaussians[rows])
            x = hadamard_transform(x).mul_(self._lengths[rows])
            pieces.append(x.flatten(-2))
        return torch.cat(pieces, dim=-1)[..., : self.full_dim]

    def _apply_transpose(self, v: Tensor) -> Tensor:
        total = v.new_zeros((*v.shape[:-1], self.block_size))
        width = self.block_size
        for rows in self._chunks():
            x = v[..., rows.start * width : rows.stop * width]
            num_rows = len(self._signs[rows])
            x = torch.nn.functional.pad(x, (0, num_rows * width - x.shape[-1]))
            x = x.unflatten(-1, (num_rows, width)) * self._lengths[rows]
            x = hadamard_transform(x).mul_(self._gaussians[rows])
            x = hadamard_transform(x.index_select(-1, self._inverse))
            total += (x * self._signs[rows]).sum(-2)
        return total[..., : self.sub_dim]


class _Lift(torch.autograd.Function):
    """``P z``; its backward is `_Adjoint`, so that no intermediate value is stored."""

    @staticmethod
    def forward(z: Tensor, projection: Projection) -> Tensor:
        return projection._apply(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Projection], output: Tensor) -> None:
        ctx.projection = inputs[1]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
        return _Adjoint.apply(v, ctx.projection), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _Lift.apply(tangent, ctx.projection)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None], z: Tensor, projection: Projection
    ) -> tuple[Tensor, int]:
        return _Lift.apply(z.movedim(in_dims[0], 0), projection), 0


class _Adjoint(torch.autograd.Function):
    """``P' v``; its backward is `_Lift`."""

    @staticmethod
    def forward(v: Tensor, projection: Projection) -> Tensor:
        return projection._apply_transpose(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Projection], output: Tensor) -> None:
        ctx.projection = inputs[1]

    @staticmethod
    def backward(ctx: Any, z: Tensor) -> tuple[Tensor, None]:
        return _Lift.apply(z, ctx.projection), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _Adjoint.apply(tangent, ctx.projection)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None], v: Tensor, projection: Projection
    ) -> tuple[Tensor, int]:
        return _Adjoint.apply(v.movedim(in_dims[0], 0), projection), 0
