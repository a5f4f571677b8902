"""First and second derivatives of all steps along a trajectory, as dense matrices.

Everything has a leading axis of ``G`` groups that do not interact: controls shared by the batch
give one group whose state is the whole batch, flattened; controls ``(batch, m_t)`` give one group
per example. The steps of one trajectory do not interact either. Where a system offers them all at
once (`Dynamics.all_steps`), one reverse sweep gives the Jacobians of all. The loop over steps is
the reference, and what serves every other system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from deltacontrol.theory.control.dynamics import Dynamics, offers
from deltacontrol.theory.control.problem import ControlProblem, Controls, Evaluation
from deltacontrol.theory.control.work import count
from deltacontrol.theory.errors import InputError

__all__ = ["Along", "evaluate", "hessian", "jacobians", "num_groups", "one_by_one", "running_costs"]

Matrices: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor]]

_CHUNK = 256
MOST_COPIED = 2**24
"""Entries of the copies of examples: 128 MiB in float64."""


def num_groups(u: Controls) -> int:
    """The number of problems that do not interact: the batch for controls per example, else 1."""
    return u[0].shape[0] if u and u[0].ndim == 2 else 1


def one_by_one(
    problem: ControlProblem,
    u: Controls,
    now: Evaluation,
    second_order: bool,
    steps: Iterable[int] | None = None,
) -> Matrices:
    """``A_t``, ``B_t`` and ``W_t`` of every step, one step after another.

    Args:
        problem: the problem.
        u: the controls.
        now: what ``problem.evaluate(u)`` gives.
        second_order: take the Hessian of ``H_t`` for ``W_t`` rather than that of ``l_t``.
        steps: of these steps alone, by default of all.
    """
    groups = num_groups(u)
    A, B, W = [], [], []
    for t in range(len(u)) if steps is None else steps:
        x, u_t = now.states[t].detach(), u[t].detach()

        def step(x: Tensor, u: Tensor, t: int = t) -> Tensor:
            return problem.dynamics.step(t, x, u)

        for matrices, found in zip((A, B), jacobians(step, x, u_t, groups), strict=True):
            matrices.append(found)
        W.append(stage_hessian(problem, u, now, second_order, t))
    return A, B, W


def stage_hessian(
    problem: ControlProblem, u: Controls, now: Evaluation, second_order: bool, t: int
) -> Tensor:
    """``W_t``, ``(G, n_t + m_t, n_t + m_t)``; arguments are those of `one_by_one`."""
    x, u_t, p = now.states[t].detach(), u[t].detach(), now.costates[t + 1]

    def stage(x: Tensor, u: Tensor) -> Tensor:
        if second_order:
            return problem.hamiltonian(t, x, u, p)
        return problem.cost.running(t, x, u)

    return hessian(stage, x, u_t, num_groups(u))


@dataclass(frozen=True, eq=False)
class Along:
    """Jacobians of all steps along a trajectory, taken together.

    Attributes:
        X: the states entering the steps, ``(L, examples, n)``.
        U: the controls, ``(L, examples, m)``.
        A: ``(L, examples, n, n)``.
        B: ``(L, examples, n, m)``.
        shared: whether the examples share the controls.
    """

    X: Tensor
    U: Tensor
    A: Tensor
    B: Tensor
    shared: bool

    @classmethod
    def of(cls, problem: ControlProblem, u: Controls, states: Sequence[Tensor]) -> Along | None:
        """The Jacobians, or None where the problem does not offer all steps at once.

        Raises:
            InputError: if `Dynamics.all_steps` gives other states than `Dynamics.step`.
        """
        dynamics, cost, horizon = problem.dynamics, problem.cost, len(u)
        offered = offers(dynamics, "step", "all_steps") and offers(cost, "running", "all_running")
        if not (offered and horizon > 1 and _alike(states) and _alike(u)):
            return None
        x, size = states[0], states[0].shape[-1] + u[0].shape[-1]
        if x.ndim not in (1, 2) or horizon * x.numel() * size > MOST_COPIED:
            return None
        X, U = (torch.stack(list(part)).detach() for part in (states, u))
        X, X_next = X[:-1], X[1:]
        with torch.no_grad():
            y, running = dynamics.all_steps(X, U), cost.all_running(X, U)
        if y is None or running is None:
            return None
        error, norm = float((y - X_next).norm()), float(X_next.norm())
        if error > 1e4 * torch.finfo(X.dtype).eps * norm:
            raise InputError(
                f"{type(dynamics).__name__}.all_steps gives states that differ from those of step "
                f"by {error:.2g} of {norm:.2g}; expected the same"
            )
        shared = U.ndim == 2
        X = X.unsqueeze(1) if X.ndim == 2 else X
        U = U.unsqueeze(1).expand(-1, X.shape[1], -1) if shared else U
        return cls(X, U, *_jacobians_of_all(dynamics, X, U), shared)

    def evaluation(self, problem: ControlProblem, u: Controls, states: list[Tensor]) -> Evaluation:
        """What ``problem.evaluate(u)`` gives, by ``p_t = grad_x l_t + A_t'p_{t+1}``."""
        count(len(u))
        with torch.enable_grad():
            x, v, last = (z.detach().requires_grad_() for z in (self.X, self.U, states[-1]))
            running = problem.cost.all_running(x, v)
            assert running is not None
            l_x, l_u = _pulled(running, (x, v), torch.ones_like(running))
            terminal = problem.cost.terminal(last)
            (p,) = _pulled(terminal, (last,), torch.ones_like(terminal))
        costates, gradient = [p], []
        p = p.reshape(self.X.shape[1:])
        for t in reversed(range(len(u))):
            g = l_u[t] + (p.unsqueeze(-2) @ self.B[t]).squeeze(-2)
            gradient.append(g.sum(0) if self.shared else g)
            p = l_x[t] + (p.unsqueeze(-2) @ self.A[t]).squeeze(-2)
            costates.append(p.reshape(states[t].shape))
        objective = (terminal + running.sum()).detach()
        return Evaluation(states, costates[::-1], objective, tuple(gradient[::-1]))

    def model(
        self, problem: ControlProblem, now: Evaluation, second_order: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `one_by_one`, ``(L, G, ., .)`` each."""
        P = torch.stack(now.costates[1:]).reshape(self.X.shape) if second_order else None
        A, B, W = self.A, self.B, _hessians_of_all(problem, self.X, self.U, P)
        n, examples = self.X.shape[-1], self.X.shape[1]
        if not self.shared or examples == 1:
            return A, B, W
        xx, uu = _diagonal_blocks(W[..., :n, :n]), W[..., n:, n:].sum(1)
        ux = W[..., n:, :n].transpose(1, 2).flatten(2)
        whole = torch.cat([torch.cat([xx, ux.mT], -1), torch.cat([ux, uu], -1)], -2)
        return _diagonal_blocks(A).unsqueeze(1), B.flatten(1, 2).unsqueeze(1), whole.unsqueeze(1)


def evaluate(problem: ControlProblem, u: Controls) -> tuple[Evaluation, Along | None]:
    """``problem.evaluate(u)``, and the Jacobians of all steps where these gave it."""
    with torch.no_grad():
        states = problem.rollout(u)
        along = Along.of(problem, u, states)
        if along is None:
            objective = problem.total_cost(states, u)
    if along is None:
        costates, gradient = problem.adjoint(states, u)
        return Evaluation(states, costates, objective, gradient), None
    return along.evaluation(problem, u, states), along


def _copies(values: Tensor, number: int) -> Tensor:
    """``(L, examples, n)`` with every example repeated: a leaf ``(L, examples number, n)``."""
    return values.repeat_interleave(number, 1).requires_grad_()


def _units(like: Tensor, size: int, examples: int) -> Tensor:
    """Unit vectors for the copies of every example, ``(L, examples size, size)``."""
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    return eye.repeat(examples, 1).expand(len(like), -1, -1)


def _jacobians_of_all(dynamics: Dynamics, X: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """``A`` and ``B``, ``(L, examples, n, .)``.

    Every example is copied once for each entry of the next state, so that one reverse sweep with a
    unit vector for each copy gives all rows by large products of matrices.
    """
    n, examples = X.shape[-1], X.shape[1]
    with torch.enable_grad():
        x, u = _copies(X, n), _copies(U, n)
        y = dynamics.all_steps(x, u)
        assert y is not None
        found = _pulled(y, (x, u), _units(X, n, examples))
    a, b = (part.unflatten(1, (examples, n)) for part in found)
    return a, b


def _hessians_of_all(problem: ControlProblem, X: Tensor, U: Tensor, P: Tensor | None) -> Tensor:
    """``W``, ``(L, examples, n + m, n + m)``, of ``<P, f> + l``, or of ``l`` without ``P``.

    The running cost is a mean over the examples, and each example has its share of it.
    """
    n, examples = X.shape[-1], X.shape[1]
    size = n + U.shape[-1]
    with torch.enable_grad():
        z = _copies(torch.cat([X, U], -1), size)
        x, u = z[..., :n], z[..., n:]
        value = problem.cost.all_running(x, u)
        assert value is not None
        value = size * value.sum()
        if P is not None:
            y = problem.dynamics.all_steps(x, u)
            assert y is not None
            value = value + (P.repeat_interleave(size, 1) * y).sum()
        if not value.requires_grad:
            return z.new_zeros(len(X), examples, size, size)
        (slope,) = torch.autograd.grad(value, z, create_graph=True)
        (rows,) = _pulled(slope, (z,), _units(X, size, examples))
    rows = rows.unflatten(1, (examples, size))
    return 0.5 * (rows + rows.mT)


def _pulled(y: Tensor, leaves: tuple[Tensor, ...], units: Tensor) -> list[Tensor]:
    """What the unit vectors pull back to, zeros where nothing depends on a leaf."""
    if not y.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(y, leaves, units, allow_unused=True)
    return [
        torch.zeros_like(leaf) if part is None else part
        for leaf, part in zip(leaves, found, strict=True)
    ]


def _diagonal_blocks(blocks: Tensor) -> Tensor:
    """``(L, k, a, b)`` as ``(L, k a, k b)``, zero beside the blocks."""
    horizon, k, a, b = blocks.shape
    whole = blocks.new_zeros(horizon, k, a, k, b)
    whole.diagonal(dim1=1, dim2=3).copy_(blocks.movedim(1, -1))
    return whole.reshape(horizon, k * a, k * b)


def running_costs(
    problem: ControlProblem, states: Sequence[Tensor], u: Sequence[Tensor]
) -> Sequence[Tensor]:
    """``l_t(x_t, u_t)`` of each step, in one call where the cost offers it."""
    if offers(problem.cost, "running", "all_running") and _alike(states[:-1]) and _alike(u):
        found = problem.cost.all_running(torch.stack(list(states[:-1])), torch.stack(list(u)))
        if found is not None:
            return found.unbind()
    return [problem.cost.running(t, states[t], u_t) for t, u_t in enumerate(u)]


def _alike(parts: Sequence[Tensor]) -> bool:
    """Whether there are such, of one shape, of real numbers."""
    return len({part.shape for part in parts}) == 1 and parts[0].is_floating_point()


def jacobians(
    f: Callable[[Tensor, Tensor], Tensor], x: Tensor, u: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of each group, by reverse mode along the entries of the next state."""
    x, call = _without_integers(f, x, groups)
    y, pull = torch.func.vjp(call, x, u)[:2]
    a, b = _rows(pull, y, groups, "dynamics")
    return a, b


def hessian(h: Callable[[Tensor, Tensor], Tensor], x: Tensor, u: Tensor, groups: int) -> Tensor:
    """The Hessian of a scalar in ``(x, u)`` of each group, ``(G, n + m, n + m)``."""
    x, call = _without_integers(h, x, groups)
    n = x.numel() // groups
    x_shape, u_shape = x.shape, u.shape

    def gradient(z: Tensor) -> Tensor:
        def value(z: Tensor) -> Tensor:
            return call(z[:, :n].reshape(x_shape), z[:, n:].reshape(u_shape))

        return torch.func.grad(value)(z)

    z = torch.cat([x.reshape(groups, -1), u.reshape(groups, -1)], 1)
    y, pull = torch.func.vjp(gradient, z)[:2]
    (rows,) = _rows(pull, y, groups, "cost")
    return 0.5 * (rows + rows.mT)


def _rows(
    pull: Callable[[Tensor], tuple[Tensor, ...]], y: Tensor, groups: int, what: str
) -> list[Tensor]:
    """Pull back every unit vector, of all groups at once; ``(G, entries of y, entries)``.

    With several groups one more vector, of random signs, tells whether they interact.
    """
    size = y.numel() // groups
    if not size:
        return [rows.new_zeros(groups, 0, rows.numel() // groups) for rows in pull(y)]
    basis = torch.eye(size, dtype=y.dtype, device=y.device).unsqueeze(1).expand(-1, groups, -1)
    signs = None
    if groups > 1:
        generator = torch.Generator().manual_seed(groups)
        signs = torch.randint(2, (groups, 1), generator=generator).to(y) * 2 - 1
        basis = torch.cat([basis, signs.expand(1, groups, size)])
    pulled = torch.func.vmap(pull, chunk_size=_CHUNK)(basis.reshape(-1, *y.shape))
    result = []
    for rows in pulled:
        rows = rows.reshape(len(basis), groups, -1).movedim(0, 1)
        if signs is not None:
            rows, probe = rows[:, :-1], rows[:, -1]
            error = (probe - signs * rows.sum(1)).norm()
            if error > 1e3 * torch.finfo(y.dtype).eps * (rows.abs().sum(1).norm() + 1e-30) * size:
                raise InputError(
                    f"the controls are given per example, but the {what} let examples interact; "
                    "give controls (m_t,) that the batch shares"
                )
        result.append(rows)
    return result


def _without_integers(
    f: Callable[[Tensor, Tensor], Tensor], x: Tensor, groups: int
) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """A state of integers is a constant: replace it by a state of no entries."""
    if x.is_floating_point():
        return x, f
    return x.new_zeros((groups, 0), dtype=torch.get_default_dtype()), lambda _, u: f(x, u)
