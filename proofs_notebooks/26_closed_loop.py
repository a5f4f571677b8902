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
# # 26. The closed loop at inference: projection, PID, and steering of rank one
#
# ## Statement
#
# The control is added to the state that enters a layer, $x_{t+1} = f_t(x_t + u_t)$. Let
# $\mathcal M_t = \mu_t + \operatorname{span} V_t$ be the principal subspace of states seen on clean
# data, $P_t = I - V_t V_t^\top$ and $e_t = P_t (x_t - \mu_t)$ (Chen, Li & Zhang, ICLR 2021).
#
# **A.** $u_t = -\frac{1}{1+c}\, e_t$ is the minimiser of
# $\frac12 \|P_t (x_t + u - \mu_t)\|^2 + \frac c2 \|u\|^2$.
#
# **B.** Where the layers carry $\mathcal M_t$ into $\mathcal M_{t+1}$ and act on what is orthogonal
# to it as $\sigma$ times an isometry, the law that minimises the *sum* of these costs over all
# layers is again a projection, $u_t = -k_t e_t$, with
#
# $$k_t = \frac{b_t}{b_t + c}, \qquad b_t = 1 + \sigma^2 c\, k_{t+1}, \qquad k_L = 0 .$$
#
# The greedy gain of A is that of the last layer, and of every layer only if $\sigma = 0$. With
# costs of the integral $z_t = \sum_{s \le t} e_s$ and of the difference $e_t + u_t - e_{t-1}$ the
# optimal law is a PID law with gains from a $3 \times 3$ Riccati recursion.
#
# **C.** In that linear model a perturbation $\delta = \delta_\parallel + \delta_\perp$ of $x_0$
# reaches the output $z = g^\top x_L$ as
#
# $$\Delta z = g^\top \Big(\textstyle\prod_t A_t\Big) \delta_\parallel + O\Big(\prod_t \sigma (1 -
# k_t)\Big) \|\delta_\perp\| .$$
#
# Projection removes what leaves the subspace and *nothing else*: the part of the damage that it can
# undo is the part that came through $\delta_\perp$. That it restores a quarter of the accuracy of a
# real network is therefore a statement about the network and the adversary, not a theorem. The
# scoreboard measures it.
#
# **D.** Steering. Let one output be led to a target, $\frac w2 (g^\top x_L - y)^2 + \frac r2 \sum_t
# \|u_t\|^2$, layers linear. The cost to go has rank one. With one backward pass, $a_L = g$,
# $a_t = A_t^\top a_{t+1}$,
#
# $$V_t(x) = \frac{\alpha_t}{2} \big(a_t^\top (x - \bar x_t) + d\big)^2, \qquad \alpha_t =
# \frac{\alpha_{t+1}}{1 + \alpha_{t+1} \|a_t\|^2 / r}, \quad \alpha_L = w,$$
#
# where $d = g^\top \bar x_L - y$ is the miss of the uncontrolled trajectory $\bar x$, and
# $u_t(x) = -\frac{\alpha_t}{r}\, a_t \big(a_t^\top (x - \bar x_t) + d\big)$ is the exact feedback.
# For $k$ outputs, $1/\alpha_t$ becomes $M_t = W^{-1} + \frac1r \sum_{s \ge t} a_s^\top a_s$, a
# $k \times k$ matrix: the output controllability Gramian of the remaining layers.

# %% [markdown]
# ## Assumptions
#
# - A: none. B, C: linear layers with offsets, $A_t V_t \subseteq \operatorname{span} V_{t+1}$ and
#   $P_{t+1} A_t P_t = \sigma R_t P_t$, $R_t$ an isometry, $V_{t+1}^\top A_t P_t = 0$; $c > 0$.
# - D: $r > 0$, $w > 0$, layers linear along the trajectory; no running cost of the state (with one,
#   the rank grows by that of $\nabla^2_x \ell_t$ at each layer).
# - Real networks satisfy none of the linear ones; there B to D are models.

