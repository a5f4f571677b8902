"""Projections that are learned, and those that treat layers apart."""

from __future__ import annotations

import math

import pytest
import torch

from deltacontrol.theory.dimension.projections import (
    BlockDiagonalProjection,
    DenseProjection,
    FastfoodProjection,
    GaussianProjection,
    LayerScaledProjection,
    LearnedProjection,
    Projection,
)
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.operator import SymmetricMatrix
from tests.theory.operators import normal
from tests.theory.projections import F64, ProjectionSuite


class TestLearned(ProjectionSuite):
    """A frame from given vectors."""

    def make(self, D: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> Projection:
        if not 1 <= d <= D:
            return LearnedProjection(torch.zeros(d, D), dtype)
        return LearnedProjection(normal(d, D, seed=seed), dtype)

    def test_leading_columns_span_leading_vectors(self) -> None:
        vectors = normal(4, 30, seed=1)
        matrix = LearnedProjection(vectors, F64).dense()
        torch.testing.assert_close(matrix.mT @ matrix, torch.eye(4).double(), rtol=0, atol=1e-14)
        for k in range(1, 5):
            frame = matrix[:, :k]
            torch.testing.assert_close(
                frame @ (frame.mT @ vectors[:k].mT), vectors[:k].mT, rtol=0, atol=1e-13
            )
        assert float(vectors[0] @ matrix[:, 0]) > 0

    def test_trajectories_and_gradients(self) -> None:
        """Against the singular value decomposition; a far mean matters to gradients alone."""
        rows = normal(7, 3, seed=1) @ normal(3, 40, seed=2) + 100 * normal(40, seed=3)
        for found, used in (
            (LearnedProjection.from_trajectory(rows, 3, F64), rows - rows.mean(0)),
            (LearnedProjection.from_gradients(rows, 3, F64), rows),
        ):
            right = torch.linalg.svd(used, full_matrices=False)[2][:3]
            cosines = (right @ found.dense()).abs()
            torch.testing.assert_close(cosines, torch.eye(3).double(), rtol=0, atol=1e-7)

    def test_eigenvectors_of_an_operator(self) -> None:
        frame = torch.linalg.qr(normal(30, 30, seed=1))[0]
        values = 0.5 ** torch.arange(30, dtype=F64)
        P = LearnedProjection.from_operator(SymmetricMatrix(frame * values @ frame.mT), 3)
        cosines = (frame[:, :3].mT @ P.dense()).abs()
        torch.testing.assert_close(cosines, torch.eye(3).double(), rtol=0, atol=1e-7)

    def test_vectors_that_span_too_little_are_refused(self) -> None:
        rows = normal(2, 9, seed=1)
        for make, message in (
            (lambda: LearnedProjection(torch.cat([rows, rows.sum(0, True)])), "dependent"),
            (lambda: LearnedProjection(rows * torch.nan), "not finite"),
            (lambda: LearnedProjection(rows[0]), r"shape \(9,\); expected \(d, D\)"),
            (lambda: LearnedProjection.from_trajectory(rows, 2), "fewer than 2 directions"),
            (lambda: LearnedProjection.from_gradients(rows, 3), "no subspace of dimension 3"),
        ):
            with pytest.raises(InputError, match=message):
                make()


class TestBlockDiagonal(ProjectionSuite):
    """Layers with coordinates of their own, of different kinds."""

    def make(self, D: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> Projection:
        low, small = D // 2, d // 2
        last = FastfoodProjection(D - low, d - small, seed, dtype)
        if not small:
            last = FastfoodProjection(D, d, seed, dtype)
            return BlockDiagonalProjection([last])
        first = GaussianProjection(low, small, seed + 1, dtype)
        return BlockDiagonalProjection([first, last])

    def test_is_block_diagonal(self) -> None:
        P = self.make(20, 6)
        assert isinstance(P, BlockDiagonalProjection)
        expected = torch.block_diag(*(part.dense() for part in P.parts))
        torch.testing.assert_close(P.dense(), expected, rtol=1e-13, atol=1e-15)

    def test_mixed_dtypes_are_refused(self) -> None:
        with pytest.raises(InputError, match="2 parts have 2 pairs"):
            BlockDiagonalProjection([DenseProjection(4, 2), DenseProjection(4, 2, dtype=F64)])
        with pytest.raises(InputError, match="at least one part"):
            BlockDiagonalProjection([])


class TestLayerScaled(ProjectionSuite):
    """One projection, scaled by layers."""

    def make(self, D: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> Projection:
        sizes = [D] if D == 1 else [D // 2, D - D // 2]
        return LayerScaledProjection(
            FastfoodProjection(D, d, seed, dtype), sizes, [3.0, -1.0][: len(sizes)]
        )

    def test_scales_the_rows_of_its_layers(self) -> None:
        P = self.make(20, 6)
        assert isinstance(P, LayerScaledProjection)
        scale = math.sqrt(20 / (10 * 9 + 10))
        scales = torch.tensor([3 * scale] * 10 + [-scale] * 10, dtype=F64)
        expected = scales[:, None] * P.projection.dense()
        torch.testing.assert_close(P.dense(), expected, rtol=1e-13, atol=1e-15)

    def test_wrong_layers_are_refused(self) -> None:
        P = DenseProjection(5, 2)
        for sizes, scales in (((2, 2), (1, 1)), ((2, 3), (1,)), ((5, 0), (1, 1))):
            with pytest.raises(InputError, match="one scale a layer, and 5 coordinates"):
                LayerScaledProjection(P, sizes, scales)
        with pytest.raises(InputError, match="not all zero"):
            LayerScaledProjection(P, (2, 3), (0.0, 0.0))
