"""Which outputs the controls reach, and at what energy: the output controllability Gramian.

Along a linearised rollout (`deltacontrol.theory.linear.linearisation`) the controls move the state
of stage ``s`` by

    dx_s = sum_{t<s} C_t du_t,   C_t = Phi_t B_t,   Phi_t = A_{s-1} ... A_{t+1}.

With the control energy ``1/2 sum_t du_t' R_t du_t``, ``R_t`` diagonal, the Gramian is

    W = sum_t W_t,   W_t = Phi_t B_t R_t^-1 B_t' Phi_t'.

What a change of the output costs, and which part of it no control reaches, is in
`deltacontrol.theory.linear.output_map`.

`Reachability` is the operator ``C``, known by products alone, and `Reachability.gramian` is ``W = C
R^-1 C'``. Where the output is small (the logits of a few examples, or a few linear functionals of a
large state) `Reachability.output_map` computes the rows of ``C`` by one batch of adjoints, and
everything about `OutputMap` is exact.

Shared and per-example controls. A control shared by a batch must move all examples at once: its
Gramian couples them, and is the empirical tangent kernel of the control. With one control for each
example ``W`` is block diagonal over examples that do not interact.

Sources: Kalman, Ho & Narendra, Contributions to Differential Equations 1, 1963; Jacot, Gabriel &
Hongler, NeurIPS 2018 (the tangent kernel).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.conjugate_gradients import conjugate_gradients
from deltacontrol.theory.linear.linearisation import Linearisation
from deltacontrol.theory.linear.operator import (
    Congruence,
    Diagonal,
    LinearOperator,
    Shifted,
    SymmetricOperator,
    flatten,
    mapped,
    unflatten,
)
from deltacontrol.theory.linear.output_map import (
    MinimumEnergy,
    OutputMap,
    Part,
    checked_part,
    energies,
)

__all__ = ["Reachability"]

Access: TypeAlias = Sequence[Tensor | float]


@typed
@dataclass(frozen=True, eq=False, repr=False)
class Reachability(LinearOperator):
    """The output map ``C`` of a linearised rollout: flat controls to the flat output.

    Attributes:
        linearisation: the linear system; for `minimum_energy` make it with ``keep=True``.
        stage: ``s``, the output is the change of ``x_s``; None means the final state.
        access: ``diag(R_t^-1)`` for each step, a number or a tensor that broadcasts to ``u_t``; 0
            switches an entry off; None means 1. It weighs `gramian`; products with ``C`` itself are
            not masked.
        chunk: vectors of a block that are worked on at once; all by default.

    Raises:
        InputError: if the stage does not exist, or an access is negative or does not fit.
    """

    linearisation: Linearisation
    stage: int | None = None
    access: Access | None = None
    chunk: int | None = None
    _stage: int = field(default=0, init=False, repr=False)
    _access: tuple[Tensor, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the stage, and give every entry of the controls its access."""
        horizon, controls = self.linearisation.horizon, self.linearisation.controls
        stage = horizon if self.stage is None else self.stage
        if not 1 <= stage <= horizon:
            raise InputError(f"stage is {stage}; expected 1 to {horizon}, or None for the last")
        if self.chunk is not None and self.chunk < 1:
            raise InputError(f"chunk is {self.chunk}; expected at least 1, or None for the default")
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
        entries = sum(u.numel() for u in controls)
        super().__init__((self.output.numel(), entries), self.output.dtype, self.output.device)

    def restricted(self, part: Part) -> Reachability:
        """The same outputs with no entries but those of `part` (indices of the flat controls)."""
        access = [torch.zeros_like(a) for a in self._access]
        for t, entries in checked_part(part, len(access)).items():
            access[t].reshape(-1)[entries] = self._access[t].reshape(-1)[entries]
        return Reachability(self.linearisation, self.stage, access, self.chunk)

    @property
    def output(self) -> Tensor:
        """The state whose change is the output."""
        return self.linearisation.states[self._stage]

    def _product(self, x: Tensor) -> Tensor:
        lin = self.linearisation

        def moved(row: Tensor) -> Tensor:
            du = unflatten(row, lin.controls)
            dx = torch.zeros_like(lin.states[0], dtype=self.dtype)
            for t in range(self._stage):
                dx = lin.tangent_step(t, dx, du[t])
            return dx.reshape(-1)

        return mapped(moved, x, self.shape[0], self.chunk)

    def _transpose_product(self, y: Tensor) -> Tensor:
        lin = self.linearisation

        def controls(row: Tensor) -> Tensor:
            q, found = row.reshape(self.output.shape), [torch.zeros_like(u) for u in lin.controls]
            for t in reversed(range(self._stage)):
                q, found[t] = lin.adjoint_step(t, q)
            return flatten(found)

        return mapped(controls, y, self.shape[1], self.chunk)

    @property
    def gramian(self) -> SymmetricOperator:
        """``W = C R^-1 C'``, on the flat output."""
        return Congruence(self, Diagonal(flatten(self._access)))

    def output_map(self, functionals: Tensor | None = None) -> OutputMap:
        """The rows of ``C``, or of ``K C`` for ``k`` linear functionals ``K`` of the output.

        Args:
            functionals: ``(k, *shape of the output)``; by default every entry of the output.

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
        rows = functionals.flatten(1) @ self
        shapes = tuple(u.shape for u in self.linearisation.controls)
        blocks = rows.split([shape.numel() for shape in shapes], 1)
        return OutputMap(blocks, tuple(a.reshape(-1) for a in self._access), shapes)

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
        y = target.reshape(-1)
        system = Shifted(self.gramian, damping)
        found = conjugate_gradients(system, -y, rtol=tol, max_products=max_steps)
        q = found.step
        flat = flatten(self._access) * (q @ self)
        control = unflatten(flat, self.linearisation.controls)
        per_step = energies(control, self._access)
        left = y - self @ flat
        goal = tol**2 * y.square().sum()
        converged = bool((left - damping * q).square().sum() <= 4 * goal)
        return MinimumEnergy(
            sum(per_step),
            per_step,
            control,
            q.reshape(target.shape),
            left.reshape(target.shape),
            found.products,
            converged,
        )