# %% [markdown]
# ## Derivation
#
# **A.** The gradient $P_t(x_t + u - \mu_t) + c\,u$ vanishes at $u = -\frac1{1+c} e_t$:
# $P_t u = u$, so it equals $e_t - \frac1{1+c} e_t - \frac c{1+c} e_t = 0$.
#
# **B.** Suppose $V_{t+1} = \frac{q_{t+1}}2 \|e_{t+1}\|^2$. As $e_{t+1} = \sigma R_t P_t (e_t +
# u_t)$, a part of $u_t$ in $\operatorname{span} V_t$ only costs, so $u_t = P_t u_t$ and
#
# $$V_t = \min_u \tfrac12 (1 + \sigma^2 q_{t+1}) \|e_t + u\|^2 + \tfrac c2 \|u\|^2,$$
#
# which with $b_t = 1 + \sigma^2 q_{t+1}$ is solved by $u = -\frac{b_t}{b_t + c} e_t$ and leaves
# $q_t = \frac{b_t c}{b_t + c} = c\,k_t$. With integral and difference the same holds in the state
# $(e_t, z_{t-1}, e_{t-1})$, all three transported by the isometries, so that the problem is
# one $3 \times 3$ problem for each orthogonal direction. A cost of the *uncorrected* difference
# $e_t - e_{t-1}$ would leave no derivative gain: it is spent when $u_t$ is chosen, and later costs
# do not involve $e_{t-1}$.
#
# **C.** $\delta_\parallel$ stays in the subspaces, where $P_t$ does not see it; $\delta_\perp$ is
# multiplied by $\sigma (1 - k_t)$ in each layer. $\blacksquare$
#
# **D.** Let $V_{t+1}$ be as stated. In
# $V_t(x) = \min_u \frac r2 \|u\|^2 + V_{t+1}(A_t(x + u) + c_t)$ the argument is
# $a_{t+1}^\top A_t (x + u - \bar x_t) + d = a_t^\top (x + u - \bar x_t) + d =: m + a_t^\top u$.
# Stationarity, $(r I + \alpha\, a a^\top) u = -\alpha\, a\, m$ with $\alpha = \alpha_{t+1}$,
# is solved by Sherman-Morrison,
#
# $$(r I + \alpha\, a a^\top)^{-1} = \frac1r \Big( I - \frac{\alpha\, a a^\top / r}{1 + \alpha
# \|a\|^2 / r} \Big) \quad\Longrightarrow\quad u = -\frac1r\, \frac{\alpha}{1 + \alpha \|a\|^2/r}\,
# a\, m = -\frac{\alpha_t}{r} a\, m ,$$
#
# and $V_t = \frac{\alpha_t}2 m^2$ follows. In the reciprocal the recursion is a sum: $1/\alpha_t =
# 1/\alpha_{t+1} + \|a_t\|^2 / r$. $\blacksquare$

# %%
import sympy as sp

c, sigma, q = sp.symbols("c sigma q", positive=True)
e, u = sp.symbols("e u", real=True)
stage = (e + u) ** 2 / 2 + c / 2 * u**2
(greedy,) = sp.solve(sp.diff(stage, u), u)
assert sp.simplify(greedy + e / (1 + c)) == 0
cost = stage + q / 2 * sigma**2 * (e + u) ** 2
(best,) = sp.solve(sp.diff(cost, u), u)
b = 1 + sigma**2 * q
assert sp.simplify(best + b / (b + c) * e) == 0
assert sp.simplify(cost.subs(u, best) - c * b / (b + c) * e**2 / 2) == 0

alpha, r, m = sp.symbols("alpha r m", positive=True)
a = sp.Matrix(sp.symbols("a0:3", real=True))
claimed = -alpha / (1 + alpha * a.dot(a) / r) / r * a * m
residual = (r * sp.eye(3) + alpha * a * a.T) * claimed + alpha * a * m
assert sp.simplify(residual) == sp.zeros(3, 1)
v = sp.Matrix(sp.symbols("v0:3", real=True))
value = r / 2 * claimed.dot(claimed) + alpha / 2 * (m + a.dot(claimed)) ** 2
assert sp.simplify(value - alpha / (1 + alpha * a.dot(a) / r) * m**2 / 2) == 0

# %% [markdown]
# ## Numerical check
#
# Thresholds, fixed before measuring: controls equal to those of a dense Riccati recursion to
# $10^{-9}$ relative, in float64, also under disturbances; the prediction of C to $10^{-12}$.

# %%
import torch

