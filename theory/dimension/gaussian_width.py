"""How many random directions a quadratic loss needs: the escape threshold, without training.

A loss ``L = L_min + 1/2 (theta - theta*)' H (theta - theta*)`` starts at ``theta_0``; eigenvalue
``lambda_i`` of ``H``, gradient ``g_i = lambda_i (theta_0 - theta*)_i``. In a random subspace
``theta_0 + P z``, ``z`` in ``R^d``, ``P`` Gaussian, training ends where ridge regression would:
with ``kappa`` such that ``sum_i lambda_i / (lambda_i + kappa) = d``,

    L_0 - min_z L(theta_0 + P z)  ~  1/2 g' (H + kappa I)^-1 g.

So a fall of ``F`` needs the dimension, for the ``kappa`` at which ``1/2 g'(H + kappa I)^-1 g = F``,

    d* = sum_i lambda_i / (lambda_i + kappa),        the effective dimension of ``H`` at ``kappa``,

and the share of subspaces that reach it is ``Phi((d - d*) / s)`` with

    s^2 = 2 sum_i lambda_i kappa / (lambda_i + kappa)^2.

Both are the leading order in ``D`` of the statistical dimension of the cone that the sublevel set
spans at ``theta_0``, and of the variance of its intrinsic volumes; the notebook of claim 16 derives
them, and an error of order one in ``d*`` remains.

The published threshold, ``d = D - sum_i r_i^2/(R^2 + r_i^2)`` with ``r_i^2 = 2 eps/lambda_i`` and
``R = ||theta_0 - theta*||``, is the same formula at ``kappa = 2 eps/R^2``, where ``eps = L_min``'s
distance from the target. It takes all of ``R`` to lie in stiff directions, hence is an upper bound.

Sources: Larsen, Fort, Becker & Ganguli, *How many degrees of freedom do neural networks need?*,
ICLR 2022, theorem 3.1 and section 3.3; Gordon, 1988 (escape through a mesh); Amelunxen, Lotz,
McCoy & Tropp, *Living on the edge*, Information and Inference 3(3), 2014, theorem I and
proposition 10.2; Derezinski, Liang, Liao & Mahoney, NeurIPS 2020 (the equivalent of projections).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.krylov import Quadrature, SpectralDensity

__all__ = ["EscapeThreshold", "QuadraticLoss", "published_threshold"]


@dataclass(frozen=True)
class EscapeThreshold:
    """When random subspaces reach a target loss.

    Attributes:
        dimension: ``d*``, at which half of them do.
        width: ``s``, the standard deviation of the threshold over subspaces.
        kappa: the ridge penalty that training in ``d*`` random directions amounts to.
        standard_error: of ``d*``, from the probes of an estimated spectrum; 0 for a known one.
    """

    dimension: float
    width: float
    kappa: float
    standard_error: float = 0.0

    def probability(self, d: float) -> float:
        """The share of subspaces of dimension ``d`` that reach the target."""
        return float(norm.cdf((d - self.dimension) / self.width))

    def quantile(self, p: float) -> float:
        """The dimension at which a share ``p`` of the subspaces reaches it."""
        return self.dimension + self.width * float(norm.ppf(p))


@dataclass(frozen=True, eq=False)
class QuadraticLoss:
    """All that the threshold depends on: two measures over the eigenvalues of ``H``.

    Attributes:
        values: eigenvalues, ``(n,)``; zero ones may be left out.
        counts: how often each occurs, ``(n,)``.
        gradient_values: eigenvalues again, ``(m,)``: the nodes of the gradient's measure.
        gradient_weights: ``g_i^2``, ``(m,)``.
        density: the estimate that `values` came from, for standard errors.

    Raises:
        InputError: if shapes do not fit, a weight is negative, or the gradient is zero.
    """

    values: Tensor
    counts: Tensor
    gradient_values: Tensor
    gradient_weights: Tensor
    density: SpectralDensity | None = None

    def __post_init__(self) -> None:
        """Check the measures; rounding's negative eigenvalues become zero."""
        pairs = {"eigenvalues": (self.values, self.counts)}
        pairs["gradient"] = (self.gradient_values, self.gradient_weights)
        for name, (nodes, weights) in pairs.items():
            if nodes.ndim != 1 or nodes.shape != weights.shape:
                raise InputError(
                    f"{name}: shapes {tuple(nodes.shape)} and {tuple(weights.shape)}; expected two "
                    "vectors of one length"
                )
            if bool((weights < 0).any()):
                raise InputError(f"{name}: a weight is negative, {float(weights.min()):.3g}")
        for name in ("values", "gradient_values"):
            object.__setattr__(self, name, getattr(self, name).double().clamp_min(0))
        curved = self.gradient_values > 1e-14 * self.values.max()
        weights = torch.where(curved, self.gradient_weights.double(), 0.0)
        object.__setattr__(self, "counts", self.counts.double())
        object.__setattr__(self, "gradient_weights", weights)
        if not bool((weights > 0).any()):
            raise InputError("the gradient is zero in all curved directions: nothing to reach")

    @classmethod
    def exact(cls, values: Tensor, displacement: Tensor) -> QuadraticLoss:
        """From all eigenvalues and ``theta_0 - theta*`` in the eigenbasis, ``(D,)`` both."""
        gradient = (values * displacement).square()
        return cls(values, torch.ones_like(values), values, gradient)

    @classmethod
    def estimated(cls, density: SpectralDensity, gradient: Quadrature) -> QuadraticLoss:
        """From Lanczos: the density of ``H`` and the rule that started from the gradient."""
        nodes, counts = density.measure()
        return cls(nodes, counts, gradient.nodes[0], gradient.weights[0], density)

    @property
    def largest_fall(self) -> float:
        """``L_0 - L_min = 1/2 g' H^+ g``."""
        return self.fall(0.0)

    def fall(self, kappa: float) -> float:
        """``1/2 g' (H + kappa I)^-1 g``."""
        shares = torch.where(
            self.gradient_weights > 0,
            self.gradient_weights / (self.gradient_values + kappa),
            0.0,
        )
        return 0.5 * float(shares.sum())

    def effective_dimension(self, kappa: float) -> float:
        """``sum_i lambda_i/(lambda_i + kappa)``."""
        return float((self.counts * self.values / (self.values + kappa)).sum())

    def kappa(self, dimension: float) -> float:
        """The penalty that ``dimension`` random directions amount to.

        Raises:
            InputError: unless the dimension is positive and below the rank of ``H``.
        """
        rank = float(self.counts[self.values > 0].sum())
        if not 0 < dimension < rank:
            raise InputError(f"dimension is {dimension}; expected between 0 and the rank {rank:g}")
        return _root(lambda k: self.effective_dimension(k) - dimension, self._scale)

    def expected_fall(self, dimension: float) -> float:
        """What training in ``dimension`` random directions gains."""
        return self.fall(self.kappa(dimension))

    def threshold(self, fall: float) -> EscapeThreshold:
        """``d*`` for a fall of the loss.

        Raises:
            InputError: unless ``0 < fall < largest_fall``.
        """
        if not 0 < fall < self.largest_fall:
            raise InputError(
                f"a fall of {fall:.4g} was asked for; this quadratic loss falls by "
                f"{self.largest_fall:.4g} at most. Choose a target between."
            )
        kappa = _root(lambda k: self.fall(k) - fall, self._scale)
        shares = self.values / (self.values + kappa)
        width = math.sqrt(2 * float((self.counts * shares * (1 - shares)).sum()))
        error = 0.0
        if self.density is not None:
            error = self.density.effective_dimension(kappa).standard_error
        return EscapeThreshold(self.effective_dimension(kappa), width, kappa, error)

    @property
    def _scale(self) -> float:
        return float(self.values.max())


