"""Where LoRA's training ends, from many starts: the linear model against its global minimum.

One matrix of a model, examples ``i`` with margins ``z_i`` and signs ``s_i``, ``G_i = d z_i / d W``.
In the kernel regime LoRA of rank ``r`` minimises

    Phi(A, B) = 1/N sum_i l_i(z_i + <G_i, B A>) + lambda/2 (||A||^2 + ||B||^2),

``l_i(z) = log(1 + exp(-s_i z))`` or ``(z - s_i)^2 / 2``. For large ``r`` its least value is that of

    min over X of  1/N sum_i l_i(z_i + <G_i, X>) + lambda ||X||_*,

a convex program. Any slopes ``a`` with ``||1/N sum_i a_i G_i||_2 <= lambda`` bound it from below by
``1/N sum_i min_z (l_i(z) - a_i z) + a_i z_i``. So the distance of a local minimum from the global
one is a number, not a comparison of runs. The real model is trained on the same objective.

Sources: Jang, Lee & Ryu, ICML 2024, theorem 4.1; Recht, Fazel & Parrilo, SIAM Review 52(3), 2010,
lemma 5.1 (the nuclear norm as a product of factors).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from deltacontrol.deltas import LoRA, attach
from deltacontrol.experiments.measures.margins import MarginData
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers.lbfgs import differentiated, minimise_lbfgs

Loss = Literal["logistic", "squared"]

STEPS = 4000  # evaluations at most, in the linear model


def needed_rank(examples: int, outputs: int = 1) -> int:
    """The least ``r`` with ``r(r + 1)/2 > K N``."""
    rank = 1
    while rank * (rank + 1) <= 2 * examples * outputs:
        rank += 1
    return rank


@dataclass(frozen=True)
class Minimum:
    """Where a training ended.

    Attributes:
        objective: ``Phi``.
        bound: below the least value of all ranks, from the slopes there; NaN for the real model.
        gradient: norm of ``Phi``'s gradient there, over that at the start.
        evaluations: of ``Phi``.
    """

    objective: float
    bound: float
    gradient: float
    evaluations: int


@dataclass(frozen=True, eq=False)
class LinearLoRA:
    """Margins that are linear in one matrix.

    Attributes:
        rows: ``G``, in coordinates of the spaces that they span, ``(n, p, q)``.
        margins: ``z``, ``(n,)``.
        signs: ``s``, ``(n,)``.
        loss: "logistic" or "squared".
        penalty: ``lambda``.
    """

    rows: Tensor
    margins: Tensor
    signs: Tensor
    loss: Loss
    penalty: float = 0.0

    @classmethod
    def of(
        cls, rows: Tensor, margins: Tensor, signs: Tensor, loss: Loss, share: float
    ) -> LinearLoRA:
        """Cut the coordinates down, and take lambda as a share of what makes ``X = 0`` optimal.

        The parts of ``A`` and ``B`` outside of what the rows span carry a penalty and nothing else.

        Args:
            rows: ``G``, ``(n, out, in)``.
            margins: ``z``, ``(n,)``.
            signs: ``s``, ``(n,)``.
            loss: "logistic" or "squared".
            share: of ``||1/N sum_i l'_i(z_i) G_i||_2``, in (0, 1).

        Raises:
            InputError: the share is out of range, or the shapes do not fit.
        """
        if rows.ndim != 3 or margins.shape != signs.shape or len(rows) != len(margins):
            raise InputError(
                f"rows have shape {tuple(rows.shape)}, margins {tuple(margins.shape)}, signs "
                f"{tuple(signs.shape)}; expected (n, out, in), (n,) and (n,)"
            )
        if not 0 < share < 1:
            raise InputError(f"share is {share}; with 1 or more, zero is optimal; give less")
        rows = rows.double()
        left = _span(rows.permute(1, 0, 2).flatten(1))
        right = _span(rows.permute(2, 0, 1).flatten(1))
        small = torch.einsum("op,noi,iq->npq", left, rows, right)
        made = cls(small, margins.double(), signs.double(), loss)
        return replace(made, penalty=share * made._largest(made._slopes(made.margins)))

    @property
    def start(self) -> float:
        """``Phi`` where ``B A = 0``, without the penalty."""
        return float(self._losses(self.margins).mean())

    def minimise(self, rank: int, seed: int, size: float) -> Minimum:
        """L-BFGS on ``A`` and ``B`` from a Gaussian start.

        Args:
            rank: ``r``.
            seed: of the start.
            size: the length of a column of ``A'`` and of ``B``; 0 for LoRA's start, ``B = 0`` and
                ``A`` of length one.
        """
        _, p, q = self.rows.shape
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn((p + q) * rank, generator=generator, dtype=torch.float64)
        A, B = normal[: rank * q] * (size or 1.0) / q**0.5, normal[rank * q :] * size / p**0.5

        def margins(u: Tensor) -> Tensor:
            A, B = u[: rank * q].view(rank, q), u[rank * q :].view(p, rank)
            return self.margins + torch.einsum("npq,pr,rq->n", self.rows, B, A)

        def objective(u: Tensor) -> Tensor:
            return self._losses(margins(u)).mean() + 0.5 * self.penalty * u.square().sum()

        found, u = _minimise(objective, torch.cat([A, B]), STEPS)
        return replace(found, bound=self.bound(margins(u)))

    def bound(self, margins: Tensor) -> float:
        """The dual's value at the slopes of some margins, scaled until they are feasible."""
        a = self._slopes(margins)
        size = self._largest(a)
        a = a * min(1.0, self.penalty / size) if size else a
        if self.loss == "squared":
            least = -a * self.signs - 0.5 * a.square()
        else:
            q = -self.signs * a
            least = torch.special.entr(q) + torch.special.entr(1 - q)
        return float((least + a * self.margins).mean())

    def _losses(self, z: Tensor) -> Tensor:
        if self.loss == "squared":
            return 0.5 * (z - self.signs).square()
        return -logsigmoid(self.signs * z)

    def _slopes(self, z: Tensor) -> Tensor:
        """``l'_i(z_i)``."""
        if self.loss == "squared":
            return z - self.signs
        return -self.signs * torch.sigmoid(-self.signs * z)

    def _largest(self, slopes: Tensor) -> float:
        """``||1/N sum_i a_i G_i||_2``."""
        total = torch.einsum("n,npq->pq", slopes, self.rows) / len(slopes)
        return float(torch.linalg.matrix_norm(total, 2))


