"""One suite that every projection inherits: a new one supplies its constructor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltacontrol.theory.dimension.hadamard import butterfly_reference
from deltacontrol.theory.dimension.projections import (
    RANDOM_PROJECTIONS,
    BlockDiagonalProjection,
    DenseProjection,
    FastfoodProjection,
    GaussianProjection,
    HadamardProjection,
    KroneckerProjection,
    LayerScaledProjection,
    LearnedProjection,
    Projection,
    SparseSignProjection,
)
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.operator import LinearOperator, SymmetricMatrix
from tests.theory.operators import OperatorSuite, normal

F64 = torch.float64
SIZES = [(1, 1), (7, 1), (8, 8), (50, 3), (64, 16), (100, 33), (129, 64), (40, 40)]

# The suite's classes hold no state, so that inheriting a test from it is safe.
quick = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.differing_executors]
)
sizes = st.integers(1, 70).flatmap(lambda D: st.tuples(st.just(D), st.integers(1, D)))


class ProjectionSuite(OperatorSuite):
    """Laws of every projection; a subclass says how to make one and how its norms vary."""

    def pair(self) -> tuple[LinearOperator, Tensor]:
        P = self.make(37, 5)
        return P, torch.stack([P @ e for e in torch.eye(5, dtype=F64)], 1)

    def make(self, D: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> Projection:
        raise AssertionError("a subclass makes the projection")

    @pytest.mark.parametrize(("D", "d"), SIZES)
    def test_both_products_equal_the_dense_matrix(self, D: int, d: int) -> None:
        P = self.make(D, d)
        matrix = P.dense()
        assert matrix.shape == (D, d)
        z, v = normal(d, seed=1), normal(D, seed=2)
        torch.testing.assert_close(P @ z, matrix @ z, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(P.T @ v, matrix.mT @ v, rtol=1e-12, atol=1e-13)

    @quick
    @given(size=sizes, seed=st.integers(0, 2**16))
    def test_dot_product(self, size: tuple[int, int], seed: int) -> None:
        P = self.make(*size, seed=seed)
        z, v = normal(P.sub_dim, seed=seed), normal(P.full_dim, seed=seed + 1)
        lifted, pulled = P @ z, P.T @ v
        bound = 1e-14 * float(lifted.norm() * v.norm() + pulled.norm() * z.norm())
        assert abs(float(lifted @ v - pulled @ z)) <= bound + 1e-15

    @quick
    @given(size=sizes, seed=st.integers(0, 2**16), a=st.floats(-9, 9), b=st.floats(-9, 9))
    def test_linearity_at_all_sizes(
        self, size: tuple[int, int], seed: int, a: float, b: float
    ) -> None:
        P = self.make(*size, seed=seed)
        y, z = normal(P.sub_dim, seed=seed), normal(P.sub_dim, seed=seed + 1)
        torch.testing.assert_close(
            P @ (a * y + b * z), a * (P @ y) + b * (P @ z), rtol=1e-12, atol=1e-12
        )

    @pytest.mark.parametrize(("D", "d"), [(50, 3), (33, 1), (20, 16)])
    def test_derivatives_of_every_kind(self, D: int, d: int) -> None:
        P = self.make(D, d)
        matrix, z, v = P.dense(), normal(d, seed=1), normal(D, seed=2)
        close = {"rtol": 1e-12, "atol": 1e-13}
        lift, adjoint = P.__matmul__, P.T.__matmul__
        _, pull = torch.func.vjp(lift, z)
        torch.testing.assert_close(pull(v)[0], P.T @ v, **close)
        torch.testing.assert_close(torch.func.jvp(lift, (z,), (z,))[1], P @ z, **close)
        torch.testing.assert_close(torch.func.jvp(adjoint, (v,), (v,))[1], P.T @ v, **close)
        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(jacobian(lift)(z), matrix, **close)
            torch.testing.assert_close(jacobian(adjoint)(v), matrix.mT, **close)
        second = torch.func.hessian(lambda z: (P @ z).square().sum())(z)
        torch.testing.assert_close(second, 2 * matrix.mT @ matrix, **close)

    def test_gradcheck_to_second_order(self) -> None:
        P = self.make(12, 5)
        z, v = normal(5, seed=1).requires_grad_(), normal(12, seed=2).requires_grad_()
        for function, argument in ((P.__matmul__, z), (P.T.__matmul__, v)):
            assert torch.autograd.gradcheck(function, argument, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(function, argument)

    def test_batches_equal_vmap(self) -> None:
        P = self.make(50, 6)
        z, v = normal(3, 4, 6, seed=1), normal(4, 50, seed=2)
        one_by_one = torch.stack([torch.stack([P @ b for b in a]) for a in z])
        close = {"rtol": 1e-12, "atol": 1e-13}
        torch.testing.assert_close(z @ P.T, one_by_one, **close)
        lift, adjoint = P.__matmul__, P.T.__matmul__
        twice = torch.func.vmap(torch.func.vmap(lift))
        torch.testing.assert_close(twice(z), one_by_one, **close)
        turned = torch.func.vmap(lift, in_dims=1)(z[0].mT)
        torch.testing.assert_close(turned, one_by_one[0], **close)
        torch.testing.assert_close(torch.func.vmap(adjoint)(v), v @ P, **close)
        turned = v.mT.contiguous().mT  # strides of another order
        torch.testing.assert_close(turned @ P, v @ P, **close)
        assert (z[:0] @ P.T).shape == (0, 4, 50) and (v[:0] @ P).shape == (0, 6)

    def test_the_seed_determines_it(self) -> None:
        z = normal(6, seed=1)
        first, again, other = (self.make(50, 6, seed=s) @ z for s in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.allclose(first, other, rtol=1e-2)

    def test_precisions_agree(self) -> None:
        z = normal(6, seed=1)
        double, single = self.make(50, 6), self.make(50, 6, dtype=torch.float32)
        torch.testing.assert_close((single @ z.float()).double(), double @ z, rtol=0, atol=1e-6)
        assert single.num_bytes <= double.num_bytes
        v = normal(50, seed=2)
        torch.testing.assert_close((single.T @ v.float()).double(), double.T @ v, rtol=0, atol=1e-5)
        assert (single @ z.float()).dtype == torch.float32

    def test_squared_norms_are_kept_on_average(self) -> None:
        """Over 400 draws the mean of ``||Pz||^2/||z||^2`` is 1 within four standard errors."""
        z = normal(5, seed=1)
        ratios = [
            float((self.make(37, 5, seed=s) @ z).square().sum() / z.square().sum())
            for s in range(400)
        ]
        error = np.std(ratios) / math.sqrt(len(ratios))
        assert abs(np.mean(ratios) - 1) <= 4 * error + 1e-12

    def test_more_columns_than_rows_are_refused(self) -> None:
        with pytest.raises(InputError, match="1 <= sub_dim <= full_dim"):
            self.make(5, 6)
        with pytest.raises(InputError, match="1 <= sub_dim <= full_dim"):
            self.make(5, 0)


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


class RandomNorms(ProjectionSuite):
    """Projections whose ``||Pz||^2`` varies: its deviation must fall as ``D^(-1/2)``."""

    def test_the_deviation_of_norms_falls_with_the_square_root_of_the_size(self) -> None:
        z = normal(13, seed=1)
        z = z / z.norm()
        dims, draws = (64, 256, 1024), 400
        deviations = [
            np.std([float((self.make(D, 13, seed=s) @ z).square().sum()) for s in range(draws)])
            for D in dims
        ]
        slope = np.polyfit(np.log(dims), np.log(deviations), 1)[0]
        # The log of a deviation from n draws has standard error (2n)^(-1/2): 0.05 here.
        assert slope == pytest.approx(-0.5, abs=0.1)


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

    def test_every_size_has_factors_that_fit(self) -> None:
        for D in range(1, 60):
            for d in range(1, D + 1):
                assert self.make(D, d).sub_dim == d


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


class TestFastfood(RandomNorms):
    """Structured blocks, each with factors of its own."""

    SHARE: int | None = None

    def make(self, D: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> Projection:
        return FastfoodProjection(D, d, seed, dtype, share=self.SHARE)

    @pytest.mark.parametrize(("D", "d"), SIZES)
    def test_equals_the_product_of_its_factors(self, D: int, d: int) -> None:
        """The formula ``S H G Pi H B / sqrt(D n)`` written out block by block."""
        P = self.make(D, d)
        assert isinstance(P, FastfoodProjection)
        n = P.block_size
        H = butterfly_reference(torch.eye(n, dtype=F64))
        rows = []
        for group in range(P.num_groups):
            G, S = torch.diag(P._gaussians[group]), torch.diag(P._lengths[group])
            Pi = torch.eye(n, dtype=F64)[P._permutation[group].long() % n]
            first = group * P.share
            count = min(P.share, P.num_blocks - first)
            signs = P._signs[first * n : (first + count) * n].view(n, count)
            blocks = [S @ H @ G @ Pi @ H @ torch.diag(b.double()) for b in signs.mT]
            rows.append(torch.stack(blocks, 1).reshape(n * count, n))
        expected = torch.cat(rows)[:D, :d]
        torch.testing.assert_close(P.dense(), expected, rtol=1e-12, atol=1e-13)
        lifted = torch.stack([P.product_reference(row) for row in torch.eye(d, dtype=F64)], 1)
        torch.testing.assert_close(lifted, expected, rtol=1e-12, atol=1e-13)

    def test_rows_have_the_lengths_of_gaussian_rows(self) -> None:
        """With ``d = n`` the squared row norms times ``D`` are chi-squared with ``n`` degrees."""
        P = FastfoodProjection(4096, 16, 0, F64)
        squares = 4096 * P.dense().square().sum(1)
        assert float(squares.mean()) == pytest.approx(16, abs=4 * math.sqrt(32 / 4096))
        assert float(squares.var()) == pytest.approx(32, rel=0.15)

    def test_long_maps_are_worked_on_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same draw whole and in chunks gives the same map."""
        z, v = normal(6, seed=1), normal(150, seed=2)
        whole = self.make(150, 6)
        monkeypatch.setattr(
            "deltacontrol.theory.dimension.projections.fastfood._CHUNK", {"cpu": 32}
        )
        parts = self.make(150, 6)
        assert isinstance(whole, FastfoodProjection) and isinstance(parts, FastfoodProjection)
        assert len(list(whole._pieces())) < len(list(parts._pieces()))
        torch.testing.assert_close(whole @ z, parts @ z, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(whole.T @ v, parts.T @ v, rtol=1e-13, atol=1e-14)


class TestSharedFastfood(TestFastfood):
    """Groups of four blocks, the last one unfinished."""

    SHARE = 4

    def test_an_empty_group_is_refused(self) -> None:
        with pytest.raises(InputError, match="share is 0"):
            FastfoodProjection(10, 2, share=0)

    def test_memory_is_below_one_vector_and_sharing_grows_with_it(self) -> None:
        for D, d in ((2**20, 10), (2**20, 1000), (2**20, 10**4)):
            P = FastfoodProjection(D, d)
            assert P.num_bytes < 4 * D
        shares = [FastfoodProjection(D, 16).share for D in (2**12, 2**13, 2**15, 2**20)]
        assert shares == [1, 2, 8, 64]

    def test_sharing_keeps_the_mean_and_the_deviation_of_the_gram_matrix(self) -> None:
        """``P'P`` over 400 draws: mean the identity, its deviation that of unshared factors."""
        D, d, draws = 1024, 6, 400
        spreads = {}
        for share in (1, 32):
            grams = []
            for seed in range(draws):
                matrix = FastfoodProjection(D, d, seed, F64, share=share).dense()
                grams.append(matrix.mT @ matrix)
            found = torch.stack(grams)
            error = found.std(0) / math.sqrt(draws)
            # 21 different entries: 4.5 standard errors fail one time in seven thousand.
            assert bool(((found.mean(0) - torch.eye(d)).abs() <= 4.5 * error).all())
            off = found[:, *torch.triu_indices(d, d, 1)]
            spreads[share] = (float(off.std()), float(found.diagonal(dim1=1, dim2=2).std()))
        # Off the diagonal the signs of all blocks average: of g_l^2/||g||^2, a Dirichlet vector,
        # against signs that sum to zero comes 2/(n+2) a block, of the lengths about 2/n^2.
        n = 8
        assert spreads[32][0] == pytest.approx(spreads[1][0], rel=0.1)
        predicted = math.sqrt((2 / (n + 2) + 2 / n**2) * n / D)
        assert spreads[1][0] == pytest.approx(predicted, rel=0.1)
        # On it the lengths S decide: sqrt(6)/n a group, 128 groups of one block or 4 of 32 here.
        for share in (1, 32):
            predicted = math.sqrt(6) / 8 / math.sqrt(128 / share)
            assert spreads[share][1] == pytest.approx(predicted, rel=0.35)

    def test_given_the_gaussians_columns_have_one_length(self) -> None:
        """``||H G Pi H e_j||^2 = n ||G||^2``: sharing G and Pi moves no norm in the mean."""
        P = FastfoodProjection(64, 16, 2, F64, share=4)
        H, g = butterfly_reference(torch.eye(16, dtype=F64)), P._gaussians[0]
        product = H @ torch.diag(g) @ H[P._permutation[0].long() % 16]
        lengths = product.square().sum(0)
        torch.testing.assert_close(lengths, torch.full_like(lengths, 16 * float(g @ g)))


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
