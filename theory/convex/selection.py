"""Penalties that select: groups (group lasso) and ranks (nuclear norm).

Both are ``lambda sum_g w_g ||u_g||`` with a norm and its dual, ``||.||_o``. Their conjugate is the
indicator of ``||v_g||_o <= lambda w_g``, because ``sup_u <u, v> - c ||u||`` is 0 if
``||v||_o <= c``, else infinity. The Euclidean norm is its own dual; the nuclear norm, the sum of
the singular values, has the spectral norm, the largest of them. Call the length of a vector its
only singular value, and both cases are one: ``u_g`` is made of those singular directions of ``v_g``
whose singular value reaches ``lambda w_g``, and of no others.

*Working sets.* A minimiser over some blocks, or over the matrices ``U A V'``, is one over all if
its dual point satisfies the constraints that were left out. `grow` adds those that it violates; the
certificate of the whole problem says when to stop.

Source: Yuan & Lin, J. R. Statist. Soc. B 68(1), 2006, equation (2.1); Recht, Fazel & Parrilo, SIAM
Review 52(3), 2010, section 2.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.convex.penalties import ROUNDING, Blocks, Penalty, Working
from deltacontrol.theory.errors import InputError

__all__ = ["GroupLasso", "NuclearNorm"]


@dataclass(frozen=True)
class SumOfNorms(Penalty):
    """``lambda sum_g w_g sum_j sigma_j(u_g)`` for some notion of singular values.

    Attributes:
        scales: ``w_g`` for each group; None for the default.
    """

    scales: tuple[float, ...] | None = None

    joint: ClassVar[bool] = False
    selects: ClassVar[bool] = True

    @abstractmethod
    def singular_values(self, u: np.ndarray) -> np.ndarray:
        """The singular values of one block, largest first."""

    def largest(self, v: np.ndarray) -> float:
        """The largest singular value, ``||v||_o``."""
        return float(self.singular_values(v).max(initial=0.0))

    @abstractmethod
    def default_scale(self, shape: tuple[int, ...]) -> float:
        """``w_g`` of a group of this shape."""

    @abstractmethod
    def norm(self, variable: Any) -> Any:
        """The norm of a cvxpy variable."""

    def fitted(self, shapes: Sequence[tuple[int, ...]]) -> Penalty:
        """With one scale for each group."""
        scales = self.scales or tuple(self.default_scale(shape) for shape in shapes)
        if len(scales) != len(shapes) or not all(0 < w < np.inf for w in scales):
            raise InputError(
                f"{type(self).__name__} has scales {scales}; expected {len(shapes)} positive "
                "numbers, one for each group"
            )
        return replace(self, scales=scales)

    def weights(self) -> tuple[float, ...]:
        """``w_g``."""
        assert self.scales is not None, "call fitted first"
        return self.scales

    def value(self, u: Blocks, weight: float) -> float:
        """``lambda sum_g w_g ||u_g||``."""
        norms = (self.singular_values(block).sum() for block in u)
        return weight * float(sum(w * n for w, n in zip(self.weights(), norms, strict=True)))

    def gauge(self, v: Blocks) -> float:
        """``max_g ||v_g||_o / w_g``, the dual norm of ``sum_g w_g ||.||``."""
        tops = [self.largest(block) for block in v]
        return float(max(t / w for t, w in zip(tops, self.weights(), strict=True)))

    def conjugate(self, v: Blocks, weight: float) -> float:
        """0 in the dual ball, else infinity."""
        return 0.0 if self.gauge(v) <= weight * (1 + ROUNDING) else np.inf

    def expression(
        self, variables: dict[int, Any], weight: Any, num_examples: int
    ) -> tuple[Any, list[Any]]:
        """The sum over the groups in the working set."""
        norms = [self.weights()[g] * self.norm(variable) for g, variable in variables.items()]
        return num_examples * weight * sum(norms), []

    def ranks(self, u: Blocks, threshold: float) -> list[int]:
        """The singular values above the threshold."""
        return [int((self.singular_values(block) > threshold).sum()) for block in u]

    def rank_bounds(self, v: Blocks, slack: Sequence[float], weight: float) -> list[int]:
        """The singular values of ``v_g`` that may reach ``lambda w_g``.

        The singular values of a matrix move by at most the spectral norm of its change (Weyl).
        """
        return [
            int((self.singular_values(block) + s >= weight * w).sum())
            for block, s, w in zip(v, slack, self.weights(), strict=True)
        ]


@typed
@dataclass(frozen=True)
class GroupLasso(SumOfNorms):
    """``lambda sum_g w_g ||u_g||_2``, which selects groups; ``w_g`` is ``sqrt(m_g)`` by default."""

    def singular_values(self, u: np.ndarray) -> np.ndarray:
        """The length, as the only one."""
        return np.array([np.linalg.norm(u)])

    def default_scale(self, shape: tuple[int, ...]) -> float:
        """``sqrt(m_g)`` (Yuan & Lin): groups of noise are then selected alike."""
        return float(np.sqrt(max(np.prod(shape), 1)))

    def norm(self, variable: Any) -> Any:
        """``||u_g||_2``."""
        import cvxpy as cp

        return cp.norm(variable, 2)

    def grow(self, v: Blocks, u: Blocks, weight: float, working: Working) -> bool:
        """Add the groups whose dual norm exceeds their weight."""
        bounds = [weight * w * (1 + ROUNDING) for w in self.weights()]
        over = [g for g, b in enumerate(bounds) if np.linalg.norm(v[g]) > b and g not in working]
        working.update(dict.fromkeys(over))
        return bool(over)

    def truncated(self, u: Blocks, ranks: Sequence[int]) -> list[np.ndarray]:
        """Groups of rank 0 set to zero."""
        return [block if r else np.zeros_like(block) for block, r in zip(u, ranks, strict=True)]


@typed
@dataclass(frozen=True)
class NuclearNorm(SumOfNorms):
    """``lambda sum_g w_g ||U_g||_*``, which selects a rank; ``w_g`` is 1 by default.

    A block is solved as a whole where ``p + q <= direct``. A larger one is solved among the
    matrices ``U A V'``, whose bases grow by the singular vectors of ``V_g`` that violate the dual
    constraint, until the certificate of the *whole* problem closes.

    Attributes:
        scales: ``w_g`` for each group.
        direct: the largest ``p + q`` of a semidefinite program.
        directions: by how many pairs of singular vectors a basis grows at once.
    """

    spectral: ClassVar[bool] = True

    direct: int = 32
    directions: int = 4

    def fitted(self, shapes: Sequence[tuple[int, ...]]) -> Penalty:
        """Only matrices have a rank."""
        for shape in shapes:
            if len(shape) != 2:
                raise InputError(
                    f"the nuclear norm needs matrices of controls, but a group has shape {shape}; "
                    "give features (examples, logits, p, q) or OuterProducts"
                )
        return super().fitted(shapes)

    def singular_values(self, u: np.ndarray) -> np.ndarray:
        """Those of the matrix."""
        return np.linalg.svd(u, compute_uv=False)

    def largest(self, v: np.ndarray) -> float:
        """``||V||_2`` by the Gram matrix, as accurate as by an SVD for the largest, and faster."""
        if not v.size:
            return 0.0
        return float(np.sqrt(max(np.linalg.eigvalsh(_gram(v))[-1], 0.0)))

    def default_scale(self, shape: tuple[int, ...]) -> float:
        """1."""
        return 1.0

    def norm(self, variable: Any) -> Any:
        """``||U_g||_*``."""
        import cvxpy as cp

        return cp.normNuc(variable)

    def grow(self, v: Blocks, u: Blocks, weight: float, working: Working) -> bool:
        """Add singular vectors whose singular value exceeds the weight.

        The basis is that of ``U_g``, of the directions that the last call added, and of the new
        ones: the best matrix so far stays in it, and the program stays small.
        """
        grown = False
        for g, w in enumerate(self.weights()):
            if g in working and working[g] is None:
                continue
            left, values, right = _leading(v[g], self.directions)
            over = int((values > weight * w * (1 + ROUNDING)).sum())
            if not over:
                continue
            grown = True
            if sum(v[g].shape) <= self.direct:
                working[g] = None
                continue
            new, old = (left[:, :over], right[:over].T), working.get(g)
            if old is None:
                working[g] = new
                continue
            inner, sizes, outer = np.linalg.svd(u[g], full_matrices=False)
            kept = sizes > 1e-9 * sizes.max(initial=0.0)
            working[g] = (
                _extended(inner[:, kept], old[0][:, -self.directions :], new[0]),
                _extended(outer[kept].T, old[1][:, -self.directions :], new[1]),
            )
        return grown

    def truncated(self, u: Blocks, ranks: Sequence[int]) -> list[np.ndarray]:
        """Without the smallest singular values (Eckart & Young)."""
        result = []
        for block, rank in zip(u, ranks, strict=True):
            if rank < min(block.shape):
                left, values, right = np.linalg.svd(block, full_matrices=False)
                block = (left[:, :rank] * values[:rank]) @ right[:rank]
            result.append(block)
        return result


def _gram(matrix: np.ndarray) -> np.ndarray:
    """``M M'`` or ``M'M``, the smaller."""
    wide = matrix.shape[0] <= matrix.shape[1]
    return matrix @ matrix.T if wide else matrix.T @ matrix


def _leading(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first singular triples ``(U, s, V')``, by the Gram matrix."""
    squares, vectors = np.linalg.eigh(_gram(matrix))
    values = np.sqrt(np.maximum(squares[::-1][:count], 0.0))
    kept = values > 1e-6 * values.max(initial=0.0)  # the Gram matrix knows no smaller ones
    values, vectors = values[kept], vectors[:, ::-1][:, :count][:, kept]
    if matrix.shape[0] <= matrix.shape[1]:
        return vectors, values, (vectors.T @ matrix) / values[:, None]
    return (matrix @ vectors) / values, values, vectors.T


def _extended(basis: np.ndarray, *more: np.ndarray) -> np.ndarray:
    """An orthonormal basis of all spans that starts with `basis`."""
    for vectors in more:
        rest = vectors
        for _ in range(2):  # twice is enough (Kahan)
            rest = rest - basis @ (basis.T @ rest)
        left, sizes, _ = np.linalg.svd(rest, full_matrices=False)
        room = len(basis) - basis.shape[1]
        basis = np.concatenate([basis, left[:, sizes > 1e-8][:, :room]], axis=1)
    return basis
