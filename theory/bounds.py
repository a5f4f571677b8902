"""Bounds on the error of a classifier over a distribution, from the rows that it was trained on.

q is the share of errors among n rows, e the error over the distribution that they come from, kl the
divergence of two coins. Each statement holds with probability at least 1 - δ over the rows, for all
hypotheses h, or all posteriors Q, at once; the prior P must be fixed before the rows are seen.

    countable class     kl(q(h)‖e(h))  <= (ln 1/P(h) + ln 1/δ) / n              for e(h) >= q(h)
    PAC-Bayes           kl(q(Q)‖e(Q))  <= (KL(Q‖P) + ln ξ(n)/δ) / n             means over Q
    m draws of Q        kl(q_m ‖q(Q))  <= ln(1/δ) / m                           for q(Q) >= q_m

with ξ(n) = Σ_k C(n,k) (k/n)^k (1-k/n)^(n-k), which lies between √n and 2√n. The first two hold for
rows that are drawn without replacement as well, with e the error over the whole population: both
rest on the expectation of a convex function of q (Hoeffding, JASA 1963, theorem 4).

A hypothesis of the first kind is a vector whose entries are rounded to a few levels; -ln P is the
length of its code in nats, and one bit is ln 2 nats. Logarithms are natural.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaln, rel_entr, xlogy
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError

__all__ = [
    "Quantised",
    "binary_kl",
    "code_length",
    "countable_class_bound",
    "gaussian_kl",
    "kl_inverse",
    "maurer_constant",
    "monte_carlo_bound",
    "pac_bayes_bound",
    "quantise",
]

SCALES = range(-96, 32)  # a scale is 2^(i/4): 128 of them, coded as equally likely
ROUNDING = 1e-12
MOST_LEVELS = 2**24
MOST_ROWS = 2**27  # `maurer_constant` has as many terms


@typed
def binary_kl(q: float, p: float) -> float:
    """kl(q‖p) = q ln(q/p) + (1-q) ln((1-q)/(1-p)), infinite where p rules out what q allows.

    Raises:
        InputError: an argument is no probability.
    """
    _probability("q", q)
    _probability("p", p)
    return float(rel_entr(q, p) + rel_entr(1 - q, 1 - p))


@typed
def kl_inverse(q: float, divergence: float) -> float:
    """The largest p with kl(q‖p) <= c, rounded up.

    Source: Seeger, JMLR 2002, theorem 1 and its inversion; Langford, JMLR 2005, section 3.

    Args:
        q: observed share.
        divergence: c, in nats.

    Raises:
        InputError: q is no probability, or c is negative or not a number.

    Example:
        >>> f"{kl_inverse(0.0, 0.1):.9f}", f"{1 - math.exp(-0.1):.9f}"
        ('0.095162582', '0.095162582')
    """
    _probability("q", q)
    if not divergence >= 0:
        raise InputError(f"divergence is {divergence}; expected nats >= 0")
    if q == 1 or math.isinf(divergence):
        return 1.0
    top = 1 - math.ulp(1.0)
    if binary_kl(q, top) <= divergence:
        return 1.0
    root: float = brentq(lambda p: binary_kl(q, p) - divergence, q, top, xtol=1e-15)  # type: ignore[assignment]
    return min(1.0, root + ROUNDING)


@typed
def countable_class_bound(q: float, code: float, n: int, delta: float) -> float:
    """The error that exceeds the truth with probability at most δ, for every h of a code.

    kl(q‖e) <= (code + ln 1/δ)/n, by Chernoff's bound for each h at level δ P(h). 1 is vacuous.

    Source: Langford, JMLR 2005, corollary 4.5 (Occam's razor, relative entropy); Lotfi et al.,
    NeurIPS 2022, section 4, for codes of subspace coefficients.

    Args:
        q: share of errors among the rows.
        code: -ln P(h), in nats.
        n: number of rows.
        delta: δ.

    Raises:
        InputError: an argument is out of its range.
    """
    _check(n, delta)
    if not code >= 0:
        raise InputError(f"code is {code} nats; expected a length >= 0, as P(h) <= 1")
    return kl_inverse(q, (code - math.log(delta)) / n)


@typed
def maurer_constant(n: int) -> float:
    """ξ(n) = Σ_k C(n,k) (k/n)^k (1-k/n)^(n-k), the mean of exp(n kl(q‖e)), at most.

    Source: Maurer, arXiv cs/0411099, theorem 1.
    """
    _check(n, 0.5)
    if n > MOST_ROWS:
        raise InputError(f"n is {n}; expected at most {MOST_ROWS} rows")
    k = np.arange(n + 1)
    logs = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    logs += xlogy(k, k / n) + xlogy(n - k, (n - k) / n)
    return float(np.exp(logs).sum())


@typed
def pac_bayes_bound(q: float, divergence: float, n: int, delta: float) -> float:
    """The mean error over Q that is exceeded with probability at most δ, for every Q at once.

    Source: Seeger, JMLR 2002, theorem 1, with the constant of Maurer, arXiv cs/0411099, theorem 5.

    Args:
        q: mean over Q of the share of errors among the rows, or an upper bound of it.
        divergence: KL(Q‖P), in nats.
        n: number of rows.
        delta: δ.

    Raises:
        InputError: an argument is out of its range.
    """
    _check(n, delta)
    if not divergence >= 0:
        raise InputError(f"divergence is {divergence}; expected nats >= 0")
    return kl_inverse(q, (divergence + math.log(maurer_constant(n) / delta)) / n)


@typed
def monte_carlo_bound(mean: float, draws: int, delta: float) -> float:
    """Upper bound of an expectation in [0, 1] from the mean of so many independent draws.

    The draws need not have the same distribution; then the bound is of their mean expectation
    (Hoeffding, JASA 1963, theorem 1).

    Source: Langford & Caruana, NIPS 2001, section 2 (with 2/δ there, for both sides).
    """
    _check(draws, delta)
    return kl_inverse(mean, -math.log(delta) / draws)


@typed
def gaussian_kl(mean: Tensor, posterior_deviation: float, prior_deviation: float) -> float:
    """KL(N(z, σ²I)‖N(0, τ²I)) = d/2 (ρ - 1 - ln ρ) + ‖z‖²/2τ², ρ = σ²/τ², in nats.

    Args:
        mean: z, (d,).
        posterior_deviation: σ.
        prior_deviation: τ.

    Raises:
        InputError: a deviation that is not positive.
    """
    if not (posterior_deviation > 0 and prior_deviation > 0):
        raise InputError(
            f"deviations are {posterior_deviation} and {prior_deviation}; expected positive ones"
        )
    ratio = (posterior_deviation / prior_deviation) ** 2
    if not (0 < ratio < math.inf and prior_deviation**2 > 0):
        raise InputError(
            f"deviations are {posterior_deviation} and {prior_deviation}; the squares of them and "
            "of their ratio have to be floats above 0: scale all lengths alike"
        )
    spread = mean.numel() / 2 * (ratio - 1 - math.log(ratio))
    return spread + float(mean.double().square().sum()) / (2 * prior_deviation**2)


@dataclass(frozen=True, eq=False)
class Quantised:
    """A vector rounded to equally spaced levels, -scale to scale.

    Attributes:
        vector: (d,), in the dtype of the original.
        levels: L, how many there are.
        scale: the largest of them, 2^(i/4) for an i of `SCALES`.
        code: -ln P of the levels and the scale, in nats; d and L are taken as known.
    """

    vector: Tensor
    levels: int
    scale: float
    code: float


@typed
def quantise(vector: Tensor, levels: int) -> Quantised:
    """Round to the nearest of L levels, with the scale of least squared error; larger ones clip.

    Raises:
        InputError: fewer than two levels, no vector, or entries that are not finite.
    """
    if not 2 <= levels <= MOST_LEVELS:
        raise InputError(f"levels is {levels}; expected a number from 2 to {MOST_LEVELS}")
    if vector.ndim != 1 or not vector.numel() or not vector.isfinite().all():
        raise InputError(
            f"expected a vector (d,) of finite numbers, got shape {tuple(vector.shape)}"
        )
    exact = vector.detach().double()
    best: tuple[float, Tensor, float] | None = None
    for exponent in SCALES:
        scale = 2.0 ** (exponent / 4)
        step = 2 * scale / (levels - 1)
        indices = ((exact + scale) / step).round().clamp(0, levels - 1)
        error = float((indices * step - scale - exact).square().sum())
        if best is None or error < best[0]:
            best = (error, indices, scale)
    assert best is not None
    _, indices, scale = best
    rounded = indices * (2 * scale / (levels - 1)) - scale
    code = code_length(indices.long(), levels) + math.log(len(SCALES))
    return Quantised(rounded.to(vector.dtype), levels, scale, code)


@typed
def code_length(indices: Tensor, levels: int) -> float:
    """-ln P of a sequence of levels under the mixture of all coins with L sides.

        P = Γ(L/2)/Γ(d + L/2) · Π_l Γ(n_l + 1/2)/Γ(1/2),    n_l the count of level l

    The probabilities of all sequences of length d sum to one, so that an arithmetic coder that
    learns the shares as it goes needs this many nats, and at most two bits more.

    Source: Krichevsky & Trofimov, IEEE Trans. Inf. Theory 1981.

    Raises:
        InputError: an index is not among 0, …, L - 1.
    """
    if indices.is_floating_point() or str(indices.dtype) == "torch.bool":
        raise InputError(f"the indices are {indices.dtype}; expected whole numbers, such as int64")
    if not 1 <= levels <= MOST_LEVELS:
        raise InputError(f"levels is {levels}; expected a number from 1 to {MOST_LEVELS}")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < levels:
        raise InputError(
            f"indices must lie between 0 and {levels - 1}, the last of {levels} levels"
        )
    counts = np.bincount(indices.flatten().cpu().numpy(), minlength=levels)
    total = gammaln(levels / 2) - gammaln(counts.sum() + levels / 2)
    return float(-(total + (gammaln(counts + 0.5) - gammaln(0.5)).sum()))


def _probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{name} is {value}; expected a probability, 0 to 1")


def _check(n: int, delta: float) -> None:
    if n < 1:
        raise InputError(f"{n} rows; expected at least one")
    if not 0 < delta < 1:
        raise InputError(f"delta is {delta}; expected a probability between 0 and 1, such as 0.05")
