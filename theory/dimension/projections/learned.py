"""Subspaces that are computed: from trajectories, gradients or curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.dimension.projections.base import Projection
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.operator import SymmetricOperator
from deltacontrol.theory.linear.sketching import leading_spectrum


@typed
class LearnedProjection(Projection):
    """A stored frame ``P`` with orthonormal columns, in the order of their weight.

    ``P'P = I``; the first ``k`` columns are the best ``k``-dimensional subspace of their kind.

    Args:
        vectors: ``(d, D)``, one a row; they are orthonormalised in float64 in the order given, so
            that the first ``k`` columns of ``P`` span what the first ``k`` vectors span.
        dtype: of the frame.
        device: where the frame is stored.

    Raises:
        InputError: if the vectors are no matrix, or linearly dependent to working precision.
    """

    def __init__(
        self,
        vectors: Tensor,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Orthonormalise."""
        if vectors.dim() != 2:
            raise InputError(
                f"vectors have shape {tuple(vectors.shape)}; expected (d, D), one vector a row"
            )
        super().__init__(vectors.shape[1], vectors.shape[0], dtype, device)
        given = vectors.detach().double()
        frame, upper = torch.linalg.qr(given.mT)
        diagonal = upper.diagonal()
        size = torch.linalg.vector_norm(given, dim=1)
        if not bool((diagonal.abs() > 1e-6 * size).all()):
            raise InputError(
                f"the {self.sub_dim} vectors are linearly dependent, or not finite; leave out "
                "those that the others span"
            )
        self._frame = (frame * diagonal.sign()).to(self.device, dtype)

    @classmethod
    def from_trajectory(
        cls,
        points: Tensor,
        sub_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LearnedProjection:
        """Principal components of points that training passed through.

        Source: Li, Tan, Tao, Liu & Huang, *Low dimensional trajectory hypothesis*, IEEE TPAMI
        2022, algorithm 1 (DLDR).

        Args:
            points: ``(T, D)``, parameters at ``T`` times.
            sub_dim: ``d``, at most ``T - 1``.
            dtype: of the frame.
            device: where the frame is stored.

        Raises:
            InputError: if the points vary in fewer than ``d`` directions.
        """
        return cls(_principal(points.double() - points.double().mean(0), sub_dim), dtype, device)

    @classmethod
    def from_gradients(
        cls,
        gradients: Tensor,
        sub_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LearnedProjection:
        """Leading right singular vectors of gradients, the mean included.

        The subspace that keeps most of ``sum_i ||g_i||^2`` (Gur-Ari, Roberts & Dyer, arXiv
        1812.04754). Gradients of log-probabilities give that of the empirical Fisher matrix.

        Args:
            gradients: ``(T, D)``, of batches or of examples.
            sub_dim: ``d``, at most ``T``.
            dtype: of the frame.
            device: where the frame is stored.

        Raises:
            InputError: if the gradients span fewer than ``d`` directions.
        """
        return cls(_principal(gradients.double(), sub_dim), dtype, device)

    @classmethod
    def from_operator(cls, W: SymmetricOperator, sub_dim: int, seed: int = 0) -> LearnedProjection:
        """Leading eigenvectors of a Hessian, Gauss-Newton or Fisher matrix by its products.

        Args:
            W: positive semidefinite, ``(D, D)``; the frame has its dtype and device.
            sub_dim: ``d``.
            seed: of the randomised subspace iteration
            (`deltacontrol.theory.linear.sketching.leading_spectrum`).
        """
        return cls(leading_spectrum(W, sub_dim, seed=seed).vectors, W.dtype, W.device)

    @property
    def num_bytes(self) -> int:
        """``D d`` entries."""
        return self._frame.nbytes

    def _apply(self, z: Tensor) -> Tensor:
        return z @ self._frame.mT

    def _apply_transpose(self, v: Tensor) -> Tensor:
        return v @ self._frame


def _principal(rows: Tensor, count: int) -> Tensor:
    """Leading right singular vectors of ``(T, D)``, through the small Gram matrix ``(T, T)``."""
    if not 1 <= count <= len(rows):
        raise InputError(
            f"{len(rows)} vectors span no subspace of dimension {count}; expected 1 to {len(rows)}"
        )
    values, left = torch.linalg.eigh(rows @ rows.mT)
    values, left = values.flip(0)[:count], left.flip(1)[:, :count]
    # Squared singular values: below this, the direction is rounding.
    if not bool(values[-1] > 1e-12 * values[0]):
        raise InputError(
            f"the vectors vary in fewer than {count} directions; choose a smaller sub_dim"
        )
    return left.mT @ rows
