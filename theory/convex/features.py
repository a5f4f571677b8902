"""Linear maps from the control of one group to the logits of all examples, dense or factored.

A group has a control ``u`` of shape ``(m,)`` or ``(p, q)``. Its features are
``G_ik = d z_ik / d u`` for example ``i`` and logit ``k``, of the shape of ``u``, so that the group
changes the logits by ``<G_ik, u>``. A map here is the linear operator ``G``
(`deltacontrol.theory.linear.operator`) from the flat ``u`` to the flat logits, ``R = N K`` of them:

    G @ u        (R,)     <G_ik, u>
    G.T @ a      (m,)     sum_ik a_ik G_ik
    kernel()     (R, R)   <G_ik, G_jl>

For the weight of a linear map, ``y = W x`` at the tokens ``t`` of an example, the features are sums
of outer products, ``G_ik = sum_t d_ikt x_it'`` with ``d_ikt = d z_ik / d y_it``. `OuterProducts`
keeps the factors: ``N T (K p + q)`` numbers instead of ``N K p q``.

Exact reductions. The loss sees ``u`` through ``G u`` alone.

* *Rotation.* Write ``G = B Q'`` with orthonormal columns ``Q``, ``rank G`` of them. For any ``u``
  the projection ``Q Q'u`` has the same logits and no larger Euclidean norm, so a problem whose
  regulariser is a nondecreasing function of ``||u||_2`` has a minimiser ``u = Q b``, and
  ``||u|| = ||b||``: solve in ``b`` with the features ``B``. For several such norms (group lasso)
  this holds group by group; for their sum of squares it holds for all groups jointly. It is wrong
  for a box, which the rotation does not map to a box.
* *Two-sided projection.* If the columns of all ``G_ik`` lie in the range of ``U`` and their rows in
  that of ``V`` (orthonormal columns), then ``<G_ik, W> = <G_ik, U U'W V V'>``, and a projection
  raises no singular value: ``||U U'W V V'||_* <= ||W||_*``. So some minimiser is ``W = U A V'``,
  and ``||W||_* = ||A||_*``.

Cross-entropy does not see a constant added to the logits of an example. With orthonormal contrasts
``C``, ``(K, K - 1)`` and ``C'1 = 0``, the centred logits are ``C C'z``, so ``N (K - 1)`` rows
``C'G_i`` say all that the loss can see (`contrasts`, `Features.contrasted`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.operator import LinearOperator, by_rows

__all__ = ["DenseFeatures", "Features", "OuterProducts", "contrasts", "orthonormal", "rotation"]


class Features(LinearOperator):
    """The linear map of one group, ``(N K, m)`` or ``(N K, p q)``.

    Attributes:
        num_examples: ``N``.
        num_logits: ``K``.
        control_shape: that of ``u``.
    """

    num_examples: int
    num_logits: int
    control_shape: tuple[int, ...]

    def _describe(
        self, leading: tuple[int, int], control: tuple[int, ...], like: np.ndarray
    ) -> None:
        sizes = {"num_examples": leading[0], "num_logits": leading[1], "control_shape": control}
        for name, value in sizes.items():
            object.__setattr__(self, name, value)
        dtype = torch.from_numpy(np.empty(0, like.dtype)).dtype
        super().__init__((leading[0] * leading[1], int(np.prod(control))), dtype, "cpu")

    @abstractmethod
    def kernel(self) -> np.ndarray:
        """``<G_ik, G_jl>``, ``(N K, N K)``."""

    @abstractmethod
    def restrict(self, left: np.ndarray, right: np.ndarray) -> DenseFeatures:
        """The features ``U'G_ik V`` of ``A`` in ``W = U A V'``."""

    @abstractmethod
    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        """Vectors that span the columns and the rows of all ``G_ik``: ``(p, .)`` and ``(q, .)``."""

    @abstractmethod
    def contrasted(self, contrasts: np.ndarray) -> Features:
        """``sum_k C_kj G_ik`` for contrasts ``C``, ``(K, J)``: the features of ``J`` logits."""

    @abstractmethod
    def frobenius(self) -> float:
        """``(sum_ik ||G_ik||^2)^(1/2)``, a bound on the operator norm."""

    @abstractmethod
    def numbers(self) -> int:
        """How many numbers the features hold."""


@dataclass(frozen=True, eq=False, repr=False)
class DenseFeatures(Features):
    """Features as one array.

    Attributes:
        array: ``(N, K, m)`` or ``(N, K, p, q)``.
    """

    array: np.ndarray

    def __post_init__(self) -> None:
        """Keep the sizes."""
        if self.array.ndim not in (3, 4):
            raise InputError(
                f"features have shape {self.array.shape}; expected (examples, logits, m) for a "
                "vector or (examples, logits, p, q) for a matrix of controls"
            )
        num_examples, num_logits, *control = self.array.shape
        self._describe((num_examples, num_logits), tuple(control), self.array)

    @property
    def matrix(self) -> np.ndarray:
        """``(N K, m)``."""
        return self.array.reshape(self.shape)

    def _product(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() @ self.matrix.T)

    def _transpose_product(self, y: Tensor) -> Tensor:
        return torch.from_numpy(y.detach().numpy() @ self.matrix)

    def kernel(self) -> np.ndarray:
        """``G G'``."""
        return self.matrix @ self.matrix.T

    def restrict(self, left: np.ndarray, right: np.ndarray) -> DenseFeatures:
        """``U'G_ik V``."""
        return DenseFeatures(left.T @ self.array @ right)

    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        """The unfoldings."""
        p, q = self.control_shape
        stacked = self.array.reshape(-1, p, q)
        return stacked.transpose(1, 0, 2).reshape(p, -1), stacked.transpose(2, 0, 1).reshape(q, -1)

    def contrasted(self, contrasts: np.ndarray) -> DenseFeatures:
        """``sum_k C_kj G_ik``."""
        return DenseFeatures(np.einsum("kj,nk...->nj...", contrasts, self.array, optimize=True))

    def frobenius(self) -> float:
        """``||G||_F``."""
        return float(np.linalg.norm(self.array))

    def numbers(self) -> int:
        """``N K m``."""
        return self.array.size


