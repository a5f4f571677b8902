"""Derivatives of the steps that differ in constants alone, taken at once.

Where ``f_t(x, u) = f(c_t, x, u)`` for some consecutive steps (`Dynamics.alike`), `torch.vmap` along
``t`` makes of the derivatives of one step those of all, and every operation is done once for all
steps. That saves what the operations cost beside their arithmetic, and pays where this is little:
see `MOST_ENTRIES`. Steps of other kinds go one by one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deltacontrol.theory.control.dynamics import Alike, alike_steps
from deltacontrol.theory.control.problem import ControlProblem, Controls, Evaluation
from deltacontrol.theory.quadratic.derivatives import (
    Matrices,
    hessian,
    jacobians,
    one_by_one,
    stage_hessian,
)

__all__ = ["LEAST_STEPS", "MOST_ENTRIES", "alike_at_once"]

MOST_ENTRIES = 2**15
"""Entries of ``[A_t B_t]``, and of ``W_t``, up to which alike steps are differentiated at once.

Jacobians of twelve blocks of a Transformer with LoRA (one thread of a CPU, float64) took 1/7 of the
time of the loop over steps at 3,000 entries, 1/3 at 20,000, 1/2 at 33,000, and as long at 86,000:
there the arithmetic is all that counts. States of real models have 10^3 entries or more.
"""

LEAST_STEPS = 4
"""Fewer save too little for the search for them; four blocks took 1/1.6 of the time of the loop."""


def alike_at_once(
    problem: ControlProblem, u: Controls, now: Evaluation, second_order: bool
) -> Matrices:
    """``A_t``, ``B_t`` and ``W_t`` as `one_by_one` gives them, those of alike steps at once.

    Args:
        problem: the problem.
        u: the controls.
        now: what ``problem.evaluate(u)`` gives.
        second_order: take the Hessian of ``H_t`` for ``W_t`` rather than that of ``l_t``.
    """
    found = _alike(problem, u, now)
    together = None if found is None else _together(found, problem, u, now, second_order)
    if found is None or together is None:
        return one_by_one(problem, u, now, second_order)
    before = one_by_one(problem, u, now, second_order, range(found.start))
    behind = one_by_one(problem, u, now, second_order, range(found.stop, len(u)))
    A, B, W = (
        [*first, *steps, *last] for first, steps, last in zip(before, together, behind, strict=True)
    )
    return A, B, W


def _alike(problem: ControlProblem, u: Controls, now: Evaluation) -> Alike | None:
    """Alike steps that are small and many enough, of controls that the batch shares."""
    small = [
        x.is_floating_point()
        and control.ndim == 1
        and x.numel() * (x.numel() + control.numel()) <= MOST_ENTRIES
        for x, control in zip(now.states, u, strict=False)
    ]
    if sum(small) < LEAST_STEPS:  # before the steps are asked, which may have to look for them
        return None
    found = alike_steps(problem.dynamics)
    if found is None or found.stop - found.start < LEAST_STEPS:
        return None
    return found if all(small[found.start : found.stop]) else None


def _together(
    found: Alike, problem: ControlProblem, u: Controls, now: Evaluation, second_order: bool
) -> Matrices | None:
    """The derivatives of these steps, ``(1, ., .)`` each; None where their states are others."""
    steps = range(found.start, found.stop)
    X, X_next, U, P = (
        torch.stack([part[t].detach() for t in chosen])
        for part, chosen in (
            (now.states, steps),
            (now.states, range(found.start + 1, found.stop + 1)),
            (u, steps),
            (now.costates, range(found.start + 1, found.stop + 1)),
        )
    )

    def first(c: Mapping[str, Tensor], x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return jacobians(lambda x, u: found.function(c, x, u), x, u, 1)

    def second(c: Mapping[str, Tensor], x: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return hessian(lambda x, u: (p * found.function(c, x, u)).sum(), x, u, 1)

    with torch.no_grad():
        y = torch.vmap(found.function)(found.constants, X, U)
    if float((y - X_next).norm()) > 1e4 * torch.finfo(X.dtype).eps * float(X_next.norm()):
        return None  # such as those of a model that was changed since
    A, B = torch.vmap(first)(found.constants, X, U)
    size = X[0].numel() + U[0].numel()
    if second_order and size**2 > MOST_ENTRIES:
        return list(A), list(B), [stage_hessian(problem, u, now, True, t) for t in steps]
    W = _of_running_costs(problem, steps, X, U).unsqueeze(1)
    if second_order:
        W = W + torch.vmap(second)(found.constants, X, U, P)
    return list(A), list(B), list(W)


def _of_running_costs(problem: ControlProblem, steps: range, X: Tensor, U: Tensor) -> Tensor:
    """The Hessians of ``l_t``, ``(steps, n + m, n + m)``.

    Their sum has no mixed derivatives between steps, so that a row of each is pulled back at once.
    """
    n = X[0].numel()
    z = torch.cat([X.flatten(1), U], 1)

    def total(z: Tensor) -> Tensor:
        x, u = z[:, :n].reshape(X.shape), z[:, n:]
        costs = [problem.cost.running(t, x[k], u[k]) for k, t in enumerate(steps)]
        return torch.stack(costs).sum()

    _, pull = torch.func.vjp(torch.func.grad(total), z)[:2]
    size = z.shape[1]
    basis = torch.eye(size, dtype=z.dtype, device=z.device).unsqueeze(1)
    (rows,) = torch.func.vmap(pull)(basis.expand(-1, len(z), -1))
    rows = rows.movedim(0, 1)
    return 0.5 * (rows + rows.mT)
