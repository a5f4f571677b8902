"""The damped Gauss-Newton step as the solution of a layerwise linear-quadratic problem.

Minimise over ``d`` the cost's second-order expansion along the linearised trajectory,

    sum_t [l_x'dx + l_u'd + 1/2 (dx, d)' Hess l_t (dx, d) + damping/2 |d|^2]_t
        + Phi_x'dx_L + 1/2 dx_L' Hess Phi dx_L,      dx_{t+1} = A_t dx_t + B_t d_t,  dx_0 = 0.

In ``d`` alone it is ``g'd + 1/2 d'(G + damping I) d``: its minimiser is the damped Gauss-Newton
step. As a control problem it is solved layer by layer, by Riccati's recursion. Controls that the
batch shares act on one state that holds the whole batch, so the matrices grow with it: this is the
dense reference for `deltacontrol.theory.solvers.gauss_newton`, which forms none.

Source: Dunn & Bertsekas, JOTA 63(1), 1989; Sideris & Bobrow, *An efficient sequential linear
quadratic algorithm for solving nonlinear optimal control problems*, IEEE TAC 50(12), 2005.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.lq import riccati
from deltacontrol.theory.solvers.quadratic_model import QuadraticModel

__all__ = ["layerwise_step"]


def layerwise_step(problem: ControlProblem, u: Controls, damping: float) -> Controls:
    """The damped Gauss-Newton step by Riccati's recursion on the linearised layers.

    Neither costates nor the gradient of ``J`` are used: only the derivatives of each layer and of
    the costs.

    Args:
        problem: the problem.
        u: controls ``(m_t,)``, shared by the batch.
        damping: added to the Hessian of the running cost in the control.

    Raises:
        InputError: if controls are given per example, or if a state is too large for a matrix.
        UnboundedError: if the quadratic problem has no minimum; raise the damping then.
    """
    if any(control.ndim != 1 for control in u):
        raise InputError(
            "the layerwise step takes controls (m_t,) that the batch shares; controls for each "
            "example belong to problems of their own"
        )
    now = problem.evaluate(u)
    model = QuadraticModel.of(problem, u, now, second_order=False)
    Q, R, N, q, r = [], [], [], [], []
    for t, control in enumerate(u):
        m = len(control)
        n = model.W[t].shape[-1] - m
        W = model.W[t][0]
        Q.append(W[:n, :n])
        N.append(W[:n, n:])
        R.append(W[n:, n:] + damping * torch.eye(m, dtype=W.dtype))
        in_x, in_u = _slopes(problem, t, now.states[t], control)
        q.append(in_x.reshape(-1)[:n])
        r.append(in_u)
    policy = riccati(
        [a[0].to(model.terminal) for a in model.A],  # of no columns and any dtype for integers
        [b[0] for b in model.B],
        Q,
        R,
        model.terminal[0],
        N=N,
        q=q,
        r=r,
        qf=now.costates[-1].reshape(-1),
    )
    return policy.simulate(Q[0].new_zeros(len(Q[0]))).controls


def _slopes(problem: ControlProblem, t: int, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``l_t`` in the state (none for integers) and in the control."""
    if not x.is_floating_point():
        gradient = torch.func.grad(lambda u: problem.cost.running(t, x, u))(u)
        return u.new_zeros(0), gradient
    in_x, in_u = torch.func.grad(lambda x, u: problem.cost.running(t, x, u), argnums=(0, 1))(x, u)
    return in_x, in_u
