"""Projections with independent or orthonormal columns; each inherits one suite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deltacontrol.theory.dimension.projections import (
    RANDOM_PROJECTIONS,
    DenseProjection,
    GaussianProjection,
    HadamardProjection,
    KroneckerProjection,
    Projection,
    SparseSignProjection,
)
from deltacontrol.theory.errors import InputError
from tests.theory.operators import normal
from tests.theory.projections import F64, SIZES, ProjectionSuite, RandomNorms


class TestDense(ProjectionSuite):
    """Orthonormal columns."""

    def make(self, D: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> Projection:
        return DenseProjection(D, d, seed, dtype)

    @pytest.mark.parametrize(("D", "d"), SIZES)
    def test_columns_are_orthonormal(self, D: int, d: int) -> None:
        matrix = self.make(D, d).dense()
        torch.testing.assert_close(matrix.mT @ matrix, torch.eye(d, dtype=F64), rtol=0, atol=1e-13)

    def test_it_stores_its_entries(self) -> None:
        assert self.make(50, 6).num_bytes == 50 * 6 * 8

    def test_sizes_beyond_memory_are_refused(self) -> None:
        with pytest.raises(InputError, match="use FastfoodProjection"):
            DenseProjection(10**7, 10**3)


class TestGaussian(RandomNorms):
    """Independent entries of variance ``1/D``: ``D ||Pz||^2`` is chi-squared."""

    def make(self, D: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> Projection:
        return DenseProjection(D, d, seed, dtype, orthonormal=False)

    def test_the_deviation_is_that_of_chi_squared(self) -> None:
        z = normal(5, seed=1)
        z = z / z.norm()
        norms = [float((self.make(50, 5, seed=s) @ z).square().sum()) for s in range(400)]
        assert np.std(norms) == pytest.approx(math.sqrt(2 / 50), rel=0.15)


class TestCounterGaussian(RandomNorms):
    """The same law, generated in blocks."""

    def make(self, D: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> Projection:
        return GaussianProjection(D, d, seed, dtype, block=4096)

    def test_numbers_do_not_depend_on_the_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Blocks of one row, of several and of all, across the edges of tiles."""
        monkeypatch.setattr("deltacontrol.theory.dimension.projections.gaussian._TILE", 16)
        one, some, whole = (GaussianProjection(40, 7, 3, F64, block=b) for b in (1, 50, 10**6))
        assert torch.equal(one.dense(), whole.dense())
        assert torch.equal(some.dense(), whole.dense())
        assert whole.num_bytes == 0

    def test_entries_are_standard_normal(self) -> None:
        """Moments of 10^5 entries, which no tile repeats, within four standard errors."""
        entries = GaussianProjection(1000, 100, 5, F64).dense().flatten() * math.sqrt(1000)
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
            error = math.sqrt(variance / 1e5)
            assert abs(float((entries**power).mean()) - moment) <= 4 * error
        first, second = entries[: 2**15], entries[2**16 : 2**16 + 2**15]
        assert abs(float((first * second).mean())) <= 4 / math.sqrt(2**15)


class TestSparseSign(RandomNorms):
    """A few entries in each row."""

    def make(self, D: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> Projection:
        return SparseSignProjection(D, d, seed, dtype)

    @pytest.mark.parametrize(("d", "nonzeros"), [(13, 1), (13, 4), (3, 4), (12, 3)])
    def test_each_range_has_one_entry_in_each_row(self, d: int, nonzeros: int) -> None:
        P = SparseSignProjection(200, d, 1, F64, nonzeros=nonzeros)
        matrix = P.dense()
        assert int((matrix != 0).sum()) == 200 * min(nonzeros, d)
        for low, high in P._ranges:
            part = matrix[:, low:high]
            assert bool(((part != 0).sum(1) == 1).all())
            sizes = part[part != 0].abs()
            torch.testing.assert_close(
                sizes, torch.full_like(sizes, math.sqrt((high - low) / 200)), rtol=1e-14, atol=0
            )
        if nonzeros == 1:
            gram = matrix.mT @ matrix
            assert torch.equal(gram, torch.diag(gram.diagonal()))

    def test_places_and_signs_are_even_and_independent(self) -> None:
        """Chi-squared over the 26 pairs of place and sign, and of neighbouring rows' signs."""
        matrix = SparseSignProjection(26_000, 13, 4, F64, nonzeros=1).dense()
        counts = torch.stack([(matrix > 0).sum(0), (matrix < 0).sum(0)]).double()
        chi2 = float(((counts - 1000) ** 2 / 1000).sum())
        assert abs(chi2 - 25) <= 4 * math.sqrt(50)
        signs = matrix.sum(1).sign()
        assert abs(float((signs[1:] * signs[:-1]).sum())) <= 4 * math.sqrt(26_000)

    def test_other_numbers_are_refused(self) -> None:
        with pytest.raises(InputError, match="nonzeros is 0"):
            SparseSignProjection(5, 2, nonzeros=0)


class TestHadamard(ProjectionSuite):
    """Columns of the Hadamard matrix."""

    def make(self, D: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> Projection:
        return HadamardProjection(D, d, seed, dtype)

    @pytest.mark.parametrize(("D", "d"), SIZES)
    def test_columns_are_orthonormal_where_the_size_is_a_power(self, D: int, d: int) -> None:
        matrix = self.make(D, d).dense()
        ones = torch.full_like(matrix, 1 / math.sqrt(D))
        torch.testing.assert_close(matrix.abs(), ones, rtol=1e-14, atol=0)
        if D & (D - 1) == 0:
            eye = torch.eye(d, dtype=F64)
            torch.testing.assert_close(matrix.mT @ matrix, eye, rtol=0, atol=1e-14)


class TestKronecker(ProjectionSuite):
    """Two frames."""

    def make(self, D: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> Projection:
        return KroneckerProjection(D, d, seed, dtype)

    @pytest.mark.parametrize(("D", "d"), [*SIZES, (144, 50)])
    def test_equals_the_kronecker_product(self, D: int, d: int) -> None:
        P = self.make(D, d)
        assert isinstance(P, KroneckerProjection)
        expected = torch.kron(P._left, P._right)[:D, :d]
        torch.testing.assert_close(P.dense(), expected, rtol=1e-13, atol=1e-15)
        if len(P._left) * len(P._right) == D:
            gram = P.dense().mT @ P.dense()
            torch.testing.assert_close(gram, torch.eye(d, dtype=F64), rtol=0, atol=1e-13)

    @pytest.mark.slow
    def test_every_size_has_factors_that_fit(self) -> None:
        for D in range(1, 60):
            for d in range(1, D + 1):
                assert self.make(D, d).sub_dim == d


def test_projections_by_name() -> None:
    """Every name makes a map of the sizes asked for, from the seed."""
    for name, kind in RANDOM_PROJECTIONS.items():
        P = kind(40, 7, 3, F64)
        assert (P @ normal(7, seed=1)).shape == (40,), name
        assert P.draws >= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", RANDOM_PROJECTIONS)
def test_a_gpu_lifts_as_its_dense_matrix(name: str) -> None:
    P = RANDOM_PROJECTIONS[name](100, 33, 0, F64, torch.device("cuda"))
    matrix, z, v = P.dense(), normal(33, seed=1).cuda(), normal(100, seed=2).cuda()
    torch.testing.assert_close(P @ z, matrix @ z, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(P.T @ v, matrix.mT @ v, rtol=1e-12, atol=1e-13)
