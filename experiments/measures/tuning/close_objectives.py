"""A fine-tuning objective F, and F̂ of the network that is linear in its controls.

With z the controls less those at the start, n examples of two classes, f(z) their margins (n,),
J = f'(0) of shape (n, P), and s = ±1 the signs of the labels,

    F(z) = 1/n Σ_i log(1 + exp(-s_i f_i(z))) + λ/2 |z|²,      F̂ the same of f(0) + J z.

F̂ is convex. Its minimiser lies in the span of the rows of J: with J = U S V', z = V b, it is that
of Φ(f(0) + U S b) + λ/2 |b|² in at most n coordinates, whatever the number of controls.

If |F - F̂| ≤ ε on a set that holds minimisers u of F and û of F̂, then F(û) - F(u) ≤ 2ε:
F(û) ≤ F̂(û) + ε ≤ F̂(u) + ε ≤ F(u) + 2ε.

Source: Ding et al., Nature Machine Intelligence 2023, optimisation perspective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deltacontrol.deltas import DeltaModel
from deltacontrol.experiments.measures.margins import logistic_derivatives, logistic_loss
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.operator import flatten, unflatten
from deltacontrol.theory.solvers.lbfgs import minimise_lbfgs

Read = Callable[[Any], Tensor]  # the margins (n,) of a model's output

NONE = 1e-7  # a singular value of J below this share of the largest is none
NOTHING = 1e-300  # in the place of a denominator that is zero


@dataclass(frozen=True, eq=False)
class Linear:
    """The linear network of some rows: f(0), J = U S V' without what is zero, and the signs."""

    margins: Tensor
    U: Tensor
    S: Tensor
    Vh: Tensor
    signs: Tensor

    def at(self, z: Tensor) -> float:
        """The loss, without the decay."""
        outputs = self.margins + self.U @ (self.S * (self.Vh @ z))
        return float(logistic_loss(outputs, self.signs))

    def minimiser(self, decay: float) -> Tensor:
        """The minimiser of F̂, (P,)."""

        def value_and_gradient(b: Tensor) -> tuple[float, Tensor]:
            outputs = self.margins + self.U @ (self.S * b)
            slope, _ = logistic_derivatives(outputs, self.signs)
            value = float(logistic_loss(outputs, self.signs)) + 0.5 * decay * float(b @ b)
            return value, self.S * (self.U.mT @ slope) + decay * b

        start = torch.zeros_like(self.S)
        if not len(start):
            return self.Vh.new_zeros(self.Vh.shape[1])
        found = minimise_lbfgs(value_and_gradient, start, gradient_tolerance=1e-12)
        return self.Vh.mT @ found.x


