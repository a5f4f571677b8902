"""The subsampled randomised Hadamard transform."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.dimension.hadamard import hadamard_transform
from deltacontrol.theory.dimension.projections.base import Projection


@typed
class HadamardProjection(Projection):
    """``P = B H R / sqrt(D)``: ``d`` columns ``R`` of ``H`` at random, and random signs ``B``.

    ``H`` is the Hadamard matrix of the next power of two from ``D``, of which the first ``D`` rows
    are kept. ``R`` chooses different columns and gives each a random sign. All entries are
    ``+-1/sqrt(D)``, so that each column has unit length, and columns are orthonormal (``P'P = I``)
    where ``D`` is a power of two; otherwise the signs of ``R`` make them so in expectation, and
    ``E ||P z||^2 = ||z||^2``.

    Cost ``O(D log D)``, a byte per row, and two vectors of the padded size while it works.

    Source: Tropp, *Improved analysis of the subsampled randomized Hadamard transform*, Advances in
    Adaptive Data Analysis 3, 2011, equation (1.1), transposed; the signs of ``R`` are ours.

    Args:
        full_dim: ``D``.
        sub_dim: ``d``.
        seed: of the signs and the columns.
        dtype: of its arguments and values.
        device: where signs and columns are stored.
    """

    def __init__(
        self,
        full_dim: int,
        sub_dim: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Draw signs and columns."""
        super().__init__(full_dim, sub_dim, dtype, device)
        self.padded_dim = 1 << (full_dim - 1).bit_length()
        rng = np.random.default_rng(seed)
        columns = rng.choice(self.padded_dim, sub_dim, replace=False)
        self._columns = torch.from_numpy(columns.astype(np.int64)).to(self.device)
        self._column_signs = self._signs(rng, sub_dim)
        self._row_signs = self._signs(rng, full_dim)

    def _signs(self, rng: np.random.Generator, count: int) -> Tensor:
        signs = 2 * rng.integers(0, 2, count, dtype=np.int8) - 1
        return torch.from_numpy(signs).to(self.device)

    @property
    def num_bytes(self) -> int:
        """The bytes of all signs and of the columns' places."""
        return self._row_signs.nbytes + self._column_signs.nbytes + self._columns.nbytes

    def _apply(self, z: Tensor) -> Tensor:
        x = z.new_zeros((*z.shape[:-1], self.padded_dim))
        x[..., self._columns] = z * self._column_signs / math.sqrt(self.full_dim)
        return hadamard_transform(x)[..., : self.full_dim] * self._row_signs

    def _apply_transpose(self, v: Tensor) -> Tensor:
        x = hadamard_transform(v * self._row_signs, pad=True)
        return x[..., self._columns] * self._column_signs / math.sqrt(self.full_dim)
