"""The suite that every projection inherits: a new one supplies its constructor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltacontrol.theory.dimension.projections import Projection
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.operator import LinearOperator
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
