"""Concrete costs on tensors.

The terminal cost is averaged over the batch. So is the running cost of per-example controls: with
every row equal it has the value that the shared control has.

A state ``(n,)`` is one example; in a state ``(batch, ...)`` the first axis numbers the examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.checks import require_one_dtype
from deltacontrol.theory.control.problem import Cost
from deltacontrol.theory.errors import InputError

__all__ = ["BinaryCrossEntropyCost", "CrossEntropyCost", "QuadraticCost", "SquaredErrorCost"]


@typed
@dataclass(frozen=True, eq=False)
class CrossEntropyCost(Cost):
    """``Phi(x) = -mean log softmax(x)[label]``, ``l_t(x, u) = weight_decay/2 ||u||^2``.

    Attributes:
        labels: class numbers, shape of the logits without their last axis.
        weight_decay: the factor of the running cost.
        ignore_index: positions with this label do not count, nor enter the mean.

    Raises:
        InputError: if no label counts, the weight decay is negative or infinite, or logits and
            labels have different shapes.
    """

    labels: Tensor
    weight_decay: float = 0.0
    ignore_index: int = -100

    def __post_init__(self) -> None:
        """Refuse labels that are no class numbers, or that all are ignored."""
        _require_decay(self.weight_decay)
        if self.labels.dtype not in (
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
        ):
            raise InputError(
                f"the labels are {self.labels.dtype}; expected class numbers, such as int64"
            )
        if bool((self.labels == self.ignore_index).all()):
            raise InputError(
                f"every one of the {self.labels.numel()} labels is ignored ({self.ignore_index}); "
                "the mean loss of no example is undefined"
            )

    def running(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """``weight_decay/2 ||u||^2``."""
        return _decay(self.weight_decay, u)

    def all_running(self, x: Tensor, u: Tensor) -> Tensor | None:
        """``weight_decay/2 ||u_t||^2`` of each step."""
        return 0.5 * self.weight_decay * _rows(u).square().sum(-1).mean(-1)

    def terminal(self, x: Tensor) -> Tensor:
        """Mean cross-entropy of the logits ``x``, shape ``(..., classes)``."""
        if x.shape[:-1] != self.labels.shape:
            raise InputError(
                f"logits have shape {tuple(x.shape)} and labels {tuple(self.labels.shape)}; "
                "expected logits (..., classes) and labels (...)"
            )
        return functional.cross_entropy(
            x.reshape(-1, x.shape[-1]), self.labels.reshape(-1), ignore_index=self.ignore_index
        )


@typed
@dataclass(frozen=True, eq=False)
class BinaryCrossEntropyCost(Cost):
    """``Phi(x) = -mean [y log s(x) + (1-y) log s(-x)]``, ``s`` the logistic function.

    The mean is over all entries, examples and labels. ``l_t(x, u) = weight_decay/2 ||u||^2``.

    Attributes:
        labels: real numbers y from 0 to 1, of the shape of the logits: how far each label applies.
        weight_decay: the factor of the running cost.

    Raises:
        InputError: if labels are no such numbers, the weight decay is negative or infinite, or
            logits and labels have different shapes.
    """

    labels: Tensor
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse integers, and numbers that are no shares."""
        _require_decay(self.weight_decay)
        real = self.labels.is_floating_point()
        if not real or not bool(((self.labels >= 0) & (self.labels <= 1)).all()):
            found = str(self.labels.dtype).removeprefix("torch.")
            if real:
                found += f" from {float(self.labels.min()):g} to {float(self.labels.max()):g}"
            raise InputError(
                f"the labels are {found}; expected real numbers from 0 to 1, one for each logit"
            )

    def running(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """``weight_decay/2 ||u||^2``."""
        return _decay(self.weight_decay, u)

    def all_running(self, x: Tensor, u: Tensor) -> Tensor | None:
        """``weight_decay/2 ||u_t||^2`` of each step."""
        return 0.5 * self.weight_decay * _rows(u).square().sum(-1).mean(-1)

    def terminal(self, x: Tensor) -> Tensor:
        """Mean binary cross-entropy of the logits ``x``, shape ``(examples, labels)``."""
        if x.shape != self.labels.shape:
            raise InputError(
                f"logits have shape {tuple(x.shape)} and labels {tuple(self.labels.shape)}; "
                "they must be equal where an example has several labels"
            )
        return functional.binary_cross_entropy_with_logits(x, self.labels)


@typed
@dataclass(frozen=True, eq=False)
class SquaredErrorCost(Cost):
    """``Phi(x) = 1/2 mean_batch ||x - target||^2``, ``l_t(x, u) = weight_decay/2 ||u||^2``.

    Attributes:
        target: the wanted final state, of its shape.
        weight_decay: the factor of the running cost.

    Raises:
        InputError: if the state and the target have different shapes, or the weight decay is
            negative or infinite.
    """

    target: Tensor
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse switches."""
        _require_decay(self.weight_decay)
        if self.target.dtype == torch.bool:
            raise InputError("the target is torch.bool; expected numbers, such as float64")

    def running(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """``weight_decay/2 ||u||^2``."""
        return _decay(self.weight_decay, u)

    def all_running(self, x: Tensor, u: Tensor) -> Tensor | None:
        """``weight_decay/2 ||u_t||^2`` of each step."""
        return 0.5 * self.weight_decay * _rows(u).square().sum(-1).mean(-1)

    def terminal(self, x: Tensor) -> Tensor:
        """Half the squared distance to the target, averaged over the batch."""
        if x.shape != self.target.shape:
            raise InputError(
                f"the final state has shape {tuple(x.shape)} and the target "
                f"{tuple(self.target.shape)}; they must be equal"
            )
        return 0.5 * (x - self.target).square().sum() / _examples(x)


@typed
@dataclass(frozen=True, eq=False)
class QuadraticCost(Cost):
    """The cost of a time-varying linear-quadratic problem, with cross and affine terms.

    ``l_t(x, u) = 1/2 x'Q_t x + 1/2 u'R_t u + x'N_t u + q_t'x + r_t'u``,
    ``Phi(x) = 1/2 x'Qf x + qf'x``; only the symmetric parts of ``Q_t``, ``R_t``, ``Qf`` matter.

    Attributes:
        Q: ``(n_t, n_t)`` for each step; a stacked tensor ``(L, n, n)`` serves as well.
        R: ``(m_t, m_t)`` for each step.
        Qf: ``(n_L, n_L)``.
        N: ``(n_t, m_t)`` for each step, or None (`s` of `scipy.linalg.solve_discrete_are`).
        q: ``(n_t,)`` for each step, or None.
        r: ``(m_t,)`` for each step, or None.
        qf: ``(n_L,)``, or None.

    Raises:
        InputError: if a matrix does not fit the others of its step.
    """

    Q: Sequence[Tensor] | Tensor
    R: Sequence[Tensor] | Tensor
    Qf: Tensor
    N: Sequence[Tensor] | Tensor | None = None
    q: Sequence[Tensor] | Tensor | None = None
    r: Sequence[Tensor] | Tensor | None = None
    qf: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the shapes and dtypes of each step."""
        horizon = len(self.R)
        if len(self.Q) != horizon:
            raise InputError(f"Q has {len(self.Q)} entries and R {horizon}")
        for t in range(horizon):
            for name, matrix in (("Q", self.Q[t]), ("R", self.R[t])):
                if matrix.ndim != 2:
                    raise InputError(
                        f"{name}[{t}] has shape {tuple(matrix.shape)}; expected a matrix"
                    )
            n, m = self.Q[t].shape[-1], self.R[t].shape[-1]
            expected = {"Q": (n, n), "R": (m, m), "N": (n, m), "q": (n,), "r": (m,)}
            for name, shape in expected.items():
                terms = getattr(self, name)
                if terms is None:
                    continue
                if len(terms) != horizon:
                    raise InputError(f"{name} has {len(terms)} entries and R {horizon}")
                _check(f"{name}[{t}]", terms[t], shape)
        if self.Qf.ndim != 2:
            raise InputError(f"Qf has shape {tuple(self.Qf.shape)}; expected a matrix")
        n = self.Qf.shape[-1]
        _check("Qf", self.Qf, (n, n))
        if self.qf is not None:
            _check("qf", self.qf, (n,))
        ends = {"Qf": self.Qf[None], "qf": None if self.qf is None else self.qf[None]}
        require_one_dtype(Q=self.Q, R=self.R, N=self.N, q=self.q, r=self.r, **ends)

    @classmethod
    def constant(
        cls, horizon: int, Q: Tensor, R: Tensor, Qf: Tensor, N: Tensor | None = None
    ) -> QuadraticCost:
        """The same ``Q``, ``R`` and ``N`` at each of ``horizon`` steps."""
        cross = None if N is None else [N] * horizon
        return cls(Q=[Q] * horizon, R=[R] * horizon, Qf=Qf, N=cross)

    def running(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """``1/2 x'Q_t x + 1/2 u'R_t u + x'N_t u + q_t'x + r_t'u``, averaged over the batch."""
        value = 0.5 * _form(x, self.Q[t], x) + 0.5 * _form(u, self.R[t], u)
        if self.N is not None:
            value = value + _form(x, self.N[t], u)
        if self.q is not None:
            value = value + (x @ self.q[t]).mean()
        if self.r is not None:
            value = value + (u @ self.r[t]).mean()
        return value

    def all_running(self, x: Tensor, u: Tensor) -> Tensor | None:
        """`running` of each step, where the steps have one size."""
        if self._stacked is None:
            return None
        Q, R, N, q, r = self._stacked
        x, u = _rows(x), _rows(u)
        value = 0.5 * _forms(x, Q, x) + 0.5 * _forms(u, R, u)
        if N is not None:
            value = value + _forms(x, N, u)
        if q is not None:
            value = value + (x @ q.unsqueeze(-1)).flatten(1).mean(1)
        if r is not None:
            value = value + (u @ r.unsqueeze(-1)).flatten(1).mean(1)
        return value

    @cached_property
    def _stacked(self) -> tuple[Tensor, Tensor, *tuple[Tensor | None, ...]] | None:
        terms = []
        for given in (self.Q, self.R, self.N, self.q, self.r):
            if given is None or isinstance(given, Tensor):
                terms.append(given)
            elif len({term.shape for term in given}) == 1:
                terms.append(torch.stack(list(given)))
            else:
                return None
        return tuple(terms)

    def terminal(self, x: Tensor) -> Tensor:
        """``1/2 x'Qf x + qf'x``, averaged over the batch."""
        value = 0.5 * _form(x, self.Qf, x)
        return value if self.qf is None else value + (x @ self.qf).mean()


def _form(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """``mean_batch left' M right``; an argument without a batch axis is shared by the batch."""
    return ((left @ matrix) * right).sum(-1).mean()


def _forms(left: Tensor, matrices: Tensor, right: Tensor) -> Tensor:
    """`_form` of each step, ``(L, examples, n)`` with ``(L, n, m)`` and ``(L, examples, m)``."""
    return ((left @ matrices) * right).sum(-1).mean(-1)


def _rows(values: Tensor) -> Tensor:
    """``(L, examples, n)``, also of values ``(L, n)`` that have no batch axis."""
    return values.unsqueeze(-2) if values.ndim == 2 else values


def _require_decay(weight_decay: float) -> None:
    if not 0.0 <= weight_decay < math.inf:
        raise InputError(
            f"weight_decay is {weight_decay}; expected a finite number >= 0: below, J falls "
            "without end as the controls grow"
        )


def _decay(weight_decay: float, u: Tensor) -> Tensor:
    return 0.5 * weight_decay * u.square().sum(-1).mean()


def _examples(x: Tensor) -> int:
    return x.shape[0] if x.ndim > 1 else 1


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != torch.Size(shape):
        raise InputError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