from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.feedback.affine_subspace import AffineSubspace
from deltacontrol.theory.feedback.correction import AdditiveControl, PIDGains, ProjectionCorrection
from deltacontrol.theory.feedback.laws import closed_loop
from deltacontrol.theory.feedback.steering import steer_output

F64 = torch.float64
generator = torch.Generator().manual_seed(0)
WIDTH, RANK, LAYERS = 8, 3, 6


def normal(*shape):
    return torch.randn(*shape, generator=generator, dtype=F64)


def frame(size):
    return torch.linalg.qr(normal(size, size))[0]


def layers(sigma, leak=0.0):
    """Layers that carry the subspaces along; with ``leak`` they mix the two parts."""
    frames = [frame(WIDTH) for _ in range(LAYERS + 1)]
    means = [normal(WIDTH) for _ in range(LAYERS + 1)]
    A, offsets = [], []
    for t in range(LAYERS):
        inner = leak * normal(WIDTH, WIDTH)
        inner[:RANK, :RANK] += frame(RANK)
        inner[RANK:, RANK:] += sigma * frame(WIDTH - RANK)
        A.append(frames[t + 1] @ inner @ frames[t].mT)
        offsets.append(means[t + 1] - A[t] @ means[t])
    subspaces = [AffineSubspace(means[t], frames[t][:, :RANK]) for t in range(LAYERS)]
    return LinearDynamics(A, A, offsets), subspaces, means


def dense_law(dynamics, Q, R, N, q, r, Qf, qf):
    """Gains and offsets of the law u = K x + k, by the plain Riccati recursion with all terms."""
    P, p, law = Qf, qf, []
    for t in reversed(range(LAYERS)):
        A, B, o = dynamics.A[t], dynamics.B[t], dynamics.c[t]
        H = R[t] + B.mT @ P @ B
        G = N[t].mT + B.mT @ P @ A
        h = r[t] + B.mT @ (P @ o + p)
        K, k = -torch.linalg.solve(H, G), -torch.linalg.solve(H, h)
        law.append((K, k))
        P, p = Q[t] + A.mT @ P @ A + G.mT @ K, q[t] + A.mT @ (P @ o + p) + G.mT @ k
    return law[::-1]


def tracking_law(dynamics, subspaces, control_cost):
    eye, zero = torch.eye(WIDTH, dtype=F64), torch.zeros(WIDTH, WIDTH, dtype=F64)
    P = [eye - s.basis @ s.basis.mT for s in subspaces]
    q = [-p @ s.mean for p, s in zip(P, subspaces, strict=True)]
    R = [p + control_cost * eye for p in P]
    return dense_law(dynamics, P, R, P, q, q, zero, zero[0])


def difference(law, dense, states):
    """Largest relative difference of two laws on the states of a run."""
    pairs = [
        (law.control(t, x), x @ K.mT + k)
        for t, (x, (K, k)) in enumerate(zip(states, dense, strict=False))
    ]
    scale = max(float(b.norm()) for _, b in pairs)
    return max(float((a - b).norm()) / scale for a, b in pairs)


worst = 0.0
for sigma_value in (0.0, 0.8, 1.2):
    for control_cost in (0.1, 1.0, 5.0):
        dynamics, subspaces, means = layers(sigma_value)
        gains = PIDGains.optimal(LAYERS, control_cost, transverse=sigma_value)
        law = ProjectionCorrection(subspaces, gains.proportional)
        disturbed = closed_loop(
            dynamics, law, means[0] + normal(4, WIDTH), [normal(4, WIDTH)] * LAYERS
        )
        dense = tracking_law(dynamics, subspaces, control_cost)
        worst = max(worst, difference(law, dense, disturbed.states))
print(f"B: optimal projection against dense Riccati, {worst:.1e}")
assert worst <= 1e-9

# %% [markdown]
# **C.** The exact share of the damage that projection undoes.

# %%
dynamics, subspaces, means = layers(0.9)
g = normal(WIDTH)
delta = 0.1 * normal(WIDTH)
for gain in (0.0, 0.5, 1.0):
    law = ProjectionCorrection(subspaces, gain)
    clean, moved = (
        closed_loop(dynamics, law, x0).states[-1] for x0 in (means[0], means[0] + delta)
    )
    across = subspaces[0].error(means[0] + delta)
    along, orthogonal = delta - across, across
    for A in dynamics.A:
        along, orthogonal = A @ along, (1 - gain) * (A @ orthogonal)
    predicted = float(g @ (along + orthogonal))
    measured = float(g @ (moved - clean))
    print(f"C: gain {gain}: damage {measured:+.6f}, of which along the subspace {g @ along:+.6f}")
    assert abs(predicted - measured) <= 1e-12
