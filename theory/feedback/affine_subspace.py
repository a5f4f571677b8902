"""Affine subspaces of states, and the moments from which principal ones are found.

    mu + span V,     e(x) = (I - V V') (x - mu),

in the last axis of a state ``(..., n)``, so for each token of a text alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError

__all__ = ["AffineSubspace", "Moments"]


@typed
@dataclass(frozen=True, eq=False)
class AffineSubspace:
    """``mu + span V`` in the last axis of a state.

    Attributes:
        mean: ``mu``, ``(n,)``.
        basis: ``V``, ``(n, k)``, with orthonormal columns.

    Raises:
        InputError: if shapes or dtypes do not fit, or the columns are not orthonormal.
    """

    mean: Tensor
    basis: Tensor

    def __post_init__(self) -> None:
        """Check the shapes and the columns."""
        n, shape = self.mean.numel(), tuple(self.basis.shape)
        if self.mean.ndim != 1 or len(shape) != 2 or shape[0] != n or shape[1] > n:
            raise InputError(
                f"the mean has shape {tuple(self.mean.shape)} and the basis {shape}; expected (n,) "
                "and (n, k) with k <= n"
            )
        if not self.basis.is_floating_point() or self.mean.dtype != self.basis.dtype:
            raise InputError(
                f"the mean is {self.mean.dtype} and the basis {self.basis.dtype}; expected one "
                "float dtype for both"
            )
        gram = self.basis.mT @ self.basis
        eye = torch.eye(shape[1], dtype=gram.dtype, device=gram.device)
        deviation = float((gram - eye).abs().max()) if shape[1] else 0.0
        if not deviation <= n * 10 * torch.finfo(gram.dtype).eps:
            raise InputError(
                f"the columns of the basis are not orthonormal (V'V differs from I by "
                f"{deviation:.1e}); take the factor Q of torch.linalg.qr"
            )

    @classmethod
    def principal(cls, mean: Tensor, eigenvectors: Tensor, rank: int) -> AffineSubspace:
        """The span of the last ``rank`` columns, those of the largest eigenvalues in `Moments`.

        Raises:
            InputError: if the rank is not between 0 and the width.
        """
        n = eigenvectors.shape[-1]
        if not 0 <= rank <= n:
            raise InputError(f"rank {rank} is not between 0 and the width {n}")
        return cls(mean, eigenvectors[:, n - rank :].contiguous())

    def error(self, x: Tensor) -> Tensor:
        """``(I - V V') (x - mu)``, of the shape and dtype of ``x``."""
        if x.shape[-1] != len(self.mean):
            raise InputError(
                f"the state has shape {tuple(x.shape)}; the subspace lies in (..., "
                f"{len(self.mean)})"
            )
        deviation = x - self.mean.to(x)
        if self.basis.shape[1] == len(self.mean):
            return torch.zeros_like(deviation)  # the whole space: exactly nothing to correct
        basis = self.basis.to(x)
        return deviation - (deviation @ basis) @ basis.mT


class Moments:
    """Mean and covariance of vectors that arrive in portions, in float64.

    Portions are merged by the pairwise update of Chan, Golub & LeVeque (*The American
    Statistician* 37, 1983, equation 2.1), which does not subtract large numbers.

    Args:
        width: ``n``.

    Attributes:
        count: the number of vectors so far.
        mean: ``(n,)``.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in the vectors ``x``, ``(..., n)``; only those where ``mask``, ``(...)``, is true.

        Raises:
            InputError: if the mask or the width does not fit.
        """
        if x.shape[-1] != len(self.mean):
            raise InputError(f"vectors of {x.shape[-1]} entries; expected {len(self.mean)}")
        if mask is not None and mask.shape != x.shape[:-1]:
            raise InputError(
                f"the mask has shape {tuple(mask.shape)}; expected {tuple(x.shape[:-1])}, one "
                "entry for each vector"
            )
        rows = x.detach().reshape(-1, x.shape[-1]) if mask is None else x.detach()[mask.bool()]
        if not len(rows):
            return
        rows = rows.to("cpu", torch.float64)
        mean = rows.mean(0)
        shift, total = mean - self.mean, self.count + len(rows)
        centred = rows - mean
        self._scatter += centred.mT @ centred
        self._scatter += torch.outer(shift, shift) * (self.count * len(rows) / total)
        self.mean = self.mean + shift * (len(rows) / total)
        self.count = total

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the covariance, ascending and ``(n,)``, and eigenvectors ``(n, n)``.

        Raises:
            InputError: if fewer than two vectors came.
        """
        if self.count < 2:
            raise InputError(f"{self.count} vectors have no covariance; give at least 2")
        values, vectors = torch.linalg.eigh(self._scatter / (self.count - 1))
        return values.clamp_min(0), vectors
