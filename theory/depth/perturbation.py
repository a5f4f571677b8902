"""Perturbations in depth: the discrete Groenwall inequality with measured constants.

Let ``x_{t+1} = f_t(x_t)`` be a system and ``y_0..y_L`` any other sequence of states, with the
defects ``d_t = y_{t+1} - f_t(y_t)``. By the mean value inequality, with
``Lip_t = sup_{0<=s<=1} ||Df_t(x_t + s (y_t - x_t))||_2``,

    ||y_{t+1} - x_{t+1}|| <= ||d_t|| + Lip_t ||y_t - x_t||,

hence ``||y_L - x_L|| <= (prod_t Lip_t) ||y_0 - x_0|| + sum_t (prod_{s>t} Lip_s) ||d_t||``.

Norms are Euclidean, over all entries of one example: the first axis numbers examples that do not
interact, and every quantity has one value for each of them. The supremum is sampled at points of
the segment; the spectral norm is found by Lanczos iterations from below.

Source: Hairer, Norsett & Wanner, *Solving Ordinary Differential Equations I*, 1993, section I.10,
in its discrete form; Golub & Van Loan, *Matrix Computations*, 2013, section 10.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.problem import Dynamics
from deltacontrol.theory.control.systems import Segment
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.krylov import lanczos
from deltacontrol.theory.linear.linearisation import Linearisation
from deltacontrol.theory.linear.operator import LinearOperator

__all__ = ["SpectralNorm", "example_norms", "growth_bound", "segment_norms", "spectral_norm"]


@dataclass(frozen=True, eq=False)
class SpectralNorm:
    """The largest singular value of the Jacobian of each example.

    Attributes:
        value: a lower bound that converges to ``||A_i||_2``, ``(batch,)``.
        residual: some singular value of ``A_i`` has a square within this of ``value^2``, of the
            same shape.
        vector: the right singular vector, of norm 1 for each example; the shape of the state.
    """

    value: Tensor
    residual: Tensor
    vector: Tensor


@typed
def example_norms(x: Tensor) -> Tensor:
    """The Euclidean norm of each example, ``(batch,)``.

    Raises:
        InputError: unless ``x`` has a batch axis and real entries.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise InputError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; expected real examples (batch, ...)"
        )
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


@typed
def growth_bound(lipschitz: Sequence[Tensor], defects: Sequence[Tensor], initial: Tensor) -> Tensor:
    """``b_0 = initial``, ``b_{t+1} = defects_t + lipschitz_t b_t``, as ``(L + 1, batch)``.

    Args:
        lipschitz: ``Lip_t`` for each step, ``(batch,)``.
        defects: ``||d_t||`` for each step, ``(batch,)``.
        initial: ``||y_0 - x_0||``, ``(batch,)``.

    Raises:
        InputError: if the numbers of constants and defects differ, or the shapes of two terms.
    """
    if len(lipschitz) != len(defects):
        raise InputError(
            f"{len(lipschitz)} Lipschitz constants and {len(defects)} defects; expected one of "
            "each for each step"
        )
    for t, term in enumerate((*lipschitz, *defects)):
        if term.shape != initial.shape:
            raise InputError(
                f"a term of step {t % len(defects)} has shape {tuple(term.shape)} and the initial "
                f"distance {tuple(initial.shape)}; expected one number an example, (batch,)"
            )
    bounds = [initial]
    for constant, defect in zip(lipschitz, defects, strict=True):
        bounds.append(defect + constant * bounds[-1])
    return torch.stack(bounds)


@typed
def segment_norms(
    dynamics: Dynamics,
    t: int,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    *,
    num_points: int = 5,
    num_iterations: int = 15,
    seed: int = 0,
) -> SpectralNorm:
    """``||df_t/dx (x + s (y - x), u)||_2`` at equidistant ``s`` from 0 to 1.

    The largest value over the points is the Lipschitz constant on the segment, up to what lies
    between the points.

    Args:
        dynamics: the system.
        t: the step.
        x: one end, ``(batch, ...)``.
        y: the other.
        u: the control of the step, shared by the batch or one per example.
        num_points: how many points, at least 2.
        num_iterations: Lanczos iterations at each.
        seed: of the first vectors.

    Returns:
        Values, residuals and vectors with the points as their first axis.

    Raises:
        InputError: for fewer than two points, or ends of different shapes.
    """
    if num_points < 2:
        raise InputError(f"num_points = {num_points}; the two ends are the least that is sampled")
    if x.shape != y.shape:
        raise InputError(
            f"the ends have shapes {tuple(x.shape)} and {tuple(y.shape)}; they must be equal"
        )
    one, found = Segment(dynamics, t, t + 1), []
    for s in torch.linspace(0, 1, num_points).tolist():
        point = torch.lerp(x, y, s)
        with torch.no_grad():
            states = [point, one.step(0, point, u)]
        lin = Linearisation(one, states, (u,), keep=True)
        found.append(spectral_norm(lin.transition, point, num_iterations=num_iterations, seed=seed))
    parts = ([getattr(norm, name) for norm in found] for name in ("value", "residual", "vector"))
    return SpectralNorm(*(torch.stack(part) for part in parts))


@typed
def spectral_norm(
    A: LinearOperator, like: Tensor, *, num_iterations: int = 15, seed: int = 0
) -> SpectralNorm:
    """The largest singular value of ``A_i`` for each example, of ``A = diag(A_1, ..., A_batch)``.

    Lanczos on ``A_i' A_i`` for all examples at once, with full reorthogonalisation.

    Args:
        A: from the flat states of the whole batch to any outputs, such as
            `Linearisation.transition`.
        like: a state, ``(batch, ...)``, for its shape, dtype and device.
        num_iterations: how many products with ``A' A``; no more than the entries of an example.
        seed: of the first vectors.

    Raises:
        InputError: if ``num_iterations`` is not positive.
    """
    if num_iterations < 1:
        raise InputError(f"num_iterations = {num_iterations} must be positive")
    batch, size = like.shape[0], like[0].numel()
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn((batch, size), generator=generator, dtype=torch.float64)
    found = lanczos(
        lambda v: ((A @ v.reshape(-1)) @ A).reshape(batch, size),
        _unit(start.to(like.dtype).to(like.device)),
        min(num_iterations, size),
        rounding=torch.finfo(like.dtype).eps,
        one_operator=False,
    )
    squares, vectors = torch.linalg.eigh(found.matrix)
    top = vectors[:, :, -1]
    vector = _unit(torch.einsum("kbn,bk->bn", found.basis, top))
    return SpectralNorm(
        value=squares[:, -1].clamp_min(0).sqrt(),
        residual=(found.rest * top[:, -1]).abs(),
        vector=vector.reshape(like.shape),
    )


def _unit(v: Tensor) -> Tensor:
    """Each row divided by its norm; a zero row stays zero."""
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return v / norm.clamp_min(torch.finfo(v.dtype).tiny)