assert abs(measured - float(g @ along)) <= 1e-12  # full gain leaves the tangential part, all of it

# %% [markdown]
# **D.** Steering of one and of three outputs, against the dense recursion.

# %%
worst = 0.0
for k in (1, 3):
    G, target, W, effort = normal(k, WIDTH), normal(k), torch.diag(normal(k) ** 2 + 0.5), 0.7
    plain = LinearDynamics(dynamics.A, [torch.zeros(WIDTH, 0, dtype=F64)] * LAYERS, dynamics.c)
    eye, zero = torch.eye(WIDTH, dtype=F64), torch.zeros(WIDTH, WIDTH, dtype=F64)
    nothing = QuadraticCost.constant(LAYERS, zero, torch.zeros(0, 0, dtype=F64), zero)
    problem = ControlProblem(plain, nothing, means[0] + normal(4, WIDTH))
    added = AdditiveControl(problem, problem.zero_controls())
    law = steer_output(
        added, problem.x0, lambda x, G=G: x @ G.mT, target, weight=W, control_cost=effort
    )
    dense = dense_law(
        dynamics, [zero] * LAYERS, [effort * eye] * LAYERS, [zero] * LAYERS, [zero[0]] * LAYERS,
        [zero[0]] * LAYERS, G.mT @ W @ G, -G.mT @ W @ target,
    )  # fmt: skip
    loop = closed_loop(added, law, problem.x0, [normal(4, WIDTH)] * LAYERS)
    worst = max(worst, difference(law, dense, loop.states))
    undisturbed = closed_loop(added, law, problem.x0).states[-1] @ G.mT
    assert float((undisturbed - law.predicted).abs().max()) <= 1e-10
print(f"D: rank-k feedback against dense Riccati, {worst:.1e}")
assert worst <= 1e-9

# %% [markdown]
# ## What breaks it (negative control)
#
# Layers that mix the two parts: the scalar gains are no longer the optimum. An adversary inside the
# subspace: projection does nothing at all. A random subspace of the same rank: it removes the share
# $1 - k/n$ of *everything*, the signal included, which is the negative control of the measurement
# on the real network.

# %%
mixing, subspaces, means = layers(0.9, leak=0.3)
gains = PIDGains.optimal(LAYERS, 1.0, transverse=0.9)
law = ProjectionCorrection(subspaces, gains.proportional)
loop = closed_loop(mixing, law, means[0] + normal(4, WIDTH))
broken = difference(law, tracking_law(mixing, subspaces, 1.0), loop.states)
print(f"layers that mix: difference to the optimum {broken:.2f}")
assert broken > 1e-3

dynamics, subspaces, means = layers(0.9)
inside = subspaces[0].basis @ normal(RANK)
runs = [
    closed_loop(dynamics, ProjectionCorrection(subspaces, gain), means[0] + inside).states[-1]
    for gain in (0.0, 1.0)
]
assert float((runs[0] - runs[1]).abs().max()) <= 1e-12

signal = normal(20000, WIDTH)
shares = [
    float(AffineSubspace(0 * means[0], frame(WIDTH)[:, :RANK]).error(signal).square().sum())
    / float(signal.square().sum())
    for _ in range(20)
]
print(f"a random subspace removes {sum(shares) / 20:.3f} of the signal, 1 - k/n is {5 / 8:.3f}")
assert abs(sum(shares) / 20 - (1 - RANK / WIDTH)) < 0.01

# %%
import matplotlib.pyplot as plt

first = means[0] + normal(WIDTH)
figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for gain in (0.0, 0.5, 0.9):
    states = closed_loop(dynamics, ProjectionCorrection(subspaces, gain), first).states
    distances = [float(s.error(x).norm()) for s, x in zip(subspaces, states, strict=False)]
    ax.semilogy(distances, "o-", label=f"gain {gain}")
ax.set_xlabel("layer")
ax.set_ylabel("distance to the subspace")
ax.legend()