@typed
def published_threshold(values: Tensor, displacement: Tensor, target: float) -> float:
    """``D - sum_i r_i^2/(R^2 + r_i^2)``, ``r_i^2 = 2 eps/lambda_i``: Larsen et al., section 3.3.

    Args:
        values: all eigenvalues of ``H``, ``(D,)``.
        displacement: ``theta_0 - theta*``, in any basis, ``(D,)``.
        target: ``eps``, the target loss above the minimum.

    Raises:
        InputError: the shapes differ, a number is not finite, an eigenvalue is negative, the
            displacement is zero or the target is not positive.
    """
    finite = bool(values.isfinite().all()) and bool(displacement.isfinite().all())
    size = float(displacement.square().sum())
    if values.shape != displacement.shape or not finite or bool((values < 0).any()) or not size:
        raise InputError(
            f"expected eigenvalues >= 0 and a displacement of one shape, finite and not zero; got "
            f"shapes {tuple(values.shape)} and {tuple(displacement.shape)}"
        )
    if not 0 < target < math.inf:
        raise InputError(f"target is {target}; expected a finite loss above 0")
    kappa = 2 * target / size
    return float((values / (values + kappa)).sum())


def _root(falling: Callable[[float], float], scale: float) -> float:
    """Where a falling function of ``kappa > 0`` is zero, to rounding."""
    low = high = scale
    while falling(high) > 0:
        high *= 16
    while falling(low) < 0 and low > 1e-300:
        low /= 16
    root = brentq(lambda t: falling(math.exp(t)), math.log(low), math.log(high), xtol=1e-13)
    return math.exp(float(root))  # pyright: ignore[reportArgumentType]