class RealLoRA:
    """LoRA on one matrix of the real model, on the same objective with the logistic loss.

    Args:
        data: the model and the examples.
        site: of the matrix.
        layer: its layer.
    """

    def __init__(self, data: MarginData, site: str, layer: int) -> None:
        self.data, self.site, self.layer = data, site, layer
        self.batch = data.batch(data.examples)

    def rows(self) -> tuple[Tensor, Tensor]:
        """``G`` ``(n, out, in)`` and ``z`` ``(n,)``, from the model itself."""
        from deltacontrol.deltas.methods.selected_modules import SelectedModules

        delta = SelectedModules(sites=(self.site,), layers=(self.layer,))
        controlled = attach(self.data.model, delta)
        try:
            name, weight = next(
                (n, p) for n, p in controlled.trainable().items() if n.endswith("weight")
            )
            margins = self.data.margins(
                controlled(**self.batch).logits, self.batch["attention_mask"]
            )
            rows = [torch.autograd.grad(z, weight, retain_graph=True)[0] for z in margins]
        finally:
            controlled.detach()
        return torch.stack(rows), margins.detach()

    def minimise(self, rank: int, seed: int, penalty: float, steps: int = 150) -> Minimum:
        """L-BFGS on ``A`` and ``B`` from LoRA's start."""
        delta = LoRA(rank=rank, alpha=float(rank), sites=(self.site,), layers=(self.layer,))
        controlled = attach(self.data.model, delta, seed=seed)
        try:
            start = {n: p.detach() for n, p in controlled.trainable().items()}
            sizes = [p.numel() for p in start.values()]

            def objective(u: Tensor) -> Tensor:
                parts = zip(start.items(), u.split(sizes), strict=True)
                moved = {f"controls.{n}": part.view_as(p).to(p) for (n, p), part in parts}
                logits = torch.func.functional_call(controlled, moved, (), self.batch).logits
                z = self.data.margins(logits, self.batch["attention_mask"])
                loss = -logsigmoid(self.data.signs * z.double()).mean()
                return loss + 0.5 * penalty * u.square().sum()

            flat = torch.cat([p.flatten() for p in start.values()]).double()
            return _minimise(objective, flat, steps)[0]
        finally:
            controlled.detach()


def _span(columns: Tensor) -> Tensor:
    """An orthonormal basis of the range, ``(n, rank)``."""
    left, values, _ = torch.linalg.svd(columns, full_matrices=False)
    return left[:, values > 1e-10 * values[0]]


def _minimise(
    objective: Callable[[Tensor], Tensor], start: Tensor, steps: int
) -> tuple[Minimum, Tensor]:
    """L-BFGS; begun anew where its line search fails, and once it says that it has converged."""
    count, first = 0, 0.0
    of = differentiated(objective)

    def value_and_gradient(u: Tensor) -> tuple[float, Tensor]:
        nonlocal count, first
        value, gradient = of(u)
        first = first or float(gradient.norm())
        count += 1
        return value, gradient

    at, value = start, float("inf")
    while count < steps:
        found = minimise_lbfgs(
            value_and_gradient,
            at,
            memory=30,
            max_iterations=steps,
            max_evaluations=steps,
            gradient_tolerance=1e-9,
        )
        better = value - found.value > 1e-12 * abs(found.value)
        at, value = found.x, found.value
        if not better:
            break
    gradient = float(np.linalg.norm(value_and_gradient(at)[1].numpy())) / (first or 1.0)
    return Minimum(value, float("nan"), gradient, count), at
