"""What a linearised model says after training in a few random directions, over all of them.

Rows ``Z`` ``(n, D)`` of a quadratic loss ``1/2 ||Z delta||^2 + s'Z delta`` (so ``H = Z'Z`` and
``g = Z's``), and rows ``T`` of other outputs, ``f + T delta``. Trained to the end in ``theta_0 + P
z``, ``P`` Gaussian with ``d`` columns, ``delta = -X g`` with ``X = P (P'HP)^-1 P'``. To leading
order, with ``A = (H + kappa I)^-1`` and ``tr HA = d``,

    E X = A,      E X M X = A M A + kappa tr(M A^2) / tr(H A^2) A^2

for every symmetric ``M``; the second follows from the first for ``H + t M`` by differentiation in
``t``. With ``M = gg'`` the outputs have

    mean        f - T A g
    covariance  kappa g'A^2 g / tr(H A^2)  T A^2 T'.

Only inner products of rows enter: ``ZZ'``, ``TZ'`` and ``TT'``.

Source: Derezinski, Liang, Liao & Mahoney, NeurIPS 2020, theorem 1 (the equivalent of ``X``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deltacontrol.theory.dimension.gaussian_width import QuadraticLoss
from deltacontrol.theory.errors import InputError

__all__ = ["LinearisedRows", "eliminate"]


@dataclass(frozen=True, eq=False)
class LinearisedRows:
    """Inner products of the rows of a loss and of other outputs.

    Attributes:
        kernel: ``ZZ'``, ``(n, n)``.
        residual: ``s``, ``(n,)``.
        outputs: ``f``, ``(m,)``.
        cross: ``TZ'``, ``(m, n)``.
        own: ``TT'``, ``(m, m)``.

    Raises:
        InputError: if the shapes do not fit.
    """

    kernel: Tensor
    residual: Tensor
    outputs: Tensor
    cross: Tensor
    own: Tensor

    def __post_init__(self) -> None:
        """Check the shapes; everything is float64 from here on."""
        n, m = len(self.residual), len(self.outputs)
        expected = {"kernel": (n, n), "cross": (m, n), "own": (m, m)}
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise InputError(
                    f"{name} has shape {tuple(getattr(self, name).shape)}; expected {shape} for "
                    f"{n} entries of the residual and {m} outputs"
                )
        for name in self.__dataclass_fields__:
            object.__setattr__(self, name, getattr(self, name).double())

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.kernel)
        return values.clamp_min(0), vectors

    @cached_property
    def loss(self) -> QuadraticLoss:
        """The loss as `dimension.gaussian_width` takes it: ``g_i^2 = lambda_i (u_i's)^2``."""
        values, vectors = self._spectrum
        weights = values * (vectors.mT @ self.residual).square()
        return QuadraticLoss(values, torch.ones_like(values), values, weights)

    def dual(self, kappa: float) -> Tensor:
        """``w`` with ``E delta = -Z'w``, that is ``(ZZ' + kappa I)^-1 s``, ``(n,)``."""
        values, vectors = self._spectrum
        return vectors @ ((vectors.mT @ self.residual) / (values + kappa))

    def trained(self, kappa: float) -> tuple[Tensor, Tensor]:
        """Mean ``(m,)`` and covariance ``(m, m)`` of the outputs over subspaces.

        Args:
            kappa: of the dimension, from `QuadraticLoss.kappa`; infinite for dimension 0.
        """
        if kappa == math.inf:
            return self.outputs, torch.zeros_like(self.own)
        values, vectors = self._spectrum
        mean = self.outputs - self.cross @ self.dual(kappa)
        # A = (I - Z' (ZZ' + kappa)^-1 Z) / kappa turns T A^2 T' into inner products of rows.
        rows = self.cross @ vectors
        shares = 1 / (values + kappa)
        inner = (rows * (2 * shares - values * shares.square())) @ rows.mT
        spread = (self.own - inner) / kappa**2
        weights = values * (vectors.mT @ self.residual).square()
        factor = kappa * (weights * shares.square()).sum() / (values * shares.square()).sum()
        return mean, factor * spread


def eliminate(rows: LinearisedRows, free: LinearisedRows) -> LinearisedRows:
    """The problem that is left when further parameters are trained without restriction.

    With ``Y`` and ``S`` the rows of these parameters, they answer ``delta`` by the minimiser, so
    that ``Z`` becomes ``Pi Z``, ``T`` becomes ``T - S Y^+ Z``, ``s`` becomes ``Pi s`` and ``f``
    becomes ``f - S Y^+ s``, ``Pi`` the projection on the complement of ``Y``'s range.

    Args:
        rows: of the parameters that are restricted to a subspace.
        free: of the others; its residual and outputs are not looked at.
    """
    values, vectors = torch.linalg.eigh(free.kernel)
    kept = values > len(values) * 1e-12 * values.max().clamp_min(1e-300)
    frame, inverse = vectors[:, kept], 1 / values[kept]
    project = torch.eye(len(values), dtype=values.dtype) - frame @ frame.mT
    answer = free.cross @ (frame * inverse) @ frame.mT
    cross = rows.cross - answer @ rows.kernel
    own = rows.own - answer @ rows.cross.mT - rows.cross @ answer.mT
    return LinearisedRows(
        project @ rows.kernel @ project,
        project @ rows.residual,
        rows.outputs - answer @ rows.residual,
        cross @ project,
        own + answer @ rows.kernel @ answer.mT,
    )
