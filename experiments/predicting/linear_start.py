"""A delta at its start, linearised on some rows: all that predictions take from its gradients.

Outputs ``f``, ``k`` contrasts of the logits of each of ``n`` training rows and ``m`` validation
rows, with the Jacobian ``J`` over the ``D`` controls; ``l`` the mean cross-entropy of the training
rows, ``r = grad l`` and ``H = Hess l`` in the outputs. Of the training rows

    g = J'r,        v_j = g_j^2 + Var_i(g_ij)/b,        P = diag(c_j / (sqrt v_j + eps)):

the gradient, the second moment of a gradient of ``b`` rows, and what AdamW divides by it, where
``c_j`` is the factor on a control's rate (1 but for a few) and ``eps = 1e-8``. Kept are

    K = J_n J_n',    A = J P J_n',    the slope |c g|_1 and the move J s of the sign step
    s = -c sign(g), which is AdamW's first,

and ``||g_p||^2`` of every tensor. The curvature is Gauss-Newton's, ``G = J'HJ``: in the metric of
AdamW its nonzero eigenvalues are those of ``H^1/2 A_n H^1/2``.

Where ``D`` times the outputs is beyond `CAPACITY`, entries of the controls are drawn, as many of
each tensor in proportion, and each stands for those left out: every sum over entries is then an
unbiased estimate, of a relative error that falls with the root of their number. Otherwise all of it
is exact, up to single precision.

Sources: Jacot, Gabriel & Hongler, NeurIPS 2018 (K); Kingma & Ba, ICLR 2015, algorithm 1 (v, P);
Malladi, Wettig, Yu, Chen & Arora, ICML 2023, section 4 (kernels of Adam's sign steps).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltacontrol.experiments.predicting.example_gradients import ExampleGradients
from deltacontrol.theory.linear.krylov import lanczos
from deltacontrol.theory.linear.model_curvature import softmax_factor

if TYPE_CHECKING:
    import numpy as np

    from deltacontrol.deltas import DeltaModel
    from deltacontrol.experiments.tasks.encoding import Batch

CAPACITY = 2**28  # numbers of the training rows' gradients that are held
BLOCK = 2**15  # entries of the controls that are worked on at once
EPSILON = 1e-8  # of AdamW
LANCZOS_STEPS = 40


@dataclass(frozen=True, eq=False)
class LinearStart:
    """What is kept of the gradients; training rows come first, tensors are in float64.

    Attributes:
        outputs: ``f``, (n + m, k).
        labels: (n + m,).
        contrasts: (classes, k).
        kernel: ``K``, (n k, n k).
        adam: ``A``, ((n + m) k, n k).
        slope: ``|c g|_1``.
        moves: ``J s``, (n, k).
        draws: how often each training row is drawn, (draws, n).
        drawn_slopes: the slope of each draw, (draws,).
        drawn_moves: the move of each draw by its own sign step, (draws, n, k).
        energies: ``||g_p||^2`` by the name of the tensor.
        num_controls: ``D``.
        num_kept: entries that were looked at.
        cost: in forward passes of one row, a backward pass counted as two.
    """

    outputs: Tensor
    labels: Tensor
    contrasts: Tensor
    kernel: Tensor
    adam: Tensor
    slope: float
    moves: Tensor
    draws: Tensor
    drawn_slopes: Tensor
    drawn_moves: Tensor
    energies: Mapping[str, float]
    num_controls: int
    num_kept: int
    cost: float

    @property
    def num_rows(self) -> int:
        """``n``."""
        return len(self.moves)

    @property
    def logits(self) -> Tensor:
        """Up to their mean, (n + m, classes)."""
        return self.outputs @ self.contrasts.mT

    def losses(self, outputs: Tensor) -> Tensor:
        """The cross-entropy of each row, (..., n + m), at outputs (..., n + m, k)."""
        log = torch.log_softmax(outputs @ self.contrasts.mT, -1)
        rows = self.labels.expand(log.shape[:-1])[..., None]
        return -log.gather(-1, rows)[..., 0]

    def slopes(self, outputs: Tensor, weights: Tensor | None = None) -> Tensor:
        """``grad l`` at flat training outputs (copies, n k), each row weighted as it is drawn.

        Args:
            outputs: of the copies.
            weights: (copies, n); one each by default.
        """
        n = self.num_rows
        z = outputs.reshape(len(outputs), n, -1) @ self.contrasts.mT
        residual = _residual(z, self.labels[:n])
        if weights is not None:
            residual = residual * weights[..., None]
        return (residual @ self.contrasts).flatten(1)

    @cached_property
    def hessian_roots(self) -> Tensor:
        """``H^1/2``, one block for each training row, (n, k, k)."""
        n = self.num_rows
        factor, _ = softmax_factor(self.logits[:n], self.labels[:n])
        half = self.contrasts.mT @ factor
        values, vectors = torch.linalg.eigh(half @ half.mT)
        return (vectors * values.clamp_min(0).sqrt()[:, None, :]) @ vectors.mT

    def whitened(self, kernel: Tensor) -> Tensor:
        """``H^1/2 K H^1/2``, whose nonzero eigenvalues are those of Gauss-Newton."""
        root = torch.block_diag(*self.hessian_roots)
        return root @ kernel @ root

    @property
    def adam_curvature(self) -> Tensor:
        """``H^1/2 A_n H^1/2``, (n k, n k)."""
        return self.whitened(self.adam[: len(self.kernel)])

    @cached_property
    def sign_curvature(self) -> tuple[float, Tensor]:
        """``s'Gs``, and that of each draw, (draws,)."""
        weighted = torch.einsum("nab,...nb->...na", self.hessian_roots, self._all_moves)
        squares = weighted.square().sum(-1)
        return float(squares[0].sum()), (squares[1:] * self.draws).sum(-1)

    @cached_property
    def largest(self) -> tuple[float, Tensor]:
        """``lambda_max`` of Gauss-Newton in AdamW's metric, and that of each draw, (draws,)."""
        M, k = self.adam_curvature, self.outputs.shape[1]
        weights = torch.cat([torch.ones(1, self.num_rows, dtype=M.dtype), self.draws])
        roots = weights.sqrt().repeat_interleave(k, 1)

        def product(x: Tensor) -> Tensor:
            return roots * ((roots * x) @ M)

        start = torch.ones_like(roots) + torch.linspace(0, 1, M.shape[0], dtype=M.dtype)
        start = start / start.norm(dim=1, keepdim=True)
        steps = min(LANCZOS_STEPS, M.shape[0])
        found = lanczos(product, start, steps, rounding=1e-12, one_operator=False)
        tops = torch.linalg.eigvalsh(found.matrix)[:, -1]
        return float(tops[0]), tops[1:]

    @property
    def _all_moves(self) -> Tensor:
        return torch.cat([self.moves[None], self.drawn_moves])


