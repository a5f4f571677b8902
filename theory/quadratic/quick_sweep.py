"""The sweep of `deltacontrol.theory.solvers.quadratic_model` for one group on the CPU.

A call of NumPy or LAPACK costs a fraction of one of torch, and small steps consist of calls. The
batched form is the reference; this one computes the same numbers for steps of one size.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import get_lapack_funcs
from torch import Tensor

__all__ = ["IndefiniteError", "expected_of_one", "sweep_of_one"]


class IndefiniteError(Exception):
    """``Q_uu`` is not positive definite where it has to be, at the step that the message names."""


@np.errstate(over="ignore", invalid="ignore")  # the pivots tell
def sweep_of_one(
    F: Tensor, W: Tensor, terminal: Tensor, gradient: Tensor, damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise the model of one group.

    Args:
        F: ``[A_t B_t]``, ``(L, n, n + m)``.
        W: ``(L, n + m, n + m)``, states first.
        terminal: ``(n, n)``.
        gradient: ``(L, m)``.
        damping: ``mu``.

    Returns:
        ``k``, ``(L, m)``; ``K``, ``(L, m, n)``; ``V_0..V_L``, ``(L + 1, n, n)``.

    Raises:
        IndefiniteError: if ``Q_uu`` is not positive definite beyond rounding.
    """
    horizon, n, m = len(F), F.shape[1], F.shape[2] - F.shape[1]
    steps, weights, slopes = F.numpy(), W.numpy(), gradient.numpy()
    k = np.empty((horizon, m), steps.dtype)
    K = np.empty((horizon, m, n), steps.dtype)
    V = np.empty((horizon + 1, n, n), steps.dtype)
    V[-1] = terminal.numpy()
    v = np.zeros(n, steps.dtype)
    potrf, potrs = get_lapack_funcs(("potrf", "potrs"), dtype=steps.dtype)
    Q, VF = np.empty((n + m, n + m), steps.dtype), np.empty((n, n + m), steps.dtype)
    Qxx, Qux, Quu = Q[:n, :n], Q[n:, :n], Q[n:, n:]
    pivots = Q.reshape(-1)[n * (n + m + 1) :: n + m + 1]  # the diagonal of Q_uu
    right = np.empty((m, n + 1), steps.dtype, order="F")  # as LAPACK solves in place
    least, unit = m * np.finfo(steps.dtype).eps, 0.0
    for t in range(horizon - 1, -1, -1):
        F_t, k_t, K_t = steps[t], k[t], K[t]
        np.matmul(V[t + 1], F_t, out=VF)
        np.matmul(F_t.T, VF, out=Q)
        Q += weights[t]
        if damping:
            unit = max(unit, float(np.abs(pivots).sum()) / m)
            pivots += damping * (unit or 1.0)
        q = v @ F_t
        np.add(slopes[t], q[n:], out=right[:, 0])
        right[:, 1:] = Qux
        factor, info = potrf(Quu, lower=1, clean=0)
        if info or not factor.diagonal().min() ** 2 > least * pivots.max():
            raise IndefiniteError(f"Q_uu is not positive definite at step {t}")
        potrs(factor, right, lower=1, overwrite_b=1)
        np.negative(right[:, 0], out=k_t)
        np.negative(right[:, 1:], out=K_t)
        # Q_uu k = -Q_u and Q_uu K = -Q_ux leave of the update what follows.
        v = q[:n] + k_t @ Qux
        V_t = Qxx + K_t.T @ Qux
        np.add(V_t, V_t.T, out=V[t])
        V[t] *= 0.5
    return torch.from_numpy(k), torch.from_numpy(K), torch.from_numpy(V)


def expected_of_one(
    F: Tensor, W: Tensor, terminal: Tensor, gradient: Tensor, k: Tensor, K: Tensor
) -> tuple[float, float]:
    """The first and second derivative of ``J`` along the law, in the model.

    Arguments are those of `sweep_of_one` and what it gives.
    """
    n = F.shape[1]
    z = np.zeros((len(F), F.shape[2]), k.numpy().dtype)
    steps, gains, ahead = F.numpy(), K.numpy(), k.numpy()
    dx = np.zeros(n, z.dtype)
    for t in range(len(steps)):
        z[t, :n] = dx
        z[t, n:] = ahead[t] + gains[t] @ dx
        dx = steps[t] @ z[t]
    slope = float((gradient.numpy() * z[:, n:]).sum())
    bent = (z * (W.numpy() @ z[:, :, None])[:, :, 0]).sum()
    return slope, float(bent + dx @ terminal.numpy() @ dx)
