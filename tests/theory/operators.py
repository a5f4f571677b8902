"""One suite that every linear operator inherits: a new one supplies itself and a dense matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.operator import LinearOperator

F64 = torch.float64
SEEDS = (0, 1, 2)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class OperatorSuite:
    """Laws of every operator; `pair` gives one and its matrix, which does not come from it."""

    tolerance = 1e-11  # relative to the matrix and the vectors

    def pair(self) -> tuple[LinearOperator, Tensor]:
        raise AssertionError("a subclass makes the operator and its matrix")

    def close(self, found: Tensor, expected: Tensor, scale: Tensor | float) -> None:
        assert found.shape == expected.shape
        assert float((found - expected).norm()) <= self.tolerance * float(scale) + 1e-300

    def test_shape_dtype_and_device_are_those_of_the_matrix(self) -> None:
        A, M = self.pair()
        assert A.shape == tuple(M.shape) and A.T.shape == tuple(M.mT.shape)
        assert (A.dtype, A.device) == (F64, torch.device("cpu")) == (A.T.dtype, A.T.device)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_products_are_those_of_the_matrix(self, seed: int) -> None:
        A, M = self.pair()
        x, y = normal(M.shape[1], seed=seed), normal(M.shape[0], seed=seed + 9)
        self.close(A @ x, M @ x, M.norm() * x.norm())
        self.close(A.T @ y, M.mT @ y, M.norm() * y.norm())
        self.close(y @ A, y @ M, M.norm() * y.norm())
        self.close(x @ A.T, M @ x, M.norm() * x.norm())

    @pytest.mark.parametrize("seed", SEEDS)
    def test_the_adjoint_identity(self, seed: int) -> None:
        A, M = self.pair()
        x, y = normal(M.shape[1], seed=seed), normal(M.shape[0], seed=seed + 9)
        scale = float(M.norm() * x.norm() * y.norm())
        assert abs(float((A @ x) @ y - x @ (A.T @ y))) <= 1e-13 * scale

    @pytest.mark.parametrize("seed", SEEDS)
    def test_linearity(self, seed: int) -> None:
        A, M = self.pair()
        x, z = normal(M.shape[1], seed=seed), normal(M.shape[1], seed=seed + 9)
        a, b = normal(2, seed=seed + 20).tolist()
        scale = float(M.norm() * (abs(a) * x.norm() + abs(b) * z.norm()))
        self.close(A @ (a * x + b * z), a * (A @ x) + b * (A @ z), scale)
        assert not (A @ torch.zeros_like(x)).any()

    def test_blocks_are_those_of_matrices(self) -> None:
        """``A @ X`` acts on columns and ``X @ A`` on rows, with any number of axes in front."""
        A, M = self.pair()
        m, n = M.shape
        for lead in ((), (2,)):
            X, Y = normal(*lead, n, 3, seed=1), normal(*lead, 3, m, seed=2)
            self.close(A @ X, M @ X, M.norm() * X.norm())
            self.close(Y @ A, Y @ M, M.norm() * Y.norm())
            self.close(A.T @ Y.mT, M.mT @ Y.mT, M.norm() * Y.norm())
            self.close(X.mT @ A.T, X.mT @ M.mT, M.norm() * X.norm())
        assert (A @ X[0, :, :0]).shape == (m, 0) and (Y[0, :0] @ A).shape == (0, n)

    def test_dense(self) -> None:
        A, M = self.pair()
        self.close(A.dense(), M, M.norm())
        self.close(A.T.dense(), M.mT, M.norm())

    def test_symmetry_is_told(self) -> None:
        A, M = self.pair()
        assert A.T.T is A
        if A.symmetric:
            assert A.T is A
            assert float((M - M.mT).norm()) <= 1e-12 * float(M.norm())
        else:
            assert A.T is not A and A.T.symmetric is False

    def test_scipy_has_the_same_map(self) -> None:
        A, M = self.pair()
        S, (m, n) = A.to_scipy(), M.shape
        assert S.shape == (m, n) and S.dtype == np.float64
        x, y = normal(n, seed=1), normal(m, seed=2)
        X, Y = normal(n, 3, seed=3), normal(m, 3, seed=4)
        for found, expected, scale in (
            (S.matvec(x.numpy()), A @ x, x.norm()),
            (S.rmatvec(y.numpy()), A.T @ y, y.norm()),
            (S.matmat(X.numpy()), A @ X, X.norm()),
            (S.rmatmat(Y.numpy()), A.T @ Y, Y.norm()),
            (S @ np.eye(n)[::-1].T, M.flip(1), 1.0),  # strides of another sign
        ):
            self.close(torch.from_numpy(found), expected, M.norm() * scale)

    def test_wrong_vectors_are_refused(self) -> None:
        A, M = self.pair()
        m, n = M.shape
        with pytest.raises(InputError, match=rf"got shape \({n + 1},\) .*expected \({n},\)"):
            A @ normal(n + 1, seed=1)
        with pytest.raises(InputError, match=rf"expected \({n},\) or \(..., {n}, k\)"):
            A @ normal(n + 1, 2, seed=1)
        with pytest.raises(InputError, match=rf"expected \(..., {m}\) on the left"):
            normal(2, m + 1, seed=1) @ A
        with pytest.raises(InputError, match="of torch.float32; .* of torch.float64"):
            A @ torch.ones(n)
        with pytest.raises(InputError, match="NumPy"):
            A @ np.ones(n)  # type: ignore[operator]
        with pytest.raises(InputError, match="products of operators are not formed"):
            A @ A.T  # type: ignore[operator]

    def test_it_prints_in_a_line(self) -> None:
        A, M = self.pair()
        assert repr(A) == f"{type(A).__name__}({M.shape[0]} x {M.shape[1]}, float64)"
        assert repr(A.T) == repr(A) + ("" if A.symmetric else ".T")