def linear_start(
    controlled: DeltaModel,
    passes: Callable[[str, int], Iterable[tuple[np.ndarray, Batch]]],
    labels: Tensor,
    contrasts: Tensor,
    draws: Tensor,
    *,
    batch_size: int,
    capacity: int = CAPACITY,
    seed: int = 0,
) -> LinearStart:
    """Linearise a model in its controls.

    Args:
        controlled: in evaluation mode; used for nothing else until it is detached.
        passes: of "train" or "validation" and a number of rows, batches of at most as many rows
            with the rows' numbers.
        labels: of all rows, (n + m,).
        contrasts: of the logits, (classes, k), orthonormal and without a common offset.
        draws: how often each training row is drawn, (draws, n).
        batch_size: ``b``, of the training that is predicted.
        capacity: numbers that are held.
        seed: of the entries that are drawn.
    """
    n, k, count = draws.shape[1], contrasts.shape[1], len(labels)
    tensors = controlled.trainable()
    entries = _entries({name: p.numel() for name, p in tensors.items()}, capacity // (n * k), seed)
    gradients = ExampleGradients(controlled, contrasts, entries.columns)
    precision = torch.float64 if controlled.dtype == torch.float64 else torch.float32
    J = torch.empty(n, k, len(entries.stands_for), dtype=precision)
    outputs = torch.empty(count, k, dtype=torch.float64)
    for numbers, batch in passes("train", gradients.size):
        found, rows = gradients.of(batch)
        outputs[numbers], J[numbers] = found.double(), rows.to(J)
    rates = entries.spread(controlled.rate_factors)
    residual = _residual(outputs[:n] @ contrasts.mT, labels[:n]) @ contrasts
    sums = _sums(J, residual, draws, entries.stands_for, rates, batch_size)
    adam = torch.empty(count, k, n * k, dtype=torch.float64)
    adam[:n] = sums.adam.view(n, k, -1)
    weights = entries.stands_for * rates * sums.scale
    for numbers, batch in passes("validation", gradients.size):
        found, rows = gradients.of(batch)
        outputs[n + numbers] = found.double()
        adam[n + numbers] = ((rows.to(J) * weights) @ J.flatten(0, 1).mT).double()
    return LinearStart(
        outputs=outputs,
        labels=labels,
        contrasts=contrasts,
        kernel=sums.kernel,
        adam=adam.flatten(0, 1),
        slope=float(sums.slopes[0]),
        moves=sums.moves[0],
        draws=draws,
        drawn_slopes=sums.slopes[1:],
        drawn_moves=sums.moves[1:],
        energies=entries.summed(sums.gradient.square()),
        num_controls=sum(p.numel() for p in tensors.values()),
        num_kept=len(entries.stands_for),
        cost=count * (1.0 + 2.0 * k),
    )


@dataclass(frozen=True, eq=False)
class _Entries:
    """Which entries of the controls are looked at, tensor by tensor.

    Attributes:
        sizes: entries of each tensor that are kept, in order.
        columns: their numbers, of the tensors of which not all are.
        stands_for: how many entries each of them stands for, (kept,).
    """

    sizes: Mapping[str, int]
    columns: Mapping[str, Tensor]
    stands_for: Tensor

    def spread(self, factors: Mapping[str, float]) -> Tensor:
        """A number of each tensor at all of its entries, 1 where there is none."""
        parts = [torch.full((size,), factors.get(name, 1.0)) for name, size in self.sizes.items()]
        return torch.cat(parts)

    def summed(self, values: Tensor) -> dict[str, float]:
        """The sum over each tensor, as far as the kept entries tell."""
        parts = (values * self.stands_for).split(list(self.sizes.values()))
        return {name: float(part.sum()) for name, part in zip(self.sizes, parts, strict=True)}


def _entries(numbers: Mapping[str, int], most: int, seed: int) -> _Entries:
    total = sum(numbers.values())
    if total <= most:
        return _Entries(dict(numbers), {}, torch.ones(total))
    generator, share = torch.Generator().manual_seed(seed), most / total
    columns = {
        name: torch.randperm(count, generator=generator)[: max(1, round(share * count))]
        for name, count in numbers.items()
    }
    sizes = {name: len(chosen) for name, chosen in columns.items()}
    parts = [torch.full((sizes[name],), numbers[name] / sizes[name]) for name in sizes]
    return _Entries(sizes, columns, torch.cat(parts))


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over the entries of the controls; of slopes and moves those of all rows come first."""

    kernel: Tensor
    adam: Tensor
    gradient: Tensor
    scale: Tensor
    slopes: Tensor
    moves: Tensor


def _sums(
    J: Tensor, residual: Tensor, draws: Tensor, stands_for: Tensor, rates: Tensor, batch_size: int
) -> _Sums:
    """One pass over ``J`` (n, k, entries), a block of entries at a time."""
    n, k, count = J.shape
    weights = torch.cat([torch.ones(1, n, dtype=residual.dtype), draws])
    pulls = (weights[:, :, None] * residual).flatten(1).to(J)  # to the gradient of each draw
    of_each = (n * residual).to(J)  # to the gradient of each row's own loss
    kernel = torch.zeros(n * k, n * k, dtype=torch.float64)
    adam = torch.zeros_like(kernel)
    slopes = torch.zeros(len(weights), dtype=torch.float64)
    moves = torch.zeros(len(weights), n * k, dtype=torch.float64)
    gradient, scale = J.new_empty(count), J.new_empty(count)
    for start in range(0, count, BLOCK):
        part = slice(start, start + BLOCK)
        block, own, factor = J[..., part].flatten(0, 1), stands_for[part], rates[part]
        drawn = pulls @ block
        each = torch.einsum("nk,nke->ne", of_each, J[..., part])
        second = drawn[0].square() + each.var(0, correction=0) / batch_size
        scale[part] = torch.where(second > 0, 1 / (second.sqrt() + EPSILON), 0.0)
        gradient[part] = drawn[0]
        kernel += ((block * own) @ block.mT).double()
        adam += ((block * (own * factor * scale[part])) @ block.mT).double()
        slopes += (drawn.abs() * (own * factor)).sum(1).double()
        moves -= ((drawn.sign() * (own * factor)) @ block.mT).double()
    return _Sums(kernel, adam, gradient, scale, slopes, moves.view(-1, n, k))


def _residual(logits: Tensor, labels: Tensor) -> Tensor:
    """``(p - e_y)/n`` of logits (..., n, classes)."""
    targets = torch.nn.functional.one_hot(labels, logits.shape[-1])
    return (torch.softmax(logits, -1) - targets) / len(labels)
