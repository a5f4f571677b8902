"""The interface of every projection, and how it is differentiated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError


class Projection(ABC):
    """A linear map ``P`` of shape ``(D, d)``.

    Attributes:
        full_dim: ``D``.
        sub_dim: ``d``.
        dtype: of its arguments and values.
        device: of its arguments and values.

    Class attributes:
        draws: version of what a seed means; it grows when the same seed gives another map, so that
            what was trained under the old one is refused instead of misread.

    Raises:
        InputError: unless ``1 <= d <= D``.
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
