# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 21. With a tracking cost the middle layers of a deep network are a turnpike
#
# ## Statement
#
# Let every layer be the same, $f$, with the same running cost $\ell(x, u)$, and let
# $(\bar x, \bar u, \bar p)$ be a stationary point of the steady problem
# $\min \ell(x, u)$ subject to $x = f(x, u)$. If an optimal trajectory of depth $L$ comes near it,
# then, with a constant $C$ that does not depend on $L$,
#
# $$\|u_t - \bar u\| + \|x_t - \bar x\| \le C \left( e^{-\mu t} + e^{-\mu (L - t)} \right),$$
#
# for every $\mu$ below $-\log \rho(F)$, where $F = A - BK$ is the closed loop of the
# discrete algebraic Riccati equation at the steady point. So the rate is known before the deep
# problem is solved. Without a term of $\ell$ that sees the state there is no such rate.

# %% [markdown]
# ## Assumptions
#
# - $f$, $\ell$ twice continuously differentiable. With $A = f_x$, $B = f_u$ and
#   $\begin{pmatrix} Q & S \\ S^\top & R \end{pmatrix} = \nabla^2_{(x,u)} H$ at the steady point:
#   the Riccati equation has a stabilising solution $P$ with $R + B^\top P B \succ 0$. If the matrix
#   above is positive semidefinite and $R \succ 0$, that means $(A, B)$ stabilisable and no mode of
#   $A - B R^{-1} S^\top$ on the unit circle hidden from $Q - S R^{-1} S^\top$. A tracking cost
#   gives $Q \succ 0$ up to second derivatives of $f$, no tracking gives $Q = 0$.
# - The result is local: that the ends are near enough, or that the optimum passes near this steady
#   point and not another one, is assumed, and checked by the measurement.

# %% [markdown]
# ## Derivation
#
# *Optimality as a boundary-value problem.* Stationarity of $J$ is
# $x_{t+1} = f(x_t, u_t)$, $p_t = \nabla_x H(x_t, u_t, p_{t+1})$,
# $0 = \nabla_u H(x_t, u_t, p_{t+1})$: the same three equations in each layer, with $x_0$ and $p_L$
# prescribed. The steady point is a solution that does not depend on $t$. Linearised there, in
# deviations,
#
# $$x_{t+1} = A x_t + B u_t, \quad p_t = Q x_t + S u_t + A^\top p_{t+1}, \quad
# 0 = S^\top x_t + R u_t + B^\top p_{t+1},$$
#
# the optimality system of a linear-quadratic problem.
#
# *Two invariant subspaces.* Put $p_t = P x_t + w_t$ with $P$ the stabilising Riccati solution, so
# $u_t = -K x_t - (R + B^\top P B)^{-1} B^\top w_{t+1}$. Inserting,
#
# $$w_t = F^\top w_{t+1}, \qquad x_{t+1} = F x_t - B (R + B^\top P B)^{-1} B^\top w_{t+1} .$$
#
# The system is triangular: $w_t = (F^\top)^{L-t} w_L$ decays *backward* from the last layer, and
# $x_t = F^t x_0 + $ (a sum of $F^{t-1-s} \cdots (F^\top)^{L-s-1} w_L$) decays forward from the
# first. With the Stein equation $Y = F Y F^\top + B (R + B^\top P B)^{-1} B^\top$ the sum is
# explicit, $x_t = F^t (x_0 + Y w_0) - Y w_t$, since then
# $F(x_t + Y w_t) = x_{t+1} + B(R + B^\top P B)^{-1} B^\top w_{t+1} + F Y F^\top w_{t+1}
# = x_{t+1} + Y w_{t+1}$.
# Both parts decay with the powers of $F$: for every $\rho > \rho(F)$,
# $\|x_t\| + \|u_t\| \le C (\rho^t + \rho^{L-t})$.
#
# *Nonlinear.* The steady point is a hyperbolic fixed point of the optimality map: its linearisation
# has the eigenvalues of $F$ inside and their reciprocals outside the unit circle. The stable
# manifold theorem gives trajectories that stay near it for all but the ends and approach and leave
# it at these rates, and boundary data near it select one of them (Trelat & Zuazua, J. Differential
# Equations 258(1), 2015, theorem 1, in continuous time). $\blacksquare$
#
# *No tracking.* Take $Q = 0$, $S = 0$. If all eigenvalues of $A$ are inside the circle the Riccati
# solution is $P = 0$ and $u_t = -R^{-1} B^\top (A^\top)^{L-t-1} p_L$: no turnpike at the first end,
# and the rate is that of the network itself, close to zero for residual layers near the identity.
# In the scalar case $A = 1$, tracking $q$ and $R = r$, $B = b$ the rate is
# $\mu = 2 \operatorname{arsinh}\left(\tfrac{b}{2} \sqrt{q/r}\right)$, which vanishes with $q$:

# %%
import sympy as sp

q, r, b, P = sp.symbols("q r b P", positive=True)
riccati = sp.Eq(P, q + P - (P * b) ** 2 / (r + b**2 * P))
(P_pos,) = [s for s in sp.solve(riccati, P) if s.subs({q: 1, r: 1, b: 1}) > 0]
F = 1 - b**2 * P_pos / (r + b**2 * P_pos)
mu = 2 * sp.asinh(b * sp.sqrt(q / r) / 2)
for values in ({q: 1, r: 1, b: 1}, {q: sp.Rational(1, 10), r: 2, b: 3}):
    assert abs(sp.N((F - sp.exp(-mu)).subs(values), 30)) < 1e-25
assert sp.limit(mu, q, 0) == 0

