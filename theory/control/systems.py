"""Small systems with known structure: linear, residual, bilinear as LoRA is; and parts of systems.

The small ones act on the last axis of the state, ``(n,)`` or ``(batch, n)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.checks import require_one_dtype
from deltacontrol.theory.control.dynamics import Alike, Dynamics, alike_steps
from deltacontrol.theory.control.problem import Controls
from deltacontrol.theory.errors import InputError

__all__ = ["LinearDynamics", "LowRankDynamics", "ResidualNetwork", "Segment"]

MOST_RANK = 2**20


@typed
@dataclass(frozen=True, eq=False)
class LinearDynamics(Dynamics):
    """``x_{t+1} = A_t x_t + B_t u_t + c_t``; sizes may change from step to step.

    Attributes:
        A: ``(n_{t+1}, n_t)`` for each step; a stacked tensor ``(L, n, n)`` serves as well.
        B: ``(n_{t+1}, m_t)`` for each step.
        c: ``(n_{t+1},)`` for each step, or None.

    Raises:
        InputError: if the matrices of a step do not fit each other.
    """

    A: Sequence[Tensor] | Tensor
    B: Sequence[Tensor] | Tensor
    c: Sequence[Tensor] | Tensor | None = None

    def __post_init__(self) -> None:
        """Check the shapes of each step."""
        lengths = {"A": len(self.A), "B": len(self.B)}
        if self.c is not None:
            lengths["c"] = len(self.c)
        if len(set(lengths.values())) != 1:
            raise InputError(f"the matrices are for different numbers of steps: {lengths}")
        for t in range(len(self.A)):
            for name, term in (("A", self.A[t]), ("B", self.B[t])):
                if term.ndim != 2:
                    raise InputError(
                        f"{name}[{t}] has shape {tuple(term.shape)}; expected a matrix"
                    )
            if self.c is not None and self.c[t].ndim != 1:
                raise InputError(f"c[{t}] has shape {tuple(self.c[t].shape)}; expected a vector")
            rows = {"A": self.A[t].shape[0], "B": self.B[t].shape[0]}
            if self.c is not None:
                rows["c"] = self.c[t].shape[0]
            if len(set(rows.values())) != 1:
                raise InputError(f"step {t} has terms with different numbers of rows: {rows}")
            if t and self.A[t].shape[1] != self.A[t - 1].shape[0]:
                raise InputError(
                    f"A[{t}] has shape {tuple(self.A[t].shape)} but A[{t - 1}], of shape "
                    f"{tuple(self.A[t - 1].shape)}, gives {self.A[t - 1].shape[0]} state entries"
                )

        require_one_dtype(A=self.A, B=self.B, c=self.c)

    @classmethod
    def constant(cls, horizon: int, A: Tensor, B: Tensor) -> LinearDynamics:
        """The same ``A`` and ``B`` at each of ``horizon`` steps."""
        return cls(A=[A] * horizon, B=[B] * horizon)

    @property
    def horizon(self) -> int:
        """The number of steps."""
        return len(self.A)

    @property
    def control_sizes(self) -> tuple[int, ...]:
        """The number of columns of each ``B_t``."""
        return tuple(B.shape[1] for B in self.B)

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """``A_t x + B_t u + c_t``."""
        _check_width(t, x, self.A[t].shape[1])
        x_next = x @ self.A[t].mT + u @ self.B[t].mT
        return x_next if self.c is None else x_next + self.c[t]

    def all_steps(self, x: Tensor, u: Tensor) -> Tensor | None:
        """``A_t x_t + B_t u_t + c_t`` of all steps, where they have one size."""
        if self._stacked is None:
            return None
        A, B, c = self._stacked
        rows, controls = _rows(x), _rows(u)
        x_next = rows @ A.mT + controls @ B.mT
        return (x_next if c is None else x_next + c.unsqueeze(-2)).reshape(
            *x.shape[:-1], A.shape[-2]
        )

    @cached_property
    def _stacked(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        A, B = _stack(self.A), _stack(self.B)
        if A is None or B is None:
            return None
        return A, B, None if self.c is None else _stack(self.c)


@typed
@dataclass(frozen=True, eq=False)
class ResidualNetwork(Dynamics):
    """``x_{t+1} = x_t + W2_t tanh(W1_t x_t + B_t u_t)``: a frozen layer, the control in its bias.

    Attributes:
        W1: ``(h, n)`` for each layer.
        W2: ``(n, h)`` for each layer.
        B: ``(h, m_t)`` for each layer.

    Raises:
        InputError: if the matrices of a layer do not fit each other.
    """

    W1: Sequence[Tensor] | Tensor
    W2: Sequence[Tensor] | Tensor
    B: Sequence[Tensor] | Tensor

    def __post_init__(self) -> None:
        """Check the shapes of each layer."""
        lengths = {"W1": len(self.W1), "W2": len(self.W2), "B": len(self.B)}
        if len(set(lengths.values())) != 1:
            raise InputError(f"the matrices are for different numbers of layers: {lengths}")
        for t, (W1, W2, B) in enumerate(zip(self.W1, self.W2, self.B, strict=True)):
            if W1.ndim != 2 or W1.shape != W2.mT.shape or B.shape[:-1] != W1.shape[:1]:
                raise InputError(
                    f"layer {t} has W1 {tuple(W1.shape)}, W2 {tuple(W2.shape)}, "
                    f"B {tuple(B.shape)}; expected (h, n), (n, h), (h, m)"
                )
        require_one_dtype(W1=self.W1, W2=self.W2, B=self.B)

    @classmethod
    def random(
        cls,
        horizon: int,
        width: int,
        hidden: int,
        control_size: int,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> ResidualNetwork:
        """Gaussian layers; ``W1`` and ``B`` with variance ``1/fan-in``, ``W2`` with ``1/(L h)``.

        The further factor ``1/L`` keeps the state's size as the horizon grows.
        """
        generator = torch.Generator().manual_seed(seed)

        def gaussian(rows: int, columns: int, fan_in: int) -> Tensor:
            shape = (horizon, rows, columns)
            entries = torch.randn(shape, generator=generator, dtype=torch.float64)
            return (entries / max(fan_in, 1) ** 0.5).to(dtype)

        return cls(
            W1=gaussian(hidden, width, width),
            W2=gaussian(width, hidden, horizon * hidden),
            B=gaussian(hidden, control_size, control_size),
        )

    @property
    def horizon(self) -> int:
        """The number of layers."""
        return len(self.W1)

    @property
    def control_sizes(self) -> tuple[int, ...]:
        """The number of columns of each ``B_t``."""
        return tuple(B.shape[1] for B in self.B)

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """``x + W2_t tanh(W1_t x + B_t u)``."""
        return self.step_between(t, 0.0, x, u)

    def all_steps(self, x: Tensor, u: Tensor) -> Tensor | None:
        """``x_t + W2_t tanh(W1_t x_t + B_t u_t)`` of all layers, where they have one size."""
        if self._stacked is None:
            return None
        W1, W2, B = self._stacked
        inner = torch.tanh(_rows(x) @ W1.mT + _rows(u) @ B.mT)
        return x + (inner @ W2.mT).reshape(x.shape)

    @cached_property
    def _stacked(self) -> tuple[Tensor, Tensor, Tensor] | None:
        W1, W2, B = (_stack(M) for M in (self.W1, self.W2, self.B))
        return None if W1 is None or W2 is None or B is None else (W1, W2, B)

    def step_between(self, t: int, weight: float, x: Tensor, u: Tensor) -> Tensor:
        """The layer whose matrices are ``(1 - weight)`` times those of ``t`` + ``weight`` ``t+1``.

        With it a network has a continuous depth (`deltacontrol.theory.depth.continuous`).

        Args:
            t: a layer, and not the last one unless the weight is 0.
            weight: from 0 to 1.
            x: the state.
            u: the control.
        """
        _check_width(t, x, self.W1[t].shape[1])
        W1, W2, B = (
            M[t] if weight == 0 else torch.lerp(M[t], M[t + 1], weight)
            for M in (self.W1, self.W2, self.B)
        )
        return x + torch.tanh(x @ W1.mT + u @ B.mT) @ W2.mT


@typed
@dataclass(frozen=True, eq=False)
class LowRankDynamics(Dynamics):
    """``x_{t+1} = x_t (W_t + A_t B_t)`` with the control ``u_t = (A_t, B_t)``, as in LoRA.

    Linear in the state and bilinear in the control: without a running cost the Hamiltonian is not
    bounded below in ``u_t`` unless the costate or the state is zero.

    Attributes:
        weights: the frozen ``W_t``, ``(n_t, n_{t+1})``.
        rank: the number ``r`` of columns of ``A_t`` and of rows of ``B_t``.

    Raises:
        InputError: if the rank is not positive or beyond every matrix, or weights do not fit.
    """

    weights: Sequence[Tensor] | Tensor
    rank: int

    def __post_init__(self) -> None:
        """Check the rank."""
        if not 1 <= self.rank <= MOST_RANK:
            raise InputError(f"rank is {self.rank}; expected a number from 1 to {MOST_RANK}")
        for t, W in enumerate(self.weights):
            if W.ndim != 2:
                raise InputError(f"weights[{t}] has shape {tuple(W.shape)}; expected (n, n')")
        require_one_dtype(weights=self.weights)

    @property
    def horizon(self) -> int:
        """The number of weights."""
        return len(self.weights)

    @property
    def control_sizes(self) -> tuple[int, ...]:
        """``r (n_t + n_{t+1})`` for each step."""
        return tuple(self.rank * sum(W.shape) for W in self.weights)

    def factors(self, t: int, u: Tensor) -> tuple[Tensor, Tensor]:
        """``A_t``, ``(..., n_t, r)``, and ``B_t``, ``(..., r, n_{t+1})``, of a flat control."""
        rows, columns = self.weights[t].shape
        down, up = u.split([rows * self.rank, self.rank * columns], dim=-1)
        return down.unflatten(-1, (rows, self.rank)), up.unflatten(-1, (self.rank, columns))

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """``x (W_t + A_t B_t)``."""
        _check_width(t, x, self.weights[t].shape[0])
        down, up = self.factors(t, u)
        return x @ self.weights[t] + (x.unsqueeze(-2) @ down @ up).squeeze(-2)

    def all_steps(self, x: Tensor, u: Tensor) -> Tensor | None:
        """``x_t (W_t + A_t B_t)`` of all steps, where the weights have one size."""
        weights = self._stacked
        if weights is None:
            return None
        rows, controls = _rows(x), _rows(u)
        down, up = self.factors(0, controls)  # (L, batch or 1, ...)
        through = (rows.unsqueeze(-2) @ down @ up).squeeze(-2)
        return (rows @ weights + through).reshape(*x.shape[:-1], weights.shape[-1])

    @cached_property
    def _stacked(self) -> Tensor | None:
        return _stack(self.weights)


@typed
@dataclass(frozen=True, eq=False)
class Segment(Dynamics):
    """The steps ``start <= t < stop`` of a system, numbered from 0.

    Its initial state is ``x_start`` of the whole and its controls are ``u[start:stop]``. A model's
    blocks without its input and readout are one.

    Attributes:
        dynamics: the whole system.
        start: its first step that belongs to the segment.
        stop: its first step after the segment; by default its horizon.

    Raises:
        InputError: if the segment is empty or reaches beyond the system.
    """

    dynamics: Dynamics
    start: int
    stop: int | None = None

    def __post_init__(self) -> None:
        """Check the ends."""
        if not 0 <= self.start < self._end <= self.dynamics.horizon:
            raise InputError(
                f"a segment from step {self.start} to step {self._end} of a system of "
                f"{self.dynamics.horizon} steps; expected 0 <= start < stop <= horizon"
            )

    @property
    def _end(self) -> int:
        return self.dynamics.horizon if self.stop is None else self.stop

    @property
    def horizon(self) -> int:
        """The number of steps of the segment."""
        return self._end - self.start

    @property
    def control_sizes(self) -> tuple[int, ...]:
        """The control sizes of its steps."""
        return self.dynamics.control_sizes[self.start : self._end]

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """``f_{start + t}(x, u)``."""
        return self.dynamics.step(self.start + t, x, u)

    def alike(self) -> Alike | None:
        """Those of the whole system that lie in the segment."""
        found = alike_steps(self.dynamics)
        if found is None:
            return None
        first, last = max(found.start, self.start), min(found.stop, self._end)
        if last - first < 2:
            return None
        chosen = slice(first - found.start, last - found.start)
        constants = {name: value[chosen] for name, value in found.constants.items()}
        return Alike(first - self.start, last - self.start, constants, found.function)

    def initial_controls(self, x0: Tensor) -> Controls:
        """Those of its steps in the whole system."""
        return self.dynamics.initial_controls(x0)[self.start : self._end]


def _stack(terms: Sequence[Tensor] | Tensor) -> Tensor | None:
    """The terms of all steps in one tensor, or None where their shapes differ."""
    if isinstance(terms, Tensor):
        return terms
    if len({term.shape for term in terms}) != 1:
        return None
    return torch.stack(list(terms))


def _rows(values: Tensor) -> Tensor:
    """``(L, examples, n)``, also of values ``(L, n)`` that have no batch axis."""
    return values.unsqueeze(-2) if values.ndim == 2 else values


def _check_width(t: int, x: Tensor, width: int) -> None:
    if x.shape[-1:] != (width,):
        raise InputError(
            f"state entering step {t} has shape {tuple(x.shape)}; expected (..., {width})"
        )
    if not x.is_floating_point():
        raise InputError(
            f"state entering step {t} has dtype {x.dtype}; expected floats: give it .double(), or "
            "the dtype of the controls"
        )