@dataclass(frozen=True, eq=False)
class Tuning:
    """A model with deltas, and rows of two classes on which they are tuned.

    Attributes:
        controlled: in float64 and evaluation mode.
        batch: the model's arguments, without labels.
        signs: ±1, (n,).
        read: the margins of the model's output.
        decay: λ, above 0.
    """

    controlled: DeltaModel
    batch: Mapping[str, Tensor]
    signs: Tensor
    read: Read
    decay: float

    def __post_init__(self) -> None:
        """Refuse what has no minimiser, or would be random."""
        if not self.decay > 0:
            raise InputError(f"decay is {self.decay}; expected a number above 0")
        if self.controlled.training:
            raise InputError("the model is in training mode, where dropout acts; call eval() first")

    @cached_property
    def start(self) -> tuple[Tensor, ...]:
        """The controls at z = 0."""
        return tuple(p.detach().clone() for p in self._parameters)

    @property
    def _parameters(self) -> tuple[torch.nn.Parameter, ...]:
        return tuple(self.controlled.trainable().values())

    def _margins(self, z: Tensor | None = None) -> Tensor:
        self._write(z)
        return self.read(self.controlled(**self.batch))

    def at(self, z: Tensor) -> float:
        """The loss of the network at z, without the decay; the controls are put back."""
        try:
            with torch.no_grad():
                return float(logistic_loss(self._margins(z), self.signs))
        finally:
            self._write(None)

    def objective(self, z: Tensor) -> tuple[float, Tensor]:
        """F and its gradient; the controls are put back."""
        try:
            loss = logistic_loss(self._margins(z), self.signs)
            slopes = torch.autograd.grad(
                loss, self._parameters, allow_unused=True, materialize_grads=True
            )
            return (
                float(loss.detach()) + 0.5 * self.decay * float(z @ z),
                flatten(slopes) + self.decay * z,
            )
        finally:
            self._write(None)

    def rows(self, chosen: Sequence[int]) -> Tuning:
        """The same on some of the rows, in this order."""
        at = list(chosen)
        batch = {name: value[at] for name, value in self.batch.items()}
        return replace(self, batch=batch, signs=self.signs[at])

    def linear(self) -> Linear:
        """The network linear in its controls, by one backward pass an example."""
        margins, rows = self._margins(), []
        for i, margin in enumerate(margins):
            slopes = torch.autograd.grad(
                margin, self._parameters, retain_graph=i + 1 < len(margins),
                allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            rows.append(flatten(slopes))
        J = torch.stack(rows)
        values, U = torch.linalg.eigh(J @ J.mT)
        S = values.clamp_min(0).sqrt()
        kept = S > NONE * S[-1]
        U, S = U[:, kept], S[kept]
        return Linear(margins.detach(), U, S, (U.mT @ J) / S[:, None], self.signs)

    def _write(self, z: Tensor | None) -> None:
        """The controls at z, or at the start."""
        at = self.start  # read before anything is written
        if z is not None:
            at = [a + b for a, b in zip(at, unflatten(z, at), strict=True)]
        with torch.no_grad():
            for parameter, value in zip(self._parameters, at, strict=True):
                parameter.copy_(value)


@dataclass(frozen=True)
class Closeness:
    """How close F and F̂ are, and what that says of their minimisers.

    Attributes:
        epsilon: the largest |F - F̂| on a set that holds the start, both minimisers, what is
            half-way to them, and the mirror images of all.
        gained: F at the start less the least F.
        gradient: of F at the end of its minimisation over that at the start.
        used: F at the minimiser of F̂ less the least F, over 2ε; 0 where nothing is lost.
        used_by: the same of minimisers of other objectives, by name.
        shares: 2ε over what is gained, by how many times the set is stretched; below 1 the bound
            says something.
    """

    epsilon: float
    gained: float
    gradient: float
    used: float
    used_by: Mapping[str, float]
    shares: Mapping[float, float]

    @classmethod
    def of(
        cls,
        tuning: Tuning,
        evaluations: int,
        *,
        tolerance: float = 0.0,
        others: Mapping[str, Tuning] | None = None,
        stretches: Sequence[float] = (1.0,),
    ) -> Closeness:
        """Minimise F by L-BFGS, and F̂.

        Args:
            tuning: F.
            evaluations: of F, at most.
            tolerance: end where the gradient has fallen to this share of that at the start.
            others: the same controls on other rows.
            stretches: of the set; 1 is the one that the minimisations need.
        """
        linear = tuning.linear()
        zero = linear.Vh.new_zeros(linear.Vh.shape[1])
        start, slope = tuning.objective(zero)
        enough = tolerance * float(slope.norm()) / len(zero) ** 0.5  # of each entry
        found = minimise_lbfgs(
            tuning.objective, zero, max_evaluations=evaluations, gradient_tolerance=enough
        )
        last = tuning.objective(found.best)[1].norm()
        real, close = found.best, linear.minimiser(tuning.decay)

        def epsilon(stretch: float) -> float:
            ends = [stretch * k * z for z in (real, close) for k in (0.5, 1.0, -0.5, -1.0)]
            return max(abs(tuning.at(z) - linear.at(z)) for z in (zero, *ends))

        reached = tuning.objective(close)[0]
        least = min(start, found.best_value, reached)
        allowed = 2 * epsilon(1.0)

        def used(value: float) -> float:
            return (value - least) / max(allowed, NOTHING) if value > least else 0.0

        return cls(
            epsilon=allowed / 2,
            gained=start - least,
            gradient=float(last / slope.norm().clamp_min(NOTHING)),
            used=used(reached),
            used_by={
                name: used(tuning.objective(other.linear().minimiser(tuning.decay))[0])
                for name, other in (others or {}).items()
            },
            shares={
                s: (allowed if s == 1 else 2 * epsilon(s)) / max(start - least, NOTHING)
                for s in stretches
            },
        )
