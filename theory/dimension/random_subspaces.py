"""The dimension at which random subspaces really reach a target, by exact solves.

A quadratic loss with Hessian ``H`` and gradient ``g`` at ``theta_0`` falls in the subspace
``theta_0 + P z`` by ``1/2 ||Q' H^{-1/2} g||^2``, ``Q R = H^{1/2} P`` with orthonormal ``Q``.
Subspaces are nested, the first ``d`` columns of one Gaussian ``P``, and so are the spans of ``Q``:
with ``y = Q' H^{-1/2} g`` the fall in the first ``d`` is ``1/2 sum_{j <= d} y_j^2``. One
factorisation gives the smallest ``d`` of a draw, and many draws the success curve.

Only ``H^{1/2} P`` enters, so that flat directions of ``H`` need not be drawn.

Source: Li, Farkhoor, Liu & Yosinski, ICLR 2018, section 2 (training in random subspaces).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import binom
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError

__all__ = ["MeasuredThreshold", "falls", "measured_threshold"]


@typed
def falls(values: Tensor, gradient: Tensor, dimension: int, seed: int) -> Tensor:
    """The fall of the loss in ``1, 2, ..., dimension`` random directions, ``(dimension,)``.

    Args:
        values: the positive eigenvalues of ``H``, ``(n,)``.
        gradient: ``g`` in the eigenbasis, ``(n,)``.
        dimension: of the largest subspace, at most ``n``.
        seed: of ``P``.

    Raises:
        InputError: if an eigenvalue is not positive, or the dimension is out of range.
    """
    n = len(values)
    if not bool((values > 0).all()):
        raise InputError("an eigenvalue is not positive; leave flat directions out")
    if not 1 <= dimension <= n:
        raise InputError(f"dimension is {dimension}; expected 1 to {n}, the rank of H")
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(n, dimension, generator=generator, dtype=torch.float64)
    roots = values.double().sqrt()
    # A Cholesky factor of P'HP gives the same y with the condition squared.
    frame, upper = torch.linalg.qr(roots[:, None] * gaussian)
    y = frame.mT @ (gradient.double() / roots)
    if not bool((upper.diagonal().abs() > 0).all()):
        raise InputError("the projected Hessian is singular; ask for a smaller dimension")
    return 0.5 * y.square().cumsum(0)


@dataclass(frozen=True)
class MeasuredThreshold:
    """The dimensions at which draws of nested random subspaces first reached the target.

    Attributes:
        dimensions: one for each draw, rising; inf where the largest subspace did not reach it.
    """

    dimensions: tuple[float, ...]

    @property
    def median(self) -> float:
        """The dimension at which half of the subspaces reach the target."""
        count = len(self.dimensions)
        low, high = self.dimensions[(count - 1) // 2], self.dimensions[count // 2]
        return 0.5 * (low + high)

    def share(self, d: float) -> float:
        """The share of subspaces of dimension ``d`` that reach it."""
        return sum(found <= d for found in self.dimensions) / len(self.dimensions)

    def interval(self, coverage: float = 0.95) -> tuple[float, float]:
        """Of the median, from order statistics: no assumption about the distribution.

        ``[x_(k+1), x_(n-k)]`` covers it with probability ``1 - 2 P(Binomial(n, 1/2) <= k)``; the
        largest ``k`` that keeps the coverage is taken, and 0 where there are too few draws.
        """
        count, k = len(self.dimensions), 0
        while 2 * binom.cdf(k + 1, count, 0.5) <= 1 - coverage:
            k += 1
        return self.dimensions[k], self.dimensions[count - k - 1]


@typed
def measured_threshold(
    values: Tensor, gradient: Tensor, fall: float, dimension: int, seeds: Sequence[int]
) -> MeasuredThreshold:
    """First dimensions whose fall is at least ``fall``, one draw for each seed."""
    found = []
    for seed in seeds:
        reached = falls(values, gradient, dimension, seed) >= fall
        first = int(reached.to(torch.int8).argmax()) + 1 if bool(reached.any()) else float("inf")
        found.append(float(first))
    return MeasuredThreshold(tuple(sorted(found)))
