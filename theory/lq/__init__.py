"""The finite-horizon linear-quadratic problem: Riccati recursion, optimal feedback, cost to go.

Minimise over ``u_0..u_{L-1}``

    sum_t [1/2 x'Q_t x + 1/2 u'R_t u + x'N_t u + q_t'x + r_t'u] + 1/2 x_L'Qf x_L + qf'x_L

along ``x_{t+1} = A_t x_t + B_t u_t + c_t``. The cost to go is ``V_t(x) = 1/2 x'P_t x + s_t'x +
v_t`` and the optimal law ``u_t = K_t x + k_t``. From ``P_L = Qf`` backward,

    H_uu = R_t + B'P_{t+1}B,   H_ux = N_t' + B'P_{t+1}A,   H_xx = Q_t + A'P_{t+1}A,
    K_t = -H_uu^{-1} H_ux,     P_t = H_xx - H_ux' H_uu^{-1} H_ux,

and with ``g = s_{t+1} + P_{t+1} c_t`` and ``h = r_t + B'g``

    k_t = -H_uu^{-1} h,        s_t = q_t + A'g + K_t'h.

The first three do not know the affine terms: `factorise` computes them once, and `LQFactor.policy`
solves for any affine terms at the price of matrix-vector products. `riccati` does both.

Where ``H_uu`` is indefinite, some direction of ``u_t``, followed by the optimal law, lowers the
cost without bound: `UnboundedError`. Where it is singular, its null space must not meet
``H_ux x + h``: then the control of least norm is taken and the step is named in ``singular``; else
the cost is unbounded as well. An eigenvalue counts as zero below the rounding error of ``H_uu``.

Shapes. Time comes first, then any batch axes, one problem each, which broadcast against each
other: ``A[t]`` is ``(..., n_{t+1}, n_t)``. Sizes may change from step to step and ``m_t`` may be 0.
Nothing here is differentiable.

Source: Bertsekas, *Dynamic Programming and Optimal Control*, vol. 1, 4th ed., 2017, section 3.1;
Bryson & Ho, *Applied Optimal Control*, 1975, sections 2.2 and 5.2.
"""

from deltacontrol.theory.lq.policy import LQFactor, LQPolicy, UnboundedError
from deltacontrol.theory.lq.recursion import factorise, riccati
from deltacontrol.theory.lq.scan import factorise_by_scan

__all__ = [
    "LQFactor",
    "LQPolicy",
    "UnboundedError",
    "factorise",
    "factorise_by_scan",
    "riccati",
]
