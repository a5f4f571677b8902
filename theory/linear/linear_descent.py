"""Training of a model that is linear in its controls, seen in its outputs alone.

With outputs ``z(u) = z_0 + J u`` of ``m`` numbers, a loss ``l`` of the first ``n`` of them, and a
fixed diagonal ``P``, the descent

    u <- u - eta_t (P J_n' grad l(z_n) + lambda u),        u_0 = 0,

moves the outputs by

    z <- z - eta_t (K grad l(z_n) + lambda (z - z_0)),     K = J P J_n',  (m, n),

so that ``K`` says everything, whatever the number of controls. ``P = 1`` is gradient descent with
weight decay, and small ``eta_t`` of the sum ``tau`` the gradient flow until the time ``tau``. The
fixed point of ``lambda > 0`` minimises ``l(z_0 + J u) + lambda/2 u'P^-1 u``. For half the squared
distance to ``y`` and ``lambda = 0`` the training outputs of the flow are

    z_n(tau) = y + exp(-tau K_n) (z_n(0) - y).

Source: Lee, Xiao, Schoenholz, Bahri, Novak, Sohl-Dickstein & Pennington, *Wide neural networks of
any depth evolve as linear models under gradient descent*, NeurIPS 2019, equations 8 to 11.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError

__all__ = ["effective_dimension", "linear_descent"]


@typed
def linear_descent(
    start: Tensor,
    kernel: Tensor,
    slope: Callable[[Tensor], Tensor],
    rates: Tensor,
    *,
    decay: float = 0.0,
) -> Tensor:
    """The outputs after a descent, of several copies at once, ``(copies, m)``.

    A copy that diverges has outputs that are not finite.

    Args:
        start: ``z_0``, ``(m,)``.
        kernel: ``K``, ``(m, n)``; the first ``n`` outputs are those of the loss.
        slope: ``(copies, n)`` to ``grad l``, of the same shape, each row by itself.
        rates: ``eta_t`` of each step and copy, ``(steps, copies)``.
        decay: ``lambda``.

    Raises:
        InputError: the shapes do not fit.

    Example:
        Half the squared distance to 1, at the rate 1/2: each step halves it.

        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> rates = torch.full((3, 1), 0.5, dtype=torch.float64)
        >>> float(linear_descent(0 * one[0], one, lambda z: z - 1, rates))
        0.875
    """
    m, n = kernel.shape if kernel.ndim == 2 else (-1, -1)
    if start.shape != (m,) or n > m or rates.ndim != 2:
        raise InputError(
            f"start has shape {tuple(start.shape)}, kernel {tuple(kernel.shape)} and rates "
            f"{tuple(rates.shape)}; expected (m,), (m, n) with n at most m, and (steps, copies)"
        )
    z = start.expand(rates.shape[1], m)
    for rate in rates:
        change = slope(z[:, :n]) @ kernel.mT
        if decay:
            change = change + decay * (z - start)
        z = z - rate[:, None] * change
    return z


@typed
def effective_dimension(kernel: Tensor, ridge: float) -> float:
    """``tr K (K + ridge I)^-1``: how many directions of ``K`` are stiffer than the ridge.

    Ridge regression with the ridge ``lambda`` and gradient flow until ``tau = 1/lambda`` both learn
    the directions whose eigenvalues are above ``lambda``. Negative eigenvalues, of rounding, count
    as zero.

    Args:
        kernel: symmetric, ``(n, n)``.
        ridge: positive.

    Raises:
        InputError: the ridge is not positive.

    Source: Caponnetto & De Vito, Foundations of Computational Mathematics 7, 2007, section 3.

    Example:
        >>> effective_dimension(torch.eye(4, dtype=torch.float64), 1.0)
        2.0
    """
    if not ridge > 0:
        raise InputError(f"the ridge is {ridge}; expected a positive number")
    values = torch.linalg.eigvalsh(kernel).clamp_min(0)
    return float((values / (values + ridge)).sum())
