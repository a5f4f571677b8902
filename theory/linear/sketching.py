"""Randomised spectra and traces of a symmetric positive semidefinite operator.

The operator ``W`` is known by its products with blocks of vectors. Random numbers come from a seed
alone.

Sources: Halko, Martinsson & Tropp, SIAM Review 53(2), 2011 (algorithms 4.4 and 5.3, lemma 4.1);
Meyer, Musco, Musco & Woodruff, *Hutch++*, SOSA 2021 (algorithm 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.operator import SymmetricOperator

__all__ = ["Spectrum", "TraceEstimate", "hutchpp", "leading_spectrum"]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Leading eigenpairs of ``W`` and how far to trust them.

    Attributes:
        values: Ritz values, falling, ``(k,)``; none is above the eigenvalue of its rank.
        vectors: orthonormal Ritz vectors, ``(k, n)``, one a row.
        residuals: ``||W v_j - theta_j v_j||``; an eigenvalue lies within it of ``theta_j``.
        missed: a bound of ``||W - Q Q' W||``, ``Q`` the whole subspace, that fails with
            probability ``10^-probes`` (Halko et al., lemma 4.1); the largest eigenvalue that the
            subspace leaves out is not above it.
        num_products: products with ``W`` that were computed.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    missed: float
    num_products: int


@typed
def leading_spectrum(
    W: SymmetricOperator,
    num_values: int,
    *,
    oversampling: int = 8,
    iterations: int = 2,
    probes: int = 5,
    seed: int = 0,
) -> Spectrum:
    """The ``num_values`` largest eigenvalues by subspace iteration and Rayleigh-Ritz.

    With ``b = num_values + oversampling`` vectors and ``q`` iterations the error of the j-th
    eigenvalue falls as ``(lambda_{b+1} / lambda_j)^(2 q + 2)``.

    Args:
        W: ``(n, n)``, positive semidefinite; the vectors have its dtype and device.
        num_values: how many eigenvalues.
        oversampling: further vectors in the block.
        iterations: ``q``, products with ``W`` after the first.
        probes: Gaussian vectors that estimate what the subspace missed.
        seed: of the random vectors.

    Raises:
        InputError: if a number is out of range.
    """
    size = W.shape[0]
    if not 1 <= num_values <= size:
        raise InputError(f"num_values is {num_values}; expected 1 to {size}, the size of W")
    if min(oversampling, iterations) < 0 or probes < 1:
        raise InputError(
            f"oversampling is {oversampling}, iterations {iterations} and probes {probes}; expected"
            " at least 0, 0 and 1"
        )
    width = min(num_values + oversampling, size)
    draw = _gaussian(seed, W.dtype, W.device)
    basis = _orthonormal(draw(width, size) @ W)
    for _ in range(iterations):
        basis = _orthonormal(basis @ W)
    image = basis @ W
    small = basis @ image.mT
    values, rotation = torch.linalg.eigh(0.5 * (small + small.mT))
    values, rotation = values.flip(0)[:num_values], rotation.flip(1)[:, :num_values]
    vectors = rotation.mT @ basis
    residuals = (rotation.mT @ image - values[:, None] * vectors).norm(dim=1)
    outside = _project_out(basis, draw(probes, size) @ W)
    missed = 10 * math.sqrt(2 / math.pi) * float(outside.norm(dim=1).max())
    products = width * (iterations + 2) + probes
    return Spectrum(values.clamp_min(0), vectors, residuals, missed, products)


@dataclass(frozen=True)
class TraceEstimate:
    """An estimate of ``tr W``.

    Attributes:
        value: the estimate, unbiased.
        standard_error: of the value, from the scatter of its random part; 0 where it is exact.
        num_products: products with ``W`` that were computed.
    """

    value: float
    standard_error: float
    num_products: int


@typed
def hutchpp(W: SymmetricOperator, num_products: int, *, seed: int = 0) -> TraceEstimate:
    """``tr W`` by Hutch++: exact on a sketched subspace, Hutchinson's estimate on the rest.

    The standard deviation falls as ``1/num_products`` for every positive semidefinite ``W``, and
    the estimate is exact where the rank of ``W`` is at most a third of ``num_products``.

    Args:
        W: ``(n, n)``, positive semidefinite; the vectors have its dtype and device.
        num_products: how many products with ``W`` to spend; ``n`` or more give the exact trace.
        seed: of the random signs.

    Raises:
        InputError: if fewer than 6 products are allowed where ``n`` is larger.
    """
    size, dtype, device = W.shape[0], W.dtype, W.device
    if num_products >= size:
        eye = torch.eye(size, dtype=dtype, device=device)
        return TraceEstimate(float((eye * (eye @ W)).sum()), 0.0, size)
    if num_products < 6:
        raise InputError(f"num_products is {num_products}; Hutch++ needs at least 6")
    third = num_products // 3
    draw = _gaussian(seed, dtype, device)
    basis = _orthonormal(draw(third, size).sign() @ W)
    known = float((basis * (basis @ W)).sum())
    signs = _project_out(basis, draw(third, size).sign())
    samples = (signs * (signs @ W)).sum(1)
    error = float(samples.std() / math.sqrt(third))
    return TraceEstimate(known + float(samples.mean()), error, 3 * third)


def _gaussian(
    seed: int, dtype: torch.dtype, device: torch.device | str
) -> Callable[[int, int], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        # Drawn in float64 on the CPU, so that precision and device do not change the numbers.
        values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        return values.to(device, dtype)

    return draw


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.mT)[0].mT


def _project_out(basis: Tensor, rows: Tensor) -> Tensor:
    # Twice: one pass leaves a part of the size of rounding times the part that is removed.
    for _ in range(2):
        rows = rows - rows @ basis.mT @ basis
    return rows
