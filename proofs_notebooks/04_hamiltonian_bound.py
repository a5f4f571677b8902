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
# # 4. The Hamiltonians bound the change of the objective
#
# ## Statement
#
# Go from controls $u$ to controls $v$, near or far. Let $x, p$ be the states and costates of $u$,
# and for any function $g_t$ of state and control write
#
# $$\Delta g_t = g_t(x_t, v_t) - g_t(x_t, u_t),$$
#
# the states (and costates) of $u$ held fixed. In particular $\Delta H_t = H_t(x_t, v_t, p_{t+1}) -
# H_t(x_t, u_t, p_{t+1})$. Then, for one example,
#
# **A.**
#
# $$\Big| J(v) - J(u) - \sum_t \Delta H_t \Big| \le
# C_f \sum_t |\Delta f_t|^2 + \tfrac12 \sum_{t \ge 1} |\Delta \nabla_x H_t|^2, \qquad
# C_f = \tfrac12 \sum_{t=1}^{L-1} (1 + K_t)\, S_t + \tfrac12 K_\Phi S_L,$$
#
# with $S_t = \sum_{s<t} \prod_{s<r<t} \Lambda_r^2$ and the constants of the assumptions.
#
# **B.** As $\Delta \nabla_x H_t = (\Delta \partial_x f_t)^\top p_{t+1} + \Delta \nabla_x \ell_t$,
#
# $$J(v) - J(u) \le \sum_t \Delta H_t + C \sum_t \big( |\Delta f_t|^2 + |(\Delta \partial_x
# f_t)^\top p_{t+1}|^2 + |\Delta \nabla_x \ell_t|^2 \big), \qquad C = \max(C_f, 1),$$
#
# and $C = \max(C_f, \frac12)$ suffices where $\ell_t$ does not depend on the state. All norms are
# Euclidean, of vectors; every term is evaluated at $x_t$ and $p_{t+1}$ of the *old* controls. The
# published form (Li & Hao, ICML 2018, theorem 2) has $\|\Delta \partial_x f_t\|^2$, a matrix norm;
# it follows with $C \max(1, \max_t |p_{t+1}|^2)$, and costs a bound on the costates.
#
# **C.** For a batch, where $J$ is the mean over examples with shared controls, both hold with means
# over the examples of the squares, $p$ being the example's costate, and the largest of the
# examples' constants.
#
# Nothing is assumed of the dependence on the control: $v$ may be far from $u$, and controls may be
# discrete. To first order in $v - u$ the right side of A vanishes, so that it contains notebook 1.

# %% [markdown]
# ## Assumptions
#
# Let $x'$ be the states of $v$. On the segments from $x_t$ to $x'_t$:
#
# - $x \mapsto f_t(x, v_t)$ has the Lipschitz constant $\Lambda_t$;
# - $x \mapsto \nabla_x H_t(x, v_t, p_{t+1})$ has the Lipschitz constant $K_t$;
# - $\nabla \Phi$ has the Lipschitz constant $K_\Phi$.
#
# One $C$ for all steps of a region needs these constants to be bounded on it, and the costates,
# which enter $K_t$.

