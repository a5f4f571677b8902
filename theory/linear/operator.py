"""One type for every linear map of this package, known by its products.

For ``A`` of shape ``(m, n)``:

==================  ===========================  ================================================
``A @ x``           ``(n,) -> (m,)``             a product
``A @ X``           ``(n, k) -> (m, k)``         a block: one vector a column, as for a matrix
``X @ A``           ``(k, m) -> (k, n)``         a block: one vector a row, ``X @ A = (A.T @ X')'``
``A.T``             shape ``(n, m)``             the adjoint: ``<A x, y> = <x, A.T y>``
``A.dense()``       tensor ``(m, n)``            for small sizes
``A.to_scipy()``    ``scipy.sparse.linalg``      for its solvers
==================  ===========================  ================================================

So the convention for blocks is that of matrices: ``A @ X`` is ``A.dense() @ X`` and ``X @ A`` is
``X @ A.dense()``, with any number of axes in front. Rows lie one after another in memory, hence
many vectors go fastest as rows: ``Z @ A.T`` for the ``A z_i``, as in ``x @ weight.T``.

What a map acts on may have parts and shapes, such as the controls of all layers; as an operator it
takes and gives the flat vector of them (`flatten`, `unflatten`). Where intermediate results matter,
as the states of a rollout, a class has further methods for these.

Sources: Golub & Van Loan, *Matrix Computations*, 2013, section 10.1 (methods that need products
alone). The interface follows `scipy.sparse.linalg.LinearOperator`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

__all__ = [
    "Congruence",
    "Diagonal",
    "LinearOperator",
    "Shifted",
    "SymmetricMatrix",
    "SymmetricOperator",
    "by_rows",
    "mapped",
    "flatten",
    "unflatten",
]


def flatten(parts: Sequence[Tensor]) -> Tensor:
    """All entries of all tensors as one vector, without their graph."""
    return torch.cat([u.detach().reshape(-1) for u in parts]) if parts else torch.zeros(0)


def unflatten(z: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inverse of `flatten`, in the shapes of ``like``, as views."""
    parts = z.split([u.numel() for u in like])
    return tuple(part.reshape(u.shape) for part, u in zip(parts, like, strict=True))


def by_rows(product: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """A product with one vector, ``(n,) -> (size,)``, for the rows of ``(..., n)`` in turn."""
    if x.ndim == 1:
        return product(x)
    rows = [product(row) for row in x.reshape(-1, x.shape[-1])]
    found = torch.stack(rows) if rows else x.new_zeros(0, size)
    return found.reshape(*x.shape[:-1], size)


def mapped(
    product: Callable[[Tensor], Tensor], x: Tensor, size: int, chunk: int | None = None
) -> Tensor:
    """`by_rows` with all rows at once, or ``chunk`` of them, by `torch.func.vmap`."""
    rows = x.reshape(-1, x.shape[-1])
    if x.ndim == 1 or not len(rows):
        return by_rows(product, x, size)
    found = torch.func.vmap(product, chunk_size=chunk)(rows)
    return found.reshape(*x.shape[:-1], size)


class LinearOperator(ABC):
    """A linear map ``A`` between vectors.

    A subclass gives `_product` and `_transpose_product`, and calls ``LinearOperator.__init__``.

    Attributes:
        shape: ``(m, n)``.
        dtype: of the entries; vectors of another dtype are refused.
        device: of arguments and values.
        symmetric: whether ``A.T`` is known to be ``A``, as it is for a `SymmetricOperator`.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    symmetric: bool = False

    __array_ufunc__ = None  # a NumPy array on the left leaves the product to this class

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        # Not by assignment: some operators are frozen dataclasses.
        given = {"shape": shape, "dtype": dtype, "device": torch.device(device)}
        for name, value in given.items():
            object.__setattr__(self, name, value)

    @abstractmethod
    def _product(self, x: Tensor) -> Tensor:
        """``A x_i`` for one vector or many: ``(..., n) -> (..., m)``."""

    @abstractmethod
    def _transpose_product(self, y: Tensor) -> Tensor:
        """``A' y_i``: ``(..., m) -> (..., n)``."""

    @property
    def T(self) -> LinearOperator:
        """The adjoint; that of ``A.T`` is ``A``, and a symmetric operator is its own."""
        if self.symmetric:
            return self
        return self.of if isinstance(self, _Transpose) else _Transpose(self)

    def __matmul__(self, x: Tensor) -> Tensor:
        """``A x``, from ``(n,)``, or from ``(..., n, k)`` with one vector a column.

        Raises:
            InputError: for another size or dtype.
        """
        if not isinstance(x, Tensor):
            return self._no_tensor(x)
        self._require_entries(x)
        size = self.shape[1]
        if x.ndim == 1:
            if x.shape[0] != size or x.dtype != self.dtype:
                self._refuse(x, f"({size},) or (..., {size}, k), one vector a column")
            return self._product(x)
        if x.ndim < 2 or x.shape[-2] != size or x.dtype != self.dtype:
            self._refuse(x, f"({size},) or (..., {size}, k), one vector a column")
        return self._product(x.mT).mT

    def __rmatmul__(self, y: Tensor) -> Tensor:
        """``A'y_i`` for the rows of ``(..., m)``.

        Raises:
            InputError: for another size or dtype.
        """
        if not isinstance(y, Tensor):
            return self._no_tensor(y)
        self._require_entries(y)
        size = self.shape[0]
        if y.ndim < 1 or y.shape[-1] != size or y.dtype != self.dtype:
            self._refuse(y, f"(..., {size}) on the left, one vector a row")
        return self._transpose_product(y)

    def dense(self) -> Tensor:
        """The matrix ``(m, n)``, by products with the unit vectors of the smaller side."""
        m, n = self.shape
        eye = torch.eye(min(m, n), dtype=self.dtype, device=self.device)
        return eye @ self if m < n else (eye @ self.T).mT

    def to_scipy(self) -> ScipyOperator:
        """The same map for SciPy's solvers, on NumPy arrays.

        Raises:
            InputError: for a dtype that NumPy does not have.

        Example:
            >>> D = Diagonal(torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64))
            >>> from scipy.sparse.linalg import eigsh
            >>> round(float(eigsh(D.to_scipy(), k=1, return_eigenvectors=False)[0]), 9)
            3.0
        """
        if self.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"{self!r} has a dtype that SciPy's solvers do not take; make the operator in "
                "float32 or float64"
            )
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        def through(operator: LinearOperator) -> Callable[[np.ndarray], np.ndarray]:
            def product(x: np.ndarray) -> np.ndarray:
                # A copy: SciPy's arrays may be of another dtype, and not writable.
                vectors = torch.from_numpy(np.array(x)).to(operator.device, operator.dtype)
                return (operator @ vectors).detach().cpu().numpy()

            return product

        forward, backward = through(self), through(self.T)
        make: Any = ScipyOperator  # its stub does not know the keywords
        return make(
            self.shape,
            matvec=lambda x: forward(x.reshape(-1)),
            rmatvec=lambda y: backward(y.reshape(-1)),
            matmat=forward,
            rmatmat=backward,
            dtype=torch.empty(0, dtype=self.dtype).numpy().dtype,
        )

    def __repr__(self) -> str:
        """The kind and the size."""
        if isinstance(self, _Transpose):
            return f"{self.of!r}.T"
        m, n = self.shape
        return f"{type(self).__name__}({m} x {n}, {str(self.dtype).removeprefix('torch.')})"

    def _refuse(self, x: Tensor, expected: str) -> None:
        raise InputError(
            f"{self!r} got shape {tuple(x.shape)} of {x.dtype}; expected {expected}, of "
            f"{self.dtype}"
        )

    def _require_entries(self, x: Tensor) -> None:
        if x.layout is not torch.strided or x.device.type != self.device.type:
            found = f"on {x.device.type}" if x.layout is torch.strided else f"of {x.layout}"
            raise InputError(
                f"{self!r} got a tensor {found}; expected a dense one on {self.device.type}: give "
                "its .to_dense(), or move it with .to(...)"
            )

    def _no_tensor(self, x: object) -> Tensor:
        if isinstance(x, LinearOperator):
            raise InputError(
                f"{self!r} @ {x!r}: products of operators are not formed; multiply from the right "
                "by vectors, or take Congruence(A, M) for A M A.T"
            )
        raise InputError(
            f"{self!r} got a {type(x).__name__}; it multiplies tensors. For NumPy arrays take "
            "its to_scipy()"
        )


