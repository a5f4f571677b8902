"""One suite that every projection inherits: a new one supplies its constructor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from theory.errors import InputError
from theory.hadamard import hadamard_transform
from theory.projections import DenseProjection, FastfoodProjection, Projection

F64 = torch.float64
SIZES = [(1, 1), (7, 1), (8, 8), (50, 3), (64, 16), (100, 33), (129, 64), (40, 40)]

# The suite's classes hold no state, so that inheriting a test from it is safe.
quick = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.differing_executors]
)
sizes = st.integers(1, 70).flatmap(lambda D: st.tuples(st.just(D), st.integers(1, D)))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class ProjectionSuite:
    """Laws of every projection; a subclass says how to make one and how its norms vary."""

    def make(self, D: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> Projection:
        raise AssertionError("a subclass makes the projection")

    @pytest.mark.parametrize(("D", "d"), SIZES)
    def test_lift_and_adjoint_equal_the_dense_matrix(self, D: int, d: int) -> None:
        P = self.make(D, d)
        matrix = P.dense()
        assert matrix.shape == (D, d)
        z, v = normal(d, seed=1), normal(D, seed=2)
        torch.testing.assert_close(P.lift(z), matrix @ z, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(P.adjoint(v), matrix.mT @ v, rtol=1e-12, atol=1e-13)

    @quick
    @given(size=sizes, seed=st.integers(0, 2**16))
    def test_dot_product(self, size: tuple[int, int], seed: int) -> None:
        P = self.make(*size, seed=seed)
        z, v = normal(P.sub_dim, seed=seed), normal(P.full_dim, seed=seed + 1)
        lifted, pulled = P.lift(z), P.adjoint(v)
        bound = 1e-14 * float(lifted.norm() * v.norm() + pulled.norm() * z.norm())
        assert abs(float(lifted @ v - pulled @ z)) <= bound + 1e-15

    @quick
    @given(size=sizes, seed=st.integers(0, 2**16), a=st.floats(-9, 9), b=st.floats(-9, 9))
    def test_linearity(self, size: tuple[int, int], seed: int, a: float, b: float) -> None:
        P = self.make(*size, seed=seed)
        y, z = normal(P.sub_dim, seed=seed), normal(P.sub_dim, seed=seed + 1)
        torch.testing.assert_close(
            P.lift(a * y + b * z), a * P.lift(y) + b * P.lift(z), rtol=1e-12, atol=1e-12
        )

    @pytest.mark.parametrize(("D", "d"), [(50, 3), (33, 1), (20, 16)])
    def test_derivatives_of_every_kind(self, D: int, d: int) -> None:
        P = self.make(D, d)
        matrix, z, v = P.dense(), normal(d, seed=1), normal(D, seed=2)
        close = {"rtol": 1e-12, "atol": 1e-13}
        _, pull = torch.func.vjp(P.lift, z)
        torch.testing.assert_close(pull(v)[0], P.adjoint(v), **close)
        torch.testing.assert_close(torch.func.jvp(P.lift, (z,), (z,))[1], P.lift(z), **close)
        torch.testing.assert_close(torch.func.jvp(P.adjoint, (v,), (v,))[1], P.adjoint(v), **close)
        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(jacobian(P.lift)(z), matrix, **close)
            torch.testing.assert_close(jacobian(P.adjoint)(v), matrix.mT, **close)
        second = torch.func.hessian(lambda z: P.lift(z).square().sum())(z)
        torch.testing.assert_close(second, 2 * matrix.mT @ matrix, **close)

    def test_gradcheck_to_second_order(self) -> None:
        P = self.make(12, 5)
        z, v = normal(5, seed=1).requires_grad_(), normal(12, seed=2).requires_grad_()
        for function, argument in ((P.lift, z), (P.adjoint, v)):
            assert torch.autograd.gradcheck(function, argument, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(function, argument)

    def test_batches_equal_vmap(self) -> None:
        P = self.make(50, 6)
        z, v = normal(3, 4, 6, seed=1), normal(4, 50, seed=2)
        one_by_one = torch.stack([torch.stack([P.lift(b) for b in a]) for a in z])
        close = {"rtol": 1e-12, "atol": 1e-13}
        torch.testing.assert_close(P.lift(z), one_by_one, **close)
        twice = torch.func.vmap(torch.func.vmap(P.lift))
        torch.testing.assert_close(twice(z), one_by_one, **close)
        turned = torch.func.vmap(P.lift, in_dims=1)(z[0].mT)
        torch.testing.assert_close(turned, one_by_one[0], **close)
        torch.testing.assert_close(torch.func.vmap(P.adjoint)(v), P.adjoint(v), **close)

    def test_the_seed_determines_it(self) -> None:
        z = normal(6, seed=1)
        first, again, other = (self.make(50, 6, seed=s).lift(z) for s in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.allclose(first, other, rtol=1e-2)

    def test_precisions_agree(self) -> None:
        z = normal(6, seed=1)
        double, single = self.make(50, 6), self.make(50, 6, dtype=torch.float32)
        torch.testing.assert_close(
            single.lift(z.float()).double(), double.lift(z), rtol=0, atol=1e-6
        )
        assert single.num_bytes < double.num_bytes

    def test_squared_norms_are_kept_on_average(self) -> None:
        """Over 400 draws the mean of ``||Pz||^2/||z||^2`` is 1 within four standard errors."""
        z = normal(5, seed=1)
        ratios = [
            float(self.make(37, 5, seed=s).lift(z).square().sum() / z.square().sum())
            for s in range(400)
        ]
        error = np.std(ratios) / math.sqrt(len(ratios))
        assert abs(np.mean(ratios) - 1) <= 4 * error + 1e-12

    def test_wrong_sizes_and_dtypes_are_refused(self) -> None:
        P = self.make(50, 6)
        with pytest.raises(InputError, match=r"lift got shape \(7,\).*expected \(..., 6\)"):
            P.lift(torch.zeros(7, dtype=F64))
        with pytest.raises(InputError, match=r"adjoint got shape \(6,\).*expected \(..., 50\)"):
            P.adjoint(torch.zeros(6, dtype=F64))
        with pytest.raises(InputError, match="float32.*float64"):
            P.lift(torch.zeros(6))
        with pytest.raises(InputError, match="1 <= sub_dim <= full_dim"):
            self.make(5, 6)
        with pytest.raises(InputError, match="1 <= sub_dim <= full_dim"):
            self.make(5, 0)
        assert repr(P) == f"{type(P).__name__}(50, 6, dtype=torch.float64)"


class TestDense(ProjectionSuite):
    """Orthonormal columns."""

    def make(self, D: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> Projection:
        return DenseProjection(D, d, seed, dtype)

    @pytest.mark.parametrize(("D", "d"), SIZES)
    def test_columns_are_orthonormal(self, D: int, d: int) -> None:
        matrix = self.make(D, d).dense()
        torch.testing.assert_close(matrix.mT @ matrix, torch.eye(d, dtype=F64), rtol=0, atol=1e-13)

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
            np.std([float(self.make(D, 13, seed=s).lift(z).square().sum()) for s in range(draws)])
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
        norms = [float(self.make(50, 5, seed=s).lift(z).square().sum()) for s in range(400)]
        assert np.std(norms) == pytest.approx(math.sqrt(2 / 50), rel=0.15)


class TestFastfood(RandomNorms):
    """Structured blocks."""

    def make(self, D: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> Projection:
        return FastfoodProjection(D, d, seed, dtype)

    @pytest.mark.parametrize(("D", "d"), SIZES)
    def test_equals_the_product_of_its_factors(self, D: int, d: int) -> None:
        """The formula ``S H G Pi H B / sqrt(D n)`` written out block by block."""
        P = self.make(D, d)
        assert isinstance(P, FastfoodProjection)
        n = P.block_size
        H = recursive_hadamard(torch.eye(n, dtype=F64))
        blocks = []
        for k in range(P.num_blocks):
            B, G = torch.diag(P._signs[k].double()), torch.diag(P._gaussians[k])
            S, Pi = torch.diag(P._lengths[k]), torch.eye(n, dtype=F64)[P._permutation]
            blocks.append(S @ H @ G @ Pi @ H @ B)
        expected = torch.cat(blocks)[:D, :d]
        torch.testing.assert_close(P.dense(), expected, rtol=1e-12, atol=1e-13)

    def test_rows_have_the_lengths_of_gaussian_rows(self) -> None:
        """With ``d = n`` the squared row norms times ``D`` are chi-squared with ``n`` degrees."""
        P = self.make(4096, 16)
        squares = 4096 * P.dense().square().sum(1)
        assert float(squares.mean()) == pytest.approx(16, abs=4 * math.sqrt(32 / 4096))
        assert float(squares.var()) == pytest.approx(32, rel=0.15)

    def test_long_maps_are_worked_on_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same draw whole and in chunks gives the same map."""
        z, v = normal(6, seed=1), normal(150, seed=2)
        whole = self.make(150, 6)
        lifted, pulled = whole.lift(z), whole.adjoint(v)
        monkeypatch.setattr("theory.projections._CHUNK", 32)
        assert isinstance(whole, FastfoodProjection) and len(whole._chunks()) == 5
        torch.testing.assert_close(whole.lift(z), lifted, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(whole.adjoint(v), pulled, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(self.make(150, 6).dense().mT @ v, self.make(150, 6).adjoint(v))

    def test_memory_is_linear_in_the_large_size(self) -> None:
        P = FastfoodProjection(2**16, 100, dtype=torch.float32)
        assert P.num_bytes == 2**16 * (4 + 4 + 1) + 128 * 16


def recursive_hadamard(x: Tensor) -> Tensor:
    """The slow reference: ``H_{2n} (a, b) = (H_n (a + b), H_n (a - b))`` along the last axis."""
    n = x.shape[-1]
    if n == 1:
        return x
    a, b = x[..., : n // 2], x[..., n // 2 :]
    return torch.cat([recursive_hadamard(a + b), recursive_hadamard(a - b)], -1)


@pytest.mark.parametrize("bits", range(14))
def test_hadamard_transform_equals_the_recursion(bits: int) -> None:
    x = normal(3, 2**bits, seed=bits)
    torch.testing.assert_close(hadamard_transform(x), recursive_hadamard(x), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(
        hadamard_transform(hadamard_transform(x)), 2**bits * x, rtol=1e-12, atol=1e-9
    )


@pytest.mark.parametrize("n", [0, 3, 48])
def test_hadamard_transform_refuses_other_lengths(n: int) -> None:
    with pytest.raises(InputError, match="no power of two"):
        hadamard_transform(torch.zeros(2, n))
