"""A Kronecker product of two small random frames."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.dimension.projections.base import Projection
from deltacontrol.theory.dimension.projections.gaussian import DenseProjection


@typed
class KroneckerProjection(Projection):
    """``P = sqrt(D_1 D_2 / D) A (x) B``: ``P z`` is ``A Z B'`` with ``z`` as a matrix ``Z``.

    ``A`` is ``(D_1, d_1)`` and ``B`` is ``(D_2, d_2)``, each with orthonormal columns and uniform
    range; the sizes are close to the square roots of ``D`` and ``d``, ``z`` is padded to ``d_1
    d_2`` numbers and rows beyond ``D`` are cut off, fewer than ``D_1``. ``P'P = I`` where none is,
    and ``E ||P z||^2 = ||z||^2`` in any case, because entries of one row are uncorrelated.

    Its range is far from uniform: each column is an outer product. Cost ``O(D sqrt(d))``, memory
    about ``2 sqrt(D d)`` numbers.

    Source: Van Loan, *The ubiquitous Kronecker product*, JCAM 123, 2000.

    Args:
        full_dim: ``D``.
        sub_dim: ``d``.
        seed: of both frames.
        dtype: of the frames; they are drawn in float64.
        device: where the frames are stored.
    """

    def __init__(
        self,
        full_dim: int,
        sub_dim: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Draw the frames."""
        super().__init__(full_dim, sub_dim, dtype, device)
        big, small = _factors(full_dim), _factors(sub_dim)
        frames = [
            DenseProjection(D, d, 2 * seed + i, torch.float64).dense()
            for i, (D, d) in enumerate(zip(big, small, strict=True))
        ]
        scale = math.sqrt(big[0] * big[1] / full_dim)
        self._left = (scale * frames[0]).to(self.device, dtype)
        self._right = frames[1].to(self.device, dtype)

    @property
    def num_bytes(self) -> int:
        """The bytes of both frames."""
        return self._left.nbytes + self._right.nbytes

    def _apply(self, z: Tensor) -> Tensor:
        padding = self._left.shape[1] * self._right.shape[1] - self.sub_dim
        matrix = torch.nn.functional.pad(z, (0, padding)).unflatten(-1, (self._left.shape[1], -1))
        return (self._left @ matrix @ self._right.mT).flatten(-2)[..., : self.full_dim]

    def _apply_transpose(self, v: Tensor) -> Tensor:
        padding = len(self._left) * len(self._right) - self.full_dim
        matrix = torch.nn.functional.pad(v, (0, padding)).unflatten(-1, (len(self._left), -1))
        return (self._left.mT @ matrix @ self._right).flatten(-2)[..., : self.sub_dim]


def _factors(size: int) -> tuple[int, int]:
    """The smallest product of about equal factors that is not below ``size``."""
    first = math.isqrt(size - 1) + 1
    return first, -(-size // first)
