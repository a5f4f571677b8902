"""Lanczos quadrature: what a function of a symmetric operator does, from a few products.

``m`` steps of the Lanczos process from a vector ``v`` give a tridiagonal ``T = S diag(theta) S'``
and with it the Gauss rule of ``v``'s spectral measure,

    v' f(W) v  ~  ||v||^2 sum_j S_{1j}^2 f(theta_j),

exact for polynomials ``f`` of degree at most ``2m - 1``, and for every ``f`` once the Krylov space
is exhausted. Over random ``v`` with ``E vv' = I`` the mean estimates ``tr f(W)``.

`Block` is a product with the rows of ``(k, n)``, as in `deltacontrol.theory.linear.sketching`; all
rows advance
together. The basis is reorthogonalised twice against all of itself, in the dtype of the start:
without it, copies of converged eigenvalues would appear. Its memory is ``m k n`` numbers.

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

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.sketching import Block, TraceEstimate

__all__ = ["Quadrature", "SpectralDensity", "quadrature", "spectral_density"]

Function = Callable[[Tensor], Tensor]


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


def quadrature(apply: Block, start: Tensor, steps: int) -> Quadrature:
    """The Gauss rules of the rows of ``start``.

    A row whose Krylov space is exhausted keeps the nodes it has; what is appended has weight zero.

    Args:
        apply: ``(k, n) -> (k, n)``, the rows ``W v_i``; ``W`` symmetric.
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
    norms = start.norm(dim=1)
    if not bool((norms > 0).all()):
        raise InputError("a start vector is zero, which has no spectral measure; drop that row")
    k, n = start.shape
    steps = min(steps, n)
    v = start / norms[:, None]
    basis = v[None]
    diagonal, off = [], []
    scale = 0.0
    for step in range(steps):
        w = apply(v)
        if w.shape != start.shape:
            raise InputError(
                f"the operator gave shape {tuple(w.shape)} for {tuple(start.shape)}; it must map "
                "rows to rows"
            )
        diagonal.append((v * w).sum(1))
        # The size of W as far as seen, over all rows, tells a zero from rounding.
        scale = max(scale, float(w.norm(dim=1).max()))
        for _ in range(2):
            w = w - torch.einsum("jk,jkn->kn", torch.einsum("jkn,kn->jk", basis, w), basis)
        beta = w.norm(dim=1)
        alive = beta > 10 * n * torch.finfo(start.dtype).eps * scale
        if step + 1 == steps or not bool(alive.any()):
            break
        beta = torch.where(alive, beta, 0.0)
        off.append(beta)
        # An exhausted row goes on with zeros: T decouples there and its later nodes weigh nothing.
        v = torch.where(alive[:, None], w / torch.where(alive, beta, 1.0)[:, None], 0.0)
        basis = torch.cat([basis, v[None]])
    tridiagonal = torch.diag_embed(torch.stack(diagonal, 1))
    if off:
        sides = torch.stack(off, 1)
        tridiagonal = tridiagonal + torch.diag_embed(sides, 1) + torch.diag_embed(sides, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return Quadrature(nodes, norms[:, None].square() * vectors[:, 0].square(), k * len(diagonal))


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

    def density(self, points: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """The density at points, smoothed by Gaussians of standard deviation ``width``.

        Args:
            points: ``(g,)``.
            width: in units of the eigenvalues.

        Returns:
            The density ``(g,)``, whose integral is one, and its standard error over the probes.
        """
        z = (points - self.rules.nodes[..., None]) / width
        bumps = torch.exp(-0.5 * z.square()) / (width * math.sqrt(2 * math.pi))
        samples = (self.rules.weights[..., None] * bumps).sum(1) / self.size
        k = len(samples)
        error = samples.std(0) / math.sqrt(k) if k > 1 else torch.full_like(points, math.inf)
        return samples.mean(0), torch.zeros_like(error) if self.exact else error

    def measure(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and how often each occurs, ``(k m,)`` both: the mean over the probes."""
        k = len(self.rules.nodes)
        return self.rules.nodes.flatten(), self.rules.weights.flatten() / k


def spectral_density(
    apply: Block,
    size: int,
    steps: int,
    *,
    probes: int = 10,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> SpectralDensity:
    """Stochastic Lanczos quadrature from random signs.

    The variance of a trace is at most ``2/probes sum_{i != j} f(W)_ij^2``; ``size`` probes or more
    take the unit vectors instead, which have none.

    Args:
        apply: ``(k, n) -> (k, n)``, the rows ``W v_i``; ``W`` symmetric.
        size: ``n``.
        steps: of Lanczos, for each probe.
        probes: random vectors.
        seed: of the signs.
        dtype: of the vectors.
        device: of the vectors.

    Raises:
        InputError: if a number is out of range.
    """
    if size < 1 or probes < 1:
        raise InputError(f"size is {size} and probes {probes}; expected at least 1")
    if probes >= size:
        start = math.sqrt(size) * torch.eye(size, dtype=dtype, device=device)
        return SpectralDensity(quadrature(apply, start, steps), size, exact=True)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (probes, size), generator=generator).to(device, dtype) * 2 - 1
    return SpectralDensity(quadrature(apply, signs, steps), size)
