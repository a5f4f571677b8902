"""The turnpike of a time-invariant problem: its steady optimum and the rate of approach.

With the same ``f`` and ``l`` at every step, let ``(x, u, p)`` be a stationary point of

    minimise l(x, u)   subject to   x = f(x, u),

that is ``x = f(x, u)``, ``p = grad_x H(x, u, p)``, ``0 = grad_u H(x, u, p)``. Optimal trajectories
over a long horizon are near it at all steps but the first and the last: near it the optimality
system is linear up to second order, and its bounded solutions are

    x_t - x = F^t a + (modes that decay backward in t, at the same rates),

with ``F = A - B K`` the closed loop of the infinite-horizon problem whose weights are the Hessian
of ``H`` at the steady point. So ``||u_t - u|| <= C (rho^t + rho^(L-t))`` for every ``rho`` above
the spectral radius of ``F``. The rate needs no solution of the long problem.

Source: Trelat & Zuazua, J. Differential Equations 258(1), 2015, theorem 1 (continuous time);
Gruene & Guglielmi, SIAM J. Control Optim. 56(2), 2018 (discrete time, linear-quadratic).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg, optimize
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.errors import InputError

__all__ = ["SteadyState", "two_sided_rate"]

LEAST_STEPS = 3  # numbers of the fit of `two_sided_rate`


@dataclass(frozen=True, eq=False)
class SteadyState:
    """A stationary point of the steady problem and the linear dynamics around it.

    Attributes:
        x: the state, ``(n,)``.
        u: the control, ``(m,)``.
        p: the costate, ``(n,)``.
        residual: the norm of the stationarity conditions.
        gain: ``K`` of the stationary law ``u - K (x_t - x)``, ``(m, n)``.
        closed_loop: ``F``, ``(n, n)``.
        rate: ``-log`` of the spectral radius of ``F``: the predicted decay per step.
    """

    x: Tensor
    u: Tensor
    p: Tensor
    residual: float
    gain: Tensor
    closed_loop: Tensor
    rate: float

    @classmethod
    def of(cls, problem: ControlProblem, guess: Tensor | None = None) -> SteadyState:
        """Solve the steady problem of step 0 by Newton's method, and linearise.

        Args:
            problem: time-invariant, with a state ``(n,)``; the terminal cost has no influence.
            guess: a state near the steady one; by default ``x0``.

        Raises:
            InputError: if the state has more than one axis, if Newton's method finds no steady
                point, or if the linearised problem there cannot be stabilised.
        """
        x0 = problem.x0 if guess is None else guess
        if x0.ndim != 1:
            raise InputError(f"the state has shape {tuple(x0.shape)}; expected one example, (n,)")
        n, m = len(x0), problem.dynamics.control_sizes[0]

        def hamiltonian(x: Tensor, u: Tensor, p: Tensor) -> Tensor:
            return problem.hamiltonian(0, x, u, p)

        def conditions(z: Tensor) -> Tensor:
            x, u, p = z.split([n, m, n])
            gx, gu = torch.func.grad(hamiltonian, argnums=(0, 1))(x, u, p)
            return torch.cat([problem.dynamics.step(0, x, u) - x, gx - p, gu])

        start = torch.cat([x0, x0.new_zeros(m + n)]).numpy()
        found = optimize.root(
            lambda z: conditions(torch.from_numpy(z)).numpy(),
            start,
            jac=lambda z: torch.func.jacrev(conditions)(torch.from_numpy(z)).numpy(),
            tol=1e-14,
        )
        residual = float(np.linalg.norm(found.fun))
        if not residual <= 1e-10:
            raise InputError(
                f"no steady optimum was found (residual {residual:.1e}); guess a state nearer to it"
            )
        x, u, p = torch.from_numpy(found.x).split([n, m, n])
        A, B = torch.func.jacrev(problem.dynamics.step, argnums=(1, 2))(0, x, u)
        (Q, S), (_, R) = torch.func.hessian(hamiltonian, argnums=(0, 1))(x, u, p)
        unstable = (
            "the problem linearised at the steady optimum has no stabilising law; add a running "
            "cost of the state that sees every mode, and let the controls reach the unstable ones"
        )
        try:
            P = linalg.solve_discrete_are(A.numpy(), B.numpy(), Q.numpy(), R.numpy(), s=S.numpy())
        except (np.linalg.LinAlgError, ValueError) as error:
            raise InputError(f"{unstable} ({error})") from error
        P = torch.from_numpy(P)
        K = torch.linalg.solve(R + B.mT @ P @ B, B.mT @ P @ A + S.mT)
        closed_loop = A - B @ K
        radius = float(torch.linalg.eigvals(closed_loop).abs().max())
        if not radius < 1 - 1e-9:
            raise InputError(f"{unstable} (spectral radius {radius:.9f})")
        return cls(x, u, p, residual, K, closed_loop, -math.log(radius))

    def law(self, problem: ControlProblem) -> Controls:
        """The controls that the stationary law gives from ``x0`` on.

        Where layers are unstable, constant controls lead far away; these stay near.
        """
        x, controls = problem.x0, []
        for t in range(problem.dynamics.horizon):
            controls.append(self.u - self.gain @ (x - self.x))
            x = problem.dynamics.step(t, x, controls[-1])
        return tuple(controls)


@typed
def two_sided_rate(values: Tensor) -> float:
    """Fit ``log values_t`` by ``log(a e^(-r t) + b e^(-r (L-1-t)))`` and return ``r``.

    Args:
        values: positive numbers, one a step; leave out the steps at both ends where faster modes
            still show.

    Raises:
        InputError: if a value is not positive and finite, or there are fewer than three.

    Example:
        >>> t = torch.arange(30, dtype=torch.float64)
        >>> round(two_sided_rate(2 * torch.exp(-0.3 * t) + 5 * torch.exp(-0.3 * (29 - t))), 9)
        0.3
    """
    if values.ndim != 1 or len(values) < LEAST_STEPS:
        raise InputError(
            f"the values have shape {tuple(values.shape)}; expected at least {LEAST_STEPS}, one a "
            "step: a fit of three numbers needs as many"
        )
    if not bool(((values > 0) & torch.isfinite(values)).all()):
        raise InputError("the values must be positive and finite; leave out exact zeros")
    logs = values.detach().double().log().numpy()
    steps = np.arange(len(logs))

    def misfit(z: np.ndarray) -> np.ndarray:
        a, b, rate = z
        return np.logaddexp(a - rate * steps, b - rate * steps[::-1]) - logs

    starts = [
        optimize.least_squares(misfit, [logs[0], logs[-1], rate], x_scale="jac", xtol=1e-14)
        for rate in (0.01, 0.1, 1.0)
    ]
    return float(min(starts, key=lambda fit: fit.cost).x[2])
