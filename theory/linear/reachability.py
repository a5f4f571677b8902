"""Which outputs the controls reach, and at what energy: the output controllability Gramian.

Along a linearised rollout (`deltacontrol.theory.linear.linearisation`) the controls move the state
of stage ``s`` by

    dx_s = sum_{t<s} C_t du_t,   C_t = Phi_t B_t,   Phi_t = A_{s-1} ... A_{t+1}.

With the control energy ``1/2 sum_t du_t' R_t du_t``, ``R_t`` diagonal, the Gramian is

    W = sum_t W_t,   W_t = Phi_t B_t R_t^-1 B_t' Phi_t'.

What a change of the output costs, and which part of it no control reaches, is in
`deltacontrol.theory.linear.output_map`.

`Reachability` needs products alone: ``W q = push(R^-1 pull(q))``. Where the output is small (the
logits of a few examples, or a few linear functionals of a large state) `Reachability.output_map`
computes the rows of ``C`` by one batched pull, and everything about `OutputMap` is exact.

Shared and per-example controls. A control shared by a batch must move all examples at once: its
Gramian couples them, and is the empirical tangent kernel of the control. With one control for each
example ``W`` is block diagonal over examples that do not interact.

Sources: Kalman, Ho & Narendra, Contributions to Differential Equations 1, 1963; Jacot, Gabriel &
Hongler, NeurIPS 2018 (the tangent kernel).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from deltacontrol.theory.control.problem import Controls
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.linearisation import Linearisation, differentiable_attention
from deltacontrol.theory.linear.output_map import (
    MinimumEnergy,
    OutputMap,
    Part,
    checked_part,
    energies,
)
from deltacontrol.theory.linear.sketching import (
    Block,
    Spectrum,
    TraceEstimate,
    hutchpp,
    leading_spectrum,
)

__all__ = ["Reachability"]

Access: TypeAlias = Sequence[Tensor | float]


@dataclass(frozen=True, eq=False)
class Reachability:
    """The output map of a linearised rollout, matrix-free.

    Attributes:
        linearisation: the linear system; for `minimum_energy` make it with ``keep=True``.
        stage: ``s``, the output is the change of ``x_s``; None means the final state.
        access: ``diag(R_t^-1)`` for each step, a number or a tensor that broadcasts to ``u_t``; 0
            switches an entry off; None means 1.

    Raises:
        InputError: if the stage does not exist, or an access is negative or does not fit.
    """

    linearisation: Linearisation
    stage: int | None = None
    access: Access | None = None
    _stage: int = field(default=0, init=False, repr=False)
    _access: tuple[Tensor, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the stage, and give every entry of the controls its access."""
        horizon, controls = self.linearisation.horizon, self.linearisation.controls
        stage = horizon if self.stage is None else self.stage
        if not 1 <= stage <= horizon:
            raise InputError(f"stage is {stage}; expected 1 to {horizon}, or None for the last")
        given = [1.0] * horizon if self.access is None else self.access
        if len(given) != horizon:
            raise InputError(f"access has {len(given)} entries; expected {horizon}, one per step")
        access = []
        for t, (a, u) in enumerate(zip(given, controls, strict=True)):
            a = torch.as_tensor(a, dtype=u.dtype, device=u.device)
            if not bool((a >= 0).all() and a.isfinite().all()):
                raise InputError(f"access at step {t} is negative or not finite; it is diag(R^-1)")
            try:
                access.append((a.expand(u.shape) * float(t < stage)).contiguous())
            except RuntimeError as error:
                raise InputError(
                    f"access at step {t} has shape {tuple(a.shape)}; the control has "
                    f"{tuple(u.shape)}"
                ) from error
        object.__setattr__(self, "_stage", stage)
        object.__setattr__(self, "_access", tuple(access))

    def restricted(self, part: Part) -> Reachability:
        """The same outputs with no entries but those of `part` (indices of the flat controls)."""
        access = [torch.zeros_like(a) for a in self._access]
        for t, entries in checked_part(part, len(access)).items():
            access[t].reshape(-1)[entries] = self._access[t].reshape(-1)[entries]
        return Reachability(self.linearisation, self.stage, access)

    @property
    def output(self) -> Tensor:
        """The state whose change is the output."""
        return self.linearisation.states[self._stage]

    def push(self, du: Controls) -> Tensor:
        """``C du``, of the shape of the output; entries without access are not masked."""
        lin = self.linearisation
        dx = torch.zeros_like(lin.states[0], dtype=self.output.dtype)
        for t in range(self._stage):
            dx = lin.push_step(t, dx, du[t])
        return dx

    def pull(self, q: Tensor) -> Controls:
        """``C' q``, of the shapes of the controls; zero from the output's stage on."""
        found = [torch.zeros_like(u) for u in self.linearisation.controls]
        for t in reversed(range(self._stage)):
            q, found[t] = self.linearisation.pull_step(t, q)
        return tuple(found)

    def apply(self, q: Tensor) -> Tensor:
        """``W q = C R^-1 C' q``, of the shape of the output."""
        pulled = self.pull(q)
        return self.push(tuple(a * g for a, g in zip(self._access, pulled, strict=True)))

    def output_map(
        self, functionals: Tensor | None = None, *, chunk: int | None = None
    ) -> OutputMap:
        """The rows of ``C``, or of ``K C`` for ``k`` linear functionals ``K`` of the output.

        Args:
            functionals: ``(k, *shape of the output)``; by default every entry of the output.
            chunk: rows that are pulled at once; all by default.

        Raises:
            InputError: if the functionals have not the shape of the output.
        """
        shape = self.output.shape
        if functionals is None:
            eye = torch.eye(self.output.numel(), dtype=self.output.dtype, device=self.output.device)
            functionals = eye.reshape(-1, *shape)
        if functionals.shape[1:] != shape:
            raise InputError(
                f"the functionals have shape {tuple(functionals.shape)}; expected (k, "
                f"{', '.join(map(str, shape))}), one output a row"
            )
        rows = self._pull_block(functionals, chunk)
        blocks = tuple(r.reshape(len(functionals), -1) for r in rows)
        shapes = tuple(u.shape for u in self.linearisation.controls)
        return OutputMap(blocks, tuple(a.reshape(-1) for a in self._access), shapes)

    def spectrum(
        self,
        num_values: int,
        *,
        oversampling: int = 8,
        iterations: int = 2,
        seed: int = 0,
        chunk: int | None = None,
    ) -> Spectrum:
        """Leading eigenvalues of ``W``; see `linear.sketching.leading_spectrum`."""
        return leading_spectrum(
            self._block(chunk),
            self.output.numel(),
            num_values,
            oversampling=oversampling,
            iterations=iterations,
            seed=seed,
            dtype=self.output.dtype,
            device=self.output.device,
        )

    def trace(self, num_products: int, *, seed: int = 0, chunk: int | None = None) -> TraceEstimate:
        """``tr W``; see `deltacontrol.theory.linear.sketching.hutchpp`."""
        return hutchpp(
            self._block(chunk),
            self.output.numel(),
            num_products,
            seed=seed,
            dtype=self.output.dtype,
            device=self.output.device,
        )

    def minimum_energy(
        self, target: Tensor, *, damping: float, tol: float = 1e-10, max_steps: int = 500
    ) -> MinimumEnergy:
        """The control of least energy close to ``target``: conjugate gradients on ``W + damping``.

        ``du`` minimises ``1/2 du'R du + 1/(2 damping) ||C du - y||^2``. Its energy is below that of
        the exact control, which it approaches as the damping falls.

        Args:
            target: ``y``, of the shape of the output.
            damping: positive; small beside the eigenvalues of ``W`` that matter.
            tol: on the residual of the linear system, relative to the target.
            max_steps: largest number of products with ``W``.

        Raises:
            InputError: if the target has another shape, or the damping is not positive.
        """
        if target.shape != self.output.shape:
            raise InputError(
                f"the target has shape {tuple(target.shape)}; expected that of the output, "
                f"{tuple(self.output.shape)}"
            )
        if not damping > 0:
            raise InputError(f"damping is {damping}; expected a positive number")
        q = torch.zeros_like(target)
        residual = target.clone()
        direction, square = residual, residual.square().sum()
        goal = tol**2 * square
        steps = 0
        while steps < max_steps and bool(square > goal):
            product = self.apply(direction) + damping * direction
            length = square / (direction * product).sum()
            q = q + length * direction
            residual = residual - length * product
            before, square = square, residual.square().sum()
            direction = residual + square / before * direction
            steps += 1
        pulled = self.pull(q)
        control = tuple(a * g for a, g in zip(self._access, pulled, strict=True))
        per_step = energies(control, self._access)
        left = target - self.push(control)
        converged = bool((left - damping * q).square().sum() <= 4 * goal)
        return MinimumEnergy(sum(per_step), per_step, control, q, left, steps, converged)

    def _block(self, chunk: int | None) -> Block:
        """Products with ``W`` for `linear.sketching`: flat rows to flat rows."""

        def apply(rows: Tensor) -> Tensor:
            pulled = self._pull_block(rows.reshape(-1, *self.output.shape), chunk)
            du = [a * g for a, g in zip(self._access, pulled, strict=True)]
            return self._push_block(du, chunk).reshape(rows.shape)

        return apply

    def _pull_block(self, q: Tensor, chunk: int | None) -> list[Tensor]:
        """`pull` of many rows: each step is evaluated once for all of them."""
        lin = self.linearisation
        found = [u.new_zeros(len(q), *u.shape) for u in lin.controls]
        for t in reversed(range(self._stage)):
            with differentiable_attention():
                pull = torch.func.vjp(*_step(lin, t))[1]
                *state, found[t] = torch.func.vmap(pull, chunk_size=chunk)(q)
            q = state[0] if state else q
        return found

    def _push_block(self, du: Sequence[Tensor], chunk: int | None) -> Tensor:
        """`push` of many rows."""
        lin, rows = self.linearisation, len(du[0])
        dx = torch.zeros(rows, *lin.states[0].shape, dtype=self.output.dtype)
        dx = dx.to(self.output.device)
        for t in range(self._stage):
            f, *at = _step(lin, t)
            along = (dx, du[t])[-len(at) :]

            def forward(*along: Tensor, f=f, at=at) -> Tensor:
                return torch.func.jvp(f, tuple(at), along)[1]

            with differentiable_attention(), torch.no_grad():
                dx = torch.func.vmap(forward, chunk_size=chunk)(*along)
        return dx


def _step(lin: Linearisation, t: int) -> tuple[Callable[..., Tensor], *tuple[Tensor, ...]]:
    """Step ``t`` and what it is differentiated by: its state, unless that holds integers."""
    x, u = lin.states[t].detach(), lin.controls[t].detach()
    if x.is_floating_point():
        return (lambda x, u: lin.dynamics.step(t, x, u)), x, u
    return (lambda u: lin.dynamics.step(t, x, u)), u
