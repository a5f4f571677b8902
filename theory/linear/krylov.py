"""The Lanczos process, and what a function of a symmetric operator does, from a few products.

``m`` steps of the Lanczos process from a vector ``v`` give a tridiagonal ``T = S diag(theta) S'``
and with it the Gauss rule of ``v``'s spectral measure,

    v' f(W) v  ~  ||v||^2 sum_j S_{1j}^2 f(theta_j),

exact for polynomials ``f`` of degree at most ``2m - 1``, and for every ``f`` once the Krylov space
is exhausted. Over random ``v`` with ``E vv' = I`` the mean estimates ``tr f(W)``.

The basis is reorthogonalised twice against all of itself, in the dtype of the start: without it,
copies of converged eigenvalues would appear. Its memory is ``m k n`` numbers for ``k`` starts,
which advance together.

Sources: Golub & Meurant, *Matrices, Moments and Quadrature with Applications*, 2010, theorem 6.6;
Ubaru, Chen & Saad, SIAM J. Matrix Anal. Appl. 38(4), 2017, algorithm 1; Lin, Saad & Yang,
*Approximating spectral densities of large matrices*, SIAM Review 58(1), 2016, section 3.2.
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
from deltacontrol.theory.linear.sketching import TraceEstimate

__all__ = [
    "Quadrature",
    "SpectralDensity",
    "Tridiagonal",
    "lanczos",
    "quadrature",
    "spectral_density",
]

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Tridiagonal:
    """``W Q = Q T + beta q e_m'`` with orthonormal columns of ``Q``, for each of ``k`` starts.

    Attributes:
        matrix: ``T``, ``(k, m, m)``.
        basis: ``Q'``, ``(m, k, n)``; zero from where the Krylov space of a row ends.
        rest: ``beta``, what the last step left, ``(k,)``.
    """

    matrix: Tensor
    basis: Tensor
    rest: Tensor


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    steps: int,
    *,
    rounding: float,
    one_operator: bool,
) -> Tridiagonal:
    """At most ``steps`` steps of the process for the rows of ``start``, all at once.

    It ends where the Krylov spaces of all rows are exhausted. A row that is exhausted before goes
    on with zeros: ``T`` decouples there.

    Args:
        product: ``(k, n) -> (k, n)``, the rows ``W_i v_i`` with symmetric ``W_i``.
        start: of norm one, or zero, ``(k, n)``.
        steps: at least 1.
        rounding: a row is exhausted where the next vector is shorter than so much of ``||W||``.
        one_operator: whether all ``W_i`` are one ``W``, whose size all rows then tell together;
            else each row has a size of its own.
    """
    v = start
    basis = v[None]
    diagonal, off = [], []
    scale = start.new_zeros(())
    while True:
        w = product(v)
        diagonal.append((v * w).sum(1))
        # The size of W as far as seen tells a zero from rounding.
        lengths = w.norm(dim=1)
        scale = torch.maximum(scale, lengths.max() if one_operator else lengths)
        for _ in range(2):  # twice is enough, Parlett, The Symmetric Eigenvalue Problem, 6.9
            w = w - torch.einsum("jk,jkn->kn", torch.einsum("jkn,kn->jk", basis, w), basis)
        rest = w.norm(dim=1)
        alive = rest > rounding * scale
        if len(diagonal) == steps or not bool(alive.any()):
            break
        beta = torch.where(alive, rest, 0.0)
        off.append(beta)
        v = torch.where(alive[:, None], w / torch.where(alive, beta, 1.0)[:, None], 0.0)
        basis = torch.cat([basis, v[None]])
    matrix = torch.diag_embed(torch.stack(diagonal, 1))
    if off:
        sides = torch.stack(off, 1)
        matrix = matrix + torch.diag_embed(sides, 1) + torch.diag_embed(sides, -1)
    return Tridiagonal(matrix, basis, rest)


@dataclass(frozen=True, eq=False)
class Quadrature:
    """Gauss rules of the spectral measures of ``k`` vectors.

    Attributes:
        nodes: ``theta``, rising, ``(k, m)``.
        weights: ``||v||^2 S_{1j}^2``, ``(k, m)``; the rows sum to ``||v||^2``.
        num_products: products with ``W`` that were computed.
    """

    nodes: Tensor
    weights: Tensor
    num_products: int

    def form(self, f: Function) -> Tensor:
        """``v' f(W) v`` for each of the vectors, ``(k,)``."""
        return (self.weights * f(self.nodes)).sum(1)