@dataclass(frozen=True, eq=False, repr=False)
class OuterProducts(Features):
    """``G_ik = sum_t left_ikt right_it'``: the features of the weight of a linear map.

    Attributes:
        left: ``(N, K, T, p)``, derivatives of the logits in the map's outputs; zero on padding.
        right: ``(N, T, q)``, the map's inputs.

    Raises:
        InputError: if the two do not belong to the same examples and tokens.
    """

    left: np.ndarray
    right: np.ndarray

    def __post_init__(self) -> None:
        """Check the shapes; take tensors as arrays."""
        for name in ("left", "right"):
            object.__setattr__(self, name, as_array(getattr(self, name)))
        fits = (
            self.left.ndim == 4
            and self.right.ndim == 3
            and self.left.shape[::2] == self.right.shape[:2]
        )
        if not fits:
            raise InputError(
                f"left factors have shape {self.left.shape} and right factors {self.right.shape}; "
                "expected (examples, logits, tokens, p) and (examples, tokens, q)"
            )
        num_examples, num_logits, _, p = self.left.shape
        self._describe((num_examples, num_logits), (p, self.right.shape[2]), self.left)

    def _product(self, x: Tensor) -> Tensor:
        def product(u: Tensor) -> Tensor:  # sum_t left_ikt' U right_it
            inner = self.right @ u.detach().numpy().reshape(self.control_shape).T
            logits = np.einsum("nktp,ntp->nk", self.left, inner, optimize=True)
            return torch.from_numpy(logits).reshape(-1)

        return by_rows(product, x, self.shape[0])

    def _transpose_product(self, y: Tensor) -> Tensor:
        def product(a: Tensor) -> Tensor:  # sum_it (sum_k a_ik left_ikt) right_it'
            p, q = self.control_shape
            weights = a.detach().numpy().reshape(self.num_examples, self.num_logits)
            weighted = np.einsum("nk,nktp->ntp", weights, self.left, optimize=True)
            return torch.from_numpy(weighted.reshape(-1, p).T @ self.right.reshape(-1, q)).reshape(
                -1
            )

        return by_rows(product, y, self.shape[1])

    def kernel(self) -> np.ndarray:
        """``G G'``, summed over stretches of rows of ``G_ik`` so that no ``G`` is formed whole."""
        (p, q), rows = self.control_shape, self.shape[0]
        stretch = max(1, int(_STRETCH_NUMBERS / (rows * q)))
        total = np.zeros((rows, rows))
        for start in range(0, p, stretch):
            left = np.swapaxes(self.left[..., start : start + stretch], 2, 3)
            part = (left @ self.right[:, None]).reshape(rows, -1)
            total += part @ part.T
        return total

    def restrict(self, left: np.ndarray, right: np.ndarray) -> DenseFeatures:
        """``U'G_ik V``, from the projected factors."""
        projected = np.swapaxes(self.left @ left, 2, 3)
        return DenseFeatures(projected @ (self.right @ right)[:, None])

    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        """All factors that are not zero."""
        p, q = self.control_shape
        used = np.abs(self.left).max((1, 3)) > 0
        left = np.swapaxes(self.left, 1, 2)[used]
        return left.reshape(-1, p).T, self.right[used].reshape(-1, q).T

    def contrasted(self, contrasts: np.ndarray) -> OuterProducts:
        """Left factors ``sum_k C_kj left_ikt``."""
        left = np.einsum("kj,nktp->njtp", contrasts, self.left, optimize=True)
        return OuterProducts(left, self.right)

    def frobenius(self) -> float:
        """``||G_ik||^2 = sum_ts <left_ikt, left_iks> <right_it, right_is>``."""
        tokens = self.right @ self.right.swapaxes(1, 2)
        outputs = self.left @ self.left.swapaxes(2, 3)
        return float(np.sqrt((outputs * tokens[:, None]).sum()))

    def numbers(self) -> int:
        """``N T (K p + q)``."""
        return self.left.size + self.right.size


