"""A projection as a linear operator, and how it is differentiated."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.operator import LinearOperator

MOST_DIMENSIONS = 2**40


class Projection(LinearOperator):
    """A linear map ``P`` of shape ``(D, d)``: ``P @ z`` lifts, ``P.T @ v`` is its adjoint.

    Attributes:
        full_dim: ``D``.
        sub_dim: ``d``.

    Class attributes:
        draws: version of what a seed means; it grows when the same seed gives another map, so that
            what was trained under the old one is refused instead of misread.

    Raises:
        InputError: unless ``1 <= d <= D <= 2**40``.
    """

    draws: ClassVar[int] = 1

    def __init__(
        self, full_dim: int, sub_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Check and keep the sizes."""
        if not 1 <= sub_dim <= full_dim:
            raise InputError(
                f"a projection from dimension {sub_dim} into {full_dim} does not exist; "
                "expected 1 <= sub_dim <= full_dim"
            )
        if full_dim > MOST_DIMENSIONS:
            raise InputError(
                f"full_dim is {full_dim}; expected at most {MOST_DIMENSIONS}, beyond which no "
                "memory reaches"
            )
        super().__init__((full_dim, sub_dim), dtype, device)
        self.full_dim = full_dim
        self.sub_dim = sub_dim

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

    def _product(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)

    def _transpose_product(self, y: Tensor) -> Tensor:
        return _TransposeProduct.apply(y, self)


class _Product(torch.autograd.Function):
    """``P z``; its backward is `_TransposeProduct`, so that no intermediate value is stored."""

    @staticmethod
    def forward(z: Tensor, projection: Projection) -> Tensor:
        return projection._apply(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Projection], output: Tensor) -> None:
        ctx.projection = inputs[1]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
        return _TransposeProduct.apply(v, ctx.projection), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _Product.apply(tangent, ctx.projection)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None], z: Tensor, projection: Projection
    ) -> tuple[Tensor, int]:
        return _Product.apply(z.movedim(in_dims[0], 0), projection), 0


class _TransposeProduct(torch.autograd.Function):
    """``P' v``; its backward is `_Product`."""

    @staticmethod
    def forward(v: Tensor, projection: Projection) -> Tensor:
        return projection._apply_transpose(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Projection], output: Tensor) -> None:
        ctx.projection = inputs[1]

    @staticmethod
    def backward(ctx: Any, z: Tensor) -> tuple[Tensor, None]:
        return _Product.apply(z, ctx.projection), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _TransposeProduct.apply(tangent, ctx.projection)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None], v: Tensor, projection: Projection
    ) -> tuple[Tensor, int]:
        return _TransposeProduct.apply(v.movedim(in_dims[0], 0), projection), 0