@typed
def quadrature(W: SymmetricOperator, start: Tensor, steps: int) -> Quadrature:
    """The Gauss rules of the rows of ``start``.

    A row whose Krylov space is exhausted keeps the nodes it has; what is appended has weight zero.

    Args:
        W: ``(n, n)``.
        start: ``(k, n)``.
        steps: ``m``; at most ``n`` are done.

    Raises:
        InputError: if the shapes or the number do not fit, or a row of the start is zero.
    """
    if start.ndim != 2 or steps < 1:
        raise InputError(
            f"the start has shape {tuple(start.shape)} and steps is {steps}; expected (k, n) and "
            "at least 1"
        )
    if start.dtype != W.dtype:
        raise InputError(f"the start is {start.dtype}; expected {W.dtype}, as the operator is")
    norms = start.norm(dim=1)
    if not bool((norms > 0).all()):
        raise InputError("a start vector is zero, which has no spectral measure; drop that row")
    k, n = start.shape
    # The rounding errors of n products are independent: their sum grows like the root of n.
    rounding = 10 * math.sqrt(n) * torch.finfo(start.dtype).eps
    found = lanczos(
        lambda v: v @ W,
        start / norms[:, None],
        min(steps, n),
        rounding=rounding,
        one_operator=True,
    )
    nodes, vectors = torch.linalg.eigh(found.matrix)
    weights = norms[:, None].square() * vectors[:, 0].square()
    return Quadrature(nodes, weights, k * len(found.basis))


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The distribution of the eigenvalues of ``W``, and traces of its functions.

    Attributes:
        rules: the Gauss rules of the probes, each of squared length ``n``.
        size: ``n``.
        exact: whether the probes are a basis, so that traces have no sampling error.
    """

    rules: Quadrature
    size: int
    exact: bool = False

    def trace(self, f: Function) -> TraceEstimate:
        """``tr f(W)``; its standard error is that of the mean over probes.

        The error of the Gauss rules themselves is not in it; it falls with the number of steps.
        """
        samples = self.rules.form(f)
        k = len(samples)
        if self.exact:
            return TraceEstimate(float(samples.mean()), 0.0, self.rules.num_products)
        error = float(samples.std()) / math.sqrt(k) if k > 1 else math.inf
        return TraceEstimate(float(samples.mean()), error, self.rules.num_products)

    def effective_dimension(self, c: float) -> TraceEstimate:
        """``sum_i lambda_i / (lambda_i + c)``, the number of directions stiffer than ``c``.

        Negative nodes, of rounding or of an indefinite ``W``, count as zero.

        Raises:
            InputError: unless ``c > 0``.
        """
        if not c > 0:
            raise InputError(f"c is {c}; the effective dimension needs a positive number")
        return self.trace(lambda x: x.clamp_min(0) / (x.clamp_min(0) + c))

    def measure(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and how often each occurs, ``(k m,)`` both: the mean over the probes."""
        k = len(self.rules.nodes)
        return self.rules.nodes.flatten(), self.rules.weights.flatten() / k


@typed
def spectral_density(
    W: SymmetricOperator, steps: int, *, probes: int = 10, seed: int = 0
) -> SpectralDensity:
    """Stochastic Lanczos quadrature from random signs.

    The variance of a trace is at most ``2/probes sum_{i != j} f(W)_ij^2``; ``n`` probes or more
    take the unit vectors instead, which have none.

    Args:
        W: ``(n, n)``; the vectors have its dtype and device.
        steps: of Lanczos, for each probe.
        probes: random vectors.
        seed: of the signs.

    Raises:
        InputError: if a number is out of range.
    """
    size, dtype, device = W.shape[0], W.dtype, W.device
    if size < 1 or probes < 1:
        raise InputError(f"size is {size} and probes {probes}; expected at least 1")
    if probes >= size:
        start = math.sqrt(size) * torch.eye(size, dtype=dtype, device=device)
        return SpectralDensity(quadrature(W, start, steps), size, exact=True)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (probes, size), generator=generator).to(device, dtype) * 2 - 1
    return SpectralDensity(quadrature(W, signs, steps), size)