_STRETCH_NUMBERS = 2**24


def as_array(tensor: Tensor | np.ndarray) -> np.ndarray:
    """Double precision on the processor."""
    if isinstance(tensor, Tensor):
        tensor = tensor.detach().cpu().double().numpy()
    return np.ascontiguousarray(tensor, dtype=np.float64)


def contrasts(num_logits: int) -> np.ndarray:
    """``C``, ``(K, K - 1)``: orthonormal columns that are orthogonal to the ones."""
    centring = np.eye(num_logits) - 1.0 / num_logits
    return np.linalg.svd(centring)[0][:, : num_logits - 1]


def rotation(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``B`` and ``Q`` with ``G = B Q'`` and orthonormal columns of ``Q``, ``rank G`` of them.

    Args:
        matrix: ``G``, ``(R, m)``.
    """
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    kept = values > max(matrix.shape) * np.finfo(float).eps * values.max(initial=0.0)
    return left[:, kept] * values[kept], right[kept].T


def orthonormal(vectors: np.ndarray) -> np.ndarray:
    """An orthonormal basis ``(p, rank)`` of the span of columns ``(p, count)``."""
    p, count = vectors.shape
    if count > p:  # V = R'Q', and Q' has full row rank
        vectors = np.asarray(np.linalg.qr(vectors.T, mode="r")).T
    basis, values, _ = np.linalg.svd(vectors, full_matrices=False)
    return basis[:, values > max(p, count) * np.finfo(float).eps * values.max(initial=0.0)]