# %% [markdown]
# ## Numerical check
#
# Threshold, fixed before measuring: fitted rate over predicted rate within $[0.8, 1.25]$; and in
# the linear-quadratic case the formula $x_t = F^t (x_0 + Y w_0) - Y w_t$ to $10^{-9}$.
#
# On the board the ends are near: $x_0 = \bar x + a$ and the target of the last layer
# $\bar x - \bar p + b$, with $a$ and $b$ in random directions, of the length
# $\min\{0.2 \|\bar x\|,\; \tfrac14 / \|K_1 - D K\|_2\}$, $K$ the gain and $K_1$ the layer's
# matrix: by the linearised law the arguments of tanh are then off by at most a quarter. That both
# ends are within 20 % of $\bar x$, and no argument off by more than a half, is checked along the
# solution; where it is not so, the claim is not judged.

# %%
import dataclasses

import torch
from scipy import linalg

from deltacontrol.theory import (
    ControlProblem,
    LinearDynamics,
    QuadraticCost,
    ResidualNetwork,
    Status,
    solve,
)
from deltacontrol.theory.depth.turnpike import SteadyState, two_sided_rate
from deltacontrol.theory.solvers.ilqr import DDP

depth, width = 40, 3
generator = torch.Generator().manual_seed(3)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


eye = torch.eye(width, dtype=torch.float64)
x0, wanted, target = normal(3, width)


def tracking_cost(weight):
    return QuadraticCost(
        Q=[weight * eye] * depth,
        R=[eye] * depth,
        q=[-weight * wanted] * depth,
        Qf=eye,
        qf=-target,
    )


A, B = eye + normal(width, width) / 8, normal(width, width) / 2
problem = ControlProblem(LinearDynamics.constant(depth, A, B), tracking_cost(1.0), x0)
steady = SteadyState.of(problem)
solution = solve(problem, DDP(), problem.zero_controls(), max_steps=5, tol=1e-9)
assert solution.status is Status.CONVERGED
P_steady = torch.from_numpy(
    linalg.solve_discrete_are(A.numpy(), B.numpy(), eye.numpy(), eye.numpy())
)
F = steady.closed_loop
M = B @ torch.linalg.solve(eye + B.T @ P_steady @ B, B.T)
Y = torch.from_numpy(linalg.solve_discrete_lyapunov(F.numpy(), M.numpy()))
dx = [x - steady.x for x in solution.states]
w = [p - steady.p - P_steady @ d for p, d in zip(solution.costates, dx, strict=True)]
worst = 0.0
for t in range(1, depth):
    expected = torch.matrix_power(F, t) @ (dx[0] + Y @ w[0]) - Y @ w[t]
    worst = max(worst, float((dx[t] - expected).norm()))
    assert (w[t] - F.T @ w[t + 1]).norm() <= 1e-9
print(f"linear-quadratic: formula to {worst:.1e}, predicted rate {steady.rate:.3f}")
assert worst <= 1e-9

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
distances = [float(d.norm()) for d in dx]
ax.semilogy(distances, label="distance of the state to the turnpike")
t = torch.arange(depth + 1)
ends = (
    distances[0] * torch.exp(-steady.rate * t),
    distances[-1] * torch.exp(-steady.rate * (depth - t)),
)
ax.semilogy(ends[0] + ends[1], "k--", label="predicted rate, from both ends")
ax.set_xlabel("layer")
ax.legend()

# %%
K = normal(width, width)
strength = torch.diag(0.5 + torch.rand(width, generator=generator, dtype=torch.float64))


K = normal(width, width)
strength = torch.diag(0.5 + torch.rand(width, generator=generator, dtype=torch.float64))


def network(weight):
    """Layers x + 0.1 tanh(Kx + Du) with K antisymmetric: neither damping nor amplifying."""
    layers = ResidualNetwork(
        W1=[(K - K.T) / 2] * depth, W2=[0.1 * eye] * depth, B=[strength] * depth
    )
    return ControlProblem(layers, tracking_cost(weight), x0)


def with_ends(problem, start, target):
    """The same problem with another x_0 and another target of the last layer."""
    cost = dataclasses.replace(problem.cost, qf=-target)
    return ControlProblem(problem.dynamics, cost, start)


def fitted(problem, u_bar):
    solution = solve(problem, DDP(), problem.zero_controls(), max_steps=60, tol=1e-9)
    assert solution.status is Status.CONVERGED
    return two_sided_rate(torch.stack([(u - u_bar).norm() for u in solution.controls])[7:-7])


point = SteadyState.of(network(4.0), torch.zeros(width, dtype=torch.float64))
# The last layer's own cost wants grad Phi = p; a target of x - p puts the end on the turnpike.
start, end = 0.1 * normal(2, width)
near = with_ends(network(4.0), point.x + start, point.x - point.p + end)
ratio = fitted(near, point.u) / point.rate
print(f"network, ends near: predicted rate {point.rate:.3f}, fitted over predicted {ratio:.3f}")
assert 0.8 <= ratio <= 1.25

# %% [markdown]
# ## What breaks it (negative control)
#
# *No tracking.* The same network and ends, held against the same prediction. The optimal controls
# of the steady problem are then zero, and there is nothing to return to.
#
# *Far ends.* The rate is local. A layer here moves the state by at most $0.1$ in each entry; from
# far away the controls saturate, and the state travels at that bounded speed before it decays. A
# fit over layers counted from the ends then finds another rate, although the turnpike is there.

# %%
unwanted = with_ends(network(0.0), near.x0, point.x - point.p + end)
broken = fitted(unwanted, torch.zeros(width, dtype=torch.float64)) / point.rate
print(f"without tracking: {broken:.3f}")
assert not 0.8 <= broken <= 1.25

far = fitted(network(4.0), point.u) / point.rate
print(f"far ends: {far:.3f}")
assert abs(far - 1) > abs(ratio - 1)