class SymmetricOperator(LinearOperator):
    """A map with ``A = A.T``; a subclass gives `_product` alone."""

    symmetric = True

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__((size, size), dtype, device)

    def _transpose_product(self, y: Tensor) -> Tensor:
        return self._product(y)


class _Transpose(LinearOperator):
    """``A.T``."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__((operator.shape[1], operator.shape[0]), operator.dtype, operator.device)
        self.of = operator

    def _product(self, x: Tensor) -> Tensor:
        return self.of._transpose_product(x)

    def _transpose_product(self, y: Tensor) -> Tensor:
        return self.of._product(y)


@typed
class SymmetricMatrix(SymmetricOperator):
    """A stored matrix ``(n, n)`` that the caller knows to be symmetric."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InputError(f"a matrix of shape {tuple(matrix.shape)} is not symmetric (n, n)")
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix = matrix

    def _product(self, x: Tensor) -> Tensor:
        return x @ self.matrix


@typed
class Diagonal(SymmetricOperator):
    """``diag(d)``, of ``d`` ``(n,)``."""

    def __init__(self, diagonal: Tensor) -> None:
        if diagonal.ndim != 1:
            raise InputError(f"a diagonal of shape {tuple(diagonal.shape)}; expected (n,)")
        super().__init__(len(diagonal), diagonal.dtype, diagonal.device)
        self.diagonal = diagonal

    def _product(self, x: Tensor) -> Tensor:
        return self.diagonal * x


@typed
class Shifted(SymmetricOperator):
    """``A + c I`` of a symmetric ``A``."""

    def __init__(self, operator: SymmetricOperator, shift: float) -> None:
        super().__init__(operator.shape[0], operator.dtype, operator.device)
        self._operator, self._shift = operator, shift

    def _product(self, x: Tensor) -> Tensor:
        return self._operator._product(x) + self._shift * x


@typed
class Congruence(SymmetricOperator):
    """``A M A.T`` of any ``A`` and a symmetric ``M``.

    Raises:
        InputError: if the shapes do not fit.
    """

    def __init__(self, outer: LinearOperator, inner: SymmetricOperator) -> None:
        if outer.shape[1] != inner.shape[0]:
            raise InputError(
                f"{outer!r} and {inner!r} do not fit; A M A.T needs as many columns of A as M has"
            )
        super().__init__(outer.shape[0], outer.dtype, outer.device)
        self._outer, self._inner = outer, inner

    def _product(self, x: Tensor) -> Tensor:
        inside = self._inner._product(self._outer._transpose_product(x))
        return self._outer._product(inside)