# %% [markdown]
# ## Derivation
#
# Let $\delta_t = x'_t - x_t$, $\delta_0 = 0$. As $\sum_t [\langle p_{t+1}, \delta_{t+1} \rangle -
# \langle p_t, \delta_t \rangle] = \langle \nabla \Phi(x_L), \delta_L \rangle$ and
# $\langle p_{t+1}, \delta_{t+1} \rangle = \langle p_{t+1}, f_t(x'_t, v_t) - f_t(x_t, u_t) \rangle$,
#
# $$J(v) - J(u) = r_\Phi + \sum_t \big[ H_t(x'_t, v_t) - H_t(x_t, u_t) - \langle p_t, \delta_t
# \rangle \big],$$
#
# $$r_\Phi = \Phi(x'_L) - \Phi(x_L) - \langle \nabla \Phi(x_L), \delta_L \rangle,$$
#
# every $H_t$ with $p_{t+1}$. Insert $H_t(x_t, v_t)$, and $p_t = \nabla_x H_t(x_t, u_t)$:
#
# $$J(v) - J(u) = \sum_t \Delta H_t + \sum_{t \ge 1} \langle \Delta \nabla_x H_t, \delta_t \rangle +
# \sum_{t \ge 1} r_t + r_\Phi, \tag{1}$$
#
# $$r_t = H_t(x'_t, v_t) - H_t(x_t, v_t) - \langle \nabla_x H_t(x_t, v_t), \delta_t \rangle .$$
#
# This is an identity. By the assumptions $|r_t| \le \frac12 K_t |\delta_t|^2$, $|r_\Phi| \le
# \frac12 K_\Phi |\delta_L|^2$, and $|\langle a, b \rangle| \le \frac12 |a|^2 + \frac12 |b|^2$.
# Finally $|\delta_{t+1}| \le |f_t(x'_t, v_t) - f_t(x_t, v_t)| + |\Delta f_t| \le \Lambda_t
# |\delta_t| + |\Delta f_t|$, hence
#
# $$|\delta_t| \le \sum_{s<t} \Big( \prod_{s<r<t} \Lambda_r \Big) |\Delta f_s|, \qquad
# |\delta_t|^2 \le S_t \sum_s |\Delta f_s|^2$$
#
# by Cauchy and Schwarz. Collecting gives A. B is $|a + b|^2 \le 2 |a|^2 + 2 |b|^2$; C is the mean
# of A. $\blacksquare$
#
# The identity (1), for one family of two-step problems, by symbols:

# %%
import sympy as sp

x0, u0, u1, v0, v1, a, b, c = sp.symbols("x0 u0 u1 v0 v1 a b c", real=True)


def f(x, u):
    return a * x + u * x**2 + b * u


def running(x, u):
    return c * u**2 + x * u


def terminal(x):
    return x**3 + x


def rollout(controls):
    states = [x0]
    for u in controls:
        states.append(f(states[-1], u))
    return states


X, P = sp.symbols("X P", real=True)
old, new = rollout((u0, u1)), rollout((v0, v1))
J_old = terminal(old[2]) + running(old[0], u0) + running(old[1], u1)
J_new = terminal(new[2]) + running(new[0], v0) + running(new[1], v1)


def H(x, u, p):
    return running(x, u) + p * f(x, u)


def slope(x, u, p):
    return sp.diff(H(X, u, P), X).subs({X: x, P: p})


p2 = sp.diff(terminal(X), X).subs(X, old[2])
p1 = slope(old[1], u1, p2)
d1, d2 = new[1] - old[1], new[2] - old[2]
right = (
    (H(old[0], v0, p1) - H(old[0], u0, p1))
    + (H(old[1], v1, p2) - H(old[1], u1, p2))
    + (slope(old[1], v1, p2) - slope(old[1], u1, p2)) * d1
    + (H(new[1], v1, p2) - H(old[1], v1, p2) - slope(old[1], v1, p2) * d1)
    + (terminal(new[2]) - terminal(old[2]) - p2 * d2)
)
assert sp.expand(J_new - J_old - right) == 0

# %% [markdown]
# ## Numerical check
#
# Residual layers $x + W_2 \tanh(W_1 x + B u)$ with the squared error. All constants are explicit
# and, together with a bound on the costates, hold everywhere:
#
# - $\Lambda_t = 1 + \|W_1\| \|W_2\|$, $K_\Phi = 1$;
# - $K_t = \frac{4}{3 \sqrt 3} \|W_1\|^2 \|W_2\| |p_{t+1}|$, as $\max |\tanh''| = \frac{4}{3 \sqrt
#   3}$;
# - $|p_{t+1}| \le \prod_{r>t} \Lambda_r\, |x_L - y|$, and $|x_L - x_0| \le \sum_t \|W_2\| \sqrt h$,
#   whatever the controls.
#
# Threshold, fixed before measuring: with this one $C$, no step of any size violates A, two-sided.

# %%
import math

import torch

from deltacontrol.theory import (
    Claim,
    ControlProblem,
    Dynamics,
    Evidence,
    ResidualNetwork,
    SquaredErrorCost,
    Threshold,
    judge,
)
from deltacontrol.theory.solvers.emsa import step_change

generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


