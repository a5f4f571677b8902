"""How far a matrix is from low rank: spectra, tails, stable ranks, angles between subspaces.

``W`` is ``(m, n)`` with singular values ``s_1 >= s_2 >= ...``; `tail_energy`, `stable_rank` and
`participation_ratio` take the values, so that one decomposition serves them all.

    min over rank(M) <= r of ||W - M||_F^2 = sum_{i > r} s_i^2        (Eckart & Young, 1936)

Everything is computed in float64, whatever the dtype of the argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError

__all__ = [
    "numerical_rank",
    "participation_ratio",
    "principal_angles",
    "singular_values",
    "stable_rank",
    "subspace_overlap",
    "tail_energy",
    "truncated",
]


@typed
def singular_values(matrix: Tensor) -> Tensor:
    """The singular values, largest first, ``(min(m, n),)``.

    Raises:
        InputError: unless the argument is one matrix of finite numbers.
    """
    return torch.linalg.svdvals(_checked(matrix))


@typed
def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of rank at most ``r``, in the dtype of the argument.

    Raises:
        InputError: as `singular_values`; a negative rank.
    """
    if rank < 0:
        raise InputError(f"rank is {rank}; expected a whole number >= 0")
    left, values, right = torch.linalg.svd(_checked(matrix), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).to(matrix.dtype)


@typed
def tail_energy(values: Tensor) -> Tensor:
    """``sum_{i > r} s_i^2`` for ``r = 0, ..., k``, from the ``k`` singular values, ``(k + 1,)``.

    Entry 0 is ``||W||_F^2`` and the last one 0. Summed from the small end, so that tails many
    orders below the whole keep their digits.

    Example:
        >>> tail_energy(torch.tensor([3.0, 2.0, 1.0])).tolist()
        [14.0, 5.0, 1.0, 0.0]
    """
    squares = _values(values).square()
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])


@typed
def stable_rank(values: Tensor) -> float:
    """``||W||_F^2 / ||W||_2^2``: between 1 and the rank, and steady under small changes.

    Source: Rudelson & Vershynin, J. ACM 2007, section 1.1 ("numerical rank" there).

    Raises:
        InputError: all values are zero.
    """
    squares = _nonzero(values).square()
    return float(squares.sum() / squares.max())


@typed
def participation_ratio(values: Tensor) -> float:
    """``(sum s_i^2)^2 / sum s_i^4``: the number of directions that share the energy equally.

    Raises:
        InputError: all values are zero.
    """
    squares = (_nonzero(values) / values.max()).square()
    return float(squares.sum().square() / squares.square().sum())


@typed
def numerical_rank(values: Tensor, shape: tuple[int, int], eps: float) -> int:
    """The number of values above ``max(m, n) eps s_1``, what rounding to ``eps`` can leave.

    Args:
        values: the singular values.
        shape: ``(m, n)``.
        eps: relative accuracy of the entries, such as ``torch.finfo(dtype).eps``.

    Raises:
        InputError: a size below one, or no singular values.
    """
    if min(shape) < 1:
        raise InputError(f"shape is {tuple(shape)}; expected the two sizes of a matrix, 1 or more")
    values = _values(values)
    return int((values > max(shape) * eps * values.max()).sum()) if values.max() > 0 else 0


@typed
def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between the ranges of two matrices ``(n, k)`` and ``(n, l)``, smallest first.

    ``min(k, l)`` angles in ``[0, pi/2]``. Cosines lose angles below 1e-8; those below 45 degrees
    come from sines instead (Björck & Golub, Math. Comp. 1973, algorithm of section 3).

    Raises:
        InputError: the matrices have different numbers of rows or linearly dependent columns.
    """
    one, two = _frame(first, second)
    if one.shape[1] < two.shape[1]:
        one, two = two, one
    cosines = torch.linalg.svdvals(one.mT @ two)
    sines = torch.linalg.svdvals(two - one @ (one.mT @ two)).flip(0)
    by_cosine = torch.arccos(cosines.clamp(0, 1))
    by_sine = torch.arcsin(sines.clamp(0, 1))
    return torch.where(cosines.square() >= 0.5, by_sine, by_cosine)


@typed
def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """Mean squared cosine of the principal angles: 1 if one range holds the other, 0 if orthogonal.

    For a random ``k``-dimensional subspace of ``R^n`` against a fixed ``l``-dimensional one the
    mean is ``max(k, l)/n``. Source: Hu et al., ICLR 2022, equation (4).

    Raises:
        InputError: as `principal_angles`.
    """
    one, two = _frame(first, second)
    return float((one.mT @ two).square().sum() / min(one.shape[1], two.shape[1]))


def _frame(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of both ranges."""
    one, two = _checked(first), _checked(second)
    if len(one) != len(two):
        raise InputError(
            f"subspaces of R^{len(one)} and R^{len(two)} have no angles between them; expected "
            "matrices with equally many rows"
        )
    frames = []
    for matrix in (one, two):
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        rank = numerical_rank(values, (matrix.shape[0], matrix.shape[1]), 2.3e-16)
        if rank < matrix.shape[1]:
            raise InputError(
                f"the {matrix.shape[1]} columns span only {rank} dimensions; give a basis"
            )
        frames.append(left)
    return frames[0], frames[1]


def _checked(matrix: Tensor) -> Tensor:
    if matrix.ndim != 2 or not matrix.numel():
        raise InputError(f"expected a matrix (m, n), got shape {tuple(matrix.shape)}")
    if not matrix.isfinite().all():
        raise InputError("the matrix has entries that are not finite")
    return matrix.detach().double()


def _values(values: Tensor) -> Tensor:
    if values.ndim != 1 or not len(values) or not (values >= 0).all():
        raise InputError(
            f"expected singular values (k,), none negative; got shape {tuple(values.shape)}"
        )
    return values.detach().double().sort(descending=True).values


def _nonzero(values: Tensor) -> Tensor:
    values = _values(values)
    if not values.max() > 0:
        raise InputError("a zero matrix has no stable rank: the ratio is 0/0")
    return values
