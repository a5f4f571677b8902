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
# # 36. A proportional law leaves a steady error, its integral removes it
#
# ## Statement
#
# Let the error of a state obey $x_{t+1} = A (x_t + u_t) + d$ with a constant disturbance $d$; the
# reference is zero.
#
# **A.** Under $u_t = -k_p x_t$ with $(1 - k_p) A$ stable, $x_t \to (I - (1 - k_p) A)^{-1} d$.
#
# **B.** Under $u_t = -k_p x_t - k_i \sum_{s \le t} x_s$ with a stable loop, $x_t \to 0$.
#
# **C.** With layers as time and the distance from a concept as the error, a language model under
# proportional steering keeps an error in its late layers, which the integral at least halves. This
# is an empirical statement about a model; it does not follow from A and B.

# %% [markdown]
# ## Assumptions
#
# A and B: linear steps, a disturbance that does not change from step to step, and a stable loop:
# of the matrix
# $\begin{pmatrix} (1 - k_p - k_i) A & -k_i A \\ I & I \end{pmatrix}$
# in $(x_t, z_{t-1})$, $z_t = \sum_{s \le t} x_s$, all eigenvalues are inside the unit circle.

# %% [markdown]
# ## Derivation
#
# **A.** The fixed point of $x \mapsto (1 - k_p) A x + d$, to which a stable affine map tends.
#
# **B.** A stable loop has one fixed point $(x, z)$, to which it tends. There $z = z + x$, hence
# $x = 0$, and $k_i A z = d$: the sum of the errors holds what cancels the disturbance.
# $\blacksquare$
#
# For one eigenvalue $\mu$ of $A$ the loop has the characteristic polynomial
# $\lambda^2 - (1 + (1 - k_p - k_i) \mu) \lambda + (1 - k_p) \mu$.

# %%
import sympy as sp

mu, kp, ki, lam, d = sp.symbols("mu k_p k_i lambda d")
loop = sp.Matrix([[(1 - kp - ki) * mu, -ki * mu], [1, 1]])
expected = lam**2 - (1 + (1 - kp - ki) * mu) * lam + (1 - kp) * mu
assert sp.expand(loop.charpoly(lam).as_expr() - expected) == 0
x, z = sp.symbols("x z")
fixed = sp.solve([(1 - kp - ki) * mu * x - ki * mu * z + d - x, x], [x, z], dict=True)[0]
assert fixed[x] == 0 and sp.simplify(fixed[z] - d / (ki * mu)) == 0

# %% [markdown]
# ## Numerical check
#
# One direction, $\mu = 0.8$: the error under both laws.

# %%
import matplotlib.pyplot as plt

runs = {}
for name, gain in (("proportional", 0.0), ("with the integral", 0.1)):
    state, total, path = 0.0, 0.0, []
    for _ in range(60):
        total += state
        state = 0.8 * (state - 0.4 * state - gain * total) + 1.0
        path.append(state)
    runs[name] = path
assert abs(runs["proportional"][-1] - 1 / (1 - 0.6 * 0.8)) < 1e-9
assert abs(runs["with the integral"][-1]) < 1e-2

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for name, path in runs.items():
    ax.plot(path, label=name)
ax.axhline(0, color="black", lw=0.5)
ax.set_xlabel("step")
ax.set_ylabel("error")
ax.legend()

# %% [markdown]
# ## What breaks it (negative control)
#
# Without the integral the error stays at what A says. Where a step forgets the state, $k_p = 1$,
# it does not matter which $A$ one takes in A: the error is $d$ either way. In the language model
# each text is given the sum of errors of another one, with which the errors grow.

# %%
state = 0.0
for _ in range(60):
    state = 0.8 * (state - 1.0 * state) + 1.0
assert state == 1.0  # d, whatever the eigenvalue

# %% [markdown]
# ## The claim

# %%
from deltacontrol.experiments.claims import scoreboard

claim = scoreboard.find(36)
for part in claim.parts:
    print(f"{part.name}: {part.title}; {part.threshold}")