random = ResidualNetwork.random(4, width=3, hidden=5, control_size=2, seed=1)
network = ResidualNetwork(W1=random.W1 / 2, W2=random.W2, B=random.B)
problem = ControlProblem(network, SquaredErrorCost(normal(6, 3), weight_decay=0.2), normal(6, 3))


def derived_constant(problem, network):
    """C_f of statement A, for all controls at once."""
    norms1 = [float(torch.linalg.matrix_norm(W, 2)) for W in network.W1]
    norms2 = [float(torch.linalg.matrix_norm(W, 2)) for W in network.W2]
    lipschitz = [1 + a * b for a, b in zip(norms1, norms2, strict=True)]
    hidden = network.W1.shape[1]
    start = float((problem.x0 - problem.cost.target).norm(dim=1).max())
    error = start + sum(norm * math.sqrt(hidden) for norm in norms2)
    horizon = network.horizon
    total = 0.0
    for t in range(1, horizon + 1):
        S = sum(math.prod(lipschitz[s + 1 : t]) ** 2 for s in range(t))
        if t == horizon:
            return total + 0.5 * S
        costate = math.prod(lipschitz[t + 1 :]) * error
        K = 4 / (3 * math.sqrt(3)) * norms1[t] ** 2 * norms2[t] * costate
        total += 0.5 * (1 + K) * S
    raise AssertionError


def terms(problem, u, v, now=None):
    """J(v) - J(u), the sum of the Hamiltonians' changes, and the two sums of squares."""
    now = now or problem.evaluate(u)
    changes = [
        step_change(problem, t, now.states[t], now.costates[t + 1], a, b)
        for t, (a, b) in enumerate(zip(u, v, strict=True))
    ]
    return (
        float(problem.objective(v) - problem.objective(u)),
        sum(float(change.hamiltonian) for change in changes),
        sum(float(change.state) for change in changes),
        sum(float(change.costate) for change in changes[1:]),
    )


def random_steps(sizes, copies, of=lambda u: u):
    for size in sizes:
        for _ in range(copies):
            u = tuple(normal(m) for m in network.control_sizes)
            yield of(u), of(tuple(a + size * normal(len(a)) for a in u))


C_f = derived_constant(problem, network)
used = []
for u, v in random_steps((1e-3, 1e-2, 0.1, 1.0, 10.0), 30):
    change, hamiltonians, states, costates = terms(problem, u, v)
    used.append((change - hamiltonians) / (C_f * states + 0.5 * costates))
worst = max(abs(ratio) for ratio in used)
print(f"derived C_f = {C_f:.1f}; part of the bound in use: {min(used):.4f} to {max(used):.4f}")
assert worst <= 1

# %%
import matplotlib.pyplot as plt

sizes = [size for size in (1e-3, 1e-2, 0.1, 1.0, 10.0) for _ in range(30)]
figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.loglog(sizes, [abs(ratio) for ratio in used], ".")
ax.axhline(1, color="black", lw=0.5)
ax.set_xlabel("size of the change of the controls")
ax.set_ylabel("part of the bound in use")

# %% [markdown]
# The constant is far from tight, as products of norms are. The smallest one that these steps need:

# %%
steps = list(random_steps((1e-3, 1e-2, 0.1, 1.0, 10.0), 30))


def needed(problem, u, v, now=None):
    """The smallest C of statement B."""
    change, hamiltonians, states, costates = terms(problem, u, v, now)
    return (change - hamiltonians) / (states + costates)


largest = max(needed(problem, u, v) for u, v in steps)
print(f"needed C = {largest:.3f}, derived {max(C_f, 0.5):.1f}")
assert 0 < largest <= max(C_f, 0.5)

# %% [markdown]
# Nothing is asked of the control. With $\operatorname{sign}(u)$ in the place of $u$ the same
# constants serve steps between binary controls, although $H$ has no gradient in $u$ to speak of.


# %%
class Binary(Dynamics):
    """The network under the signs of its controls."""

    horizon, control_sizes = network.horizon, network.control_sizes

    def step(self, t, x, u):
        return network.step(t, x, 3 * torch.sign(u))


binary = ControlProblem(Binary(), problem.cost, problem.x0)
flips = []
for u, v in random_steps((0.3, 1.0), 40, of=lambda u: tuple(a.sign() for a in u)):
    change, hamiltonians, states, costates = terms(binary, u, v)
    if states:
        assert abs(change - hamiltonians) <= C_f * states + 0.5 * costates
        flips.append(abs(change - hamiltonians) / (C_f * states + 0.5 * costates))
print(f"{len(flips)} steps between binary controls, at most {max(flips):.4f} of the bound")
assert len(flips) > 40

# %% [markdown]
# The batch (statement C): a mean over examples with a costate each. The squares of one example,
# weighted as `step_change` does, add up to those of the batch.

# %%
u, v = steps[-1]
whole = terms(problem, u, v)
parts = [
    terms(
        ControlProblem(
            network, SquaredErrorCost(problem.cost.target[i : i + 1], 0.2), problem.x0[i : i + 1]
        ),
        u,
        v,
    )
    for i in range(6)
]
means = [sum(values) / 6 for values in zip(*parts, strict=True)]
assert max(abs(a - b) for a, b in zip(whole, means, strict=True)) < 1e-9 * max(map(abs, whole))

# %% [markdown]
# ## What breaks it (negative control)
#
# **A kink.** $x_1 = u_0$, $x_2 = \max(x_1, 0)$, $\Phi(x) = x$, from $u_0 = 0$ with $p_1 = 0$, one
# of its subgradients: a step $s > 0$ has $\Delta J = s$, $\Delta H = 0$ and $|\Delta f|^2 = s^2$.
# It needs $C = 1/s$: no finite constant serves all steps, because $\nabla_x H_1$ is not Lipschitz.
#
# **Wrong costates.** With costates of other controls $\sum_t \Delta H_t$ is wrong to first order,
# the squares are of second: again the needed $C$ grows as $1/s$.


# %%
class Kink(Dynamics):
    """A shift, then a rectifier."""

    horizon, control_sizes = 2, (1, 0)

    def step(self, t, x, u):
        return x + u if t == 0 else torch.relu(x)


class Identity(SquaredErrorCost):
    """The final state itself."""

    def terminal(self, x):
        return x.sum()


zero = torch.zeros(1, dtype=torch.float64)
kink = ControlProblem(Kink(), Identity(zero), zero)
for size in (1.0, 0.1, 0.01):
    assert abs(needed(kink, (zero, zero[:0]), (zero + size, zero[:0])) * size - 1) < 1e-12

elsewhere = problem.evaluate(tuple(1.01 * a + 0.01 for a in u))
now = problem.evaluate(u)
wrong = type(now)(now.states, elsewhere.costates, now.objective, now.gradient)
direction = tuple(normal(len(a)) for a in u)
sizes = (1e-4, 1e-5, 1e-6)
grows = [
    max(
        needed(problem, u, tuple(a + sign * size * d for a, d in zip(u, direction, strict=True)), n)
        for sign in (1, -1)
    )
    for n in (wrong, now)
    for size in sizes
]
extra = [a - b for a, b in zip(grows[:3], grows[3:], strict=True)]
orders = [math.log10(extra[1] / extra[0]), math.log10(extra[2] / extra[1])]
print(f"wrong costates: C needed {grows[:3]}, right ones: {grows[3:]}")
assert all(abs(order - 1) < 0.05 for order in orders)
# The right costates serve the same steps: so the control can pass.
assert max(grows[3:]) <= max(C_f, 0.5)

# %%
claim = Claim(
    id=4,
    name="hamiltonian-bound",
    title="The Hamiltonians bound the change of J",
    statement="statement B with the derived constant",
    source="Li & Hao, ICML 2018, Theorem 2",
    notebook="proofs_notebooks/04_hamiltonian_bound.py",
    threshold=Threshold("<=", 1, "needed C relative to the derived one"),
    predict=lambda: {"C": max(C_f, 0.5)},
    measure=lambda prediction: Evidence(largest / prediction["C"]),
    negative_control=lambda prediction: Evidence(grows[2] / prediction["C"]),
    passing_control=lambda prediction: Evidence(grows[5] / prediction["C"]),
)
outcome = judge(claim)
print(outcome.text, "-", outcome.part().reason)
assert outcome.holds
