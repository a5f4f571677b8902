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
# # 37. A uniformly close objective has a nearly optimal minimiser
#
# ## Statement
#
# Let $F, \hat F: S \to \mathbb{R}$ with $\sup_S |F - \hat F| \le \varepsilon$, $u^* \in S$ a
# minimiser of $F$ and $\hat u \in S$ one of $\hat F$.
#
# **A.** $|\min F - \min \hat F| \le \varepsilon$.
#
# **B.** $F(\hat u) - F(u^*) \le 2 \varepsilon$, and the constant cannot be improved.
#
# **C.** For the loss $F$ of a fine-tuning with weight decay and $\hat F$ that of the network linear
# in its controls, $2 \varepsilon$ is less than what tuning gains. This is empirical.
#
# ## Assumptions
#
# A and B: both minima are attained in $S$, on which the distance is taken. C: the decay holds both
# minimisers near the start.

# %% [markdown]
# ## Derivation
#
# **A.** $\min \hat F \le \hat F(u^*) \le F(u^*) + \varepsilon$, and the same with both exchanged.
#
# **B.** $F(\hat u) \le \hat F(\hat u) + \varepsilon \le \hat F(u^*) + \varepsilon
# \le F(u^*) + 2 \varepsilon$. On two points with $F = (0, 2\varepsilon)$ and
# $\hat F = (\varepsilon, \varepsilon)$ both are minimisers of $\hat F$, and the second one attains
# the bound. $\blacksquare$
#
# The bound says something where $2 \varepsilon$ is less than $F(u_0) - F(u^*)$, what tuning from a
# start $u_0$ gains; else $u_0$ itself is as good a promise.
#
# Near a start at which both agree to first order $\hat F$ is much better than the bound. With
# $H$ the Hessian of $F$ and $F - \hat F = \frac{1}{2} u' C u$, the loss of optimality is of the
# order of $|C u^*|^2 / H$, hence $O(|C|^2)$, where $2 \varepsilon = O(|C|)$:

# %%
import sympy as sp

g, H, C, u = sp.symbols("g H C u", real=True)
F = g * u + H * u**2 / 2
close = F - C * u**2 / 2
best, other = sp.solve(sp.diff(F, u), u)[0], sp.solve(sp.diff(close, u), u)[0]
lost = sp.series(F.subs(u, other) - F.subs(u, best), C, 0, 3).removeO()
epsilon = sp.series((F - close).subs(u, best), C, 0, 2).removeO()
assert sp.simplify(lost - C**2 * g**2 / (2 * H**3)) == 0
assert sp.simplify(epsilon - C * g**2 / (2 * H**2)) == 0

# %% [markdown]
# ## Numerical check
#
# Two thousand pairs of twelve numbers, and the pair that attains the bound.

# %%
import numpy as np

random = np.random.default_rng(0)
worst = 0.0
for _ in range(2000):
    F = random.normal(size=12)
    close = F + random.uniform(-1, 1, size=12)
    epsilon = np.abs(F - close).max()
    assert abs(F.min() - close.min()) <= epsilon
    worst = max(worst, (F[close.argmin()] - F.min()) / (2 * epsilon))
assert worst <= 1
print(f"largest loss of optimality over 2 epsilon in 2,000 draws: {worst:.3f}")

F, close = np.array([0.0, 2.0]), np.array([1.0, 1.0])
assert F[1] - F[0] == 2 * np.abs(F - close).max()

# %% [markdown]
# ## What breaks it (negative control)
#
# The distance is taken on a set that does not hold the minimiser of $\hat F$: it says nothing
# of it. Where what $\hat F$ loses beyond the set is little, the bound is as good as before.

# %%
import matplotlib.pyplot as plt

x = np.linspace(-1, 1, 2001)
F = (x - 0.5) ** 2
ratios = []
for beyond in (0.0, 0.1, 10.0, 100.0):
    close = F + 0.1 * np.cos(9 * x) - 0.1 * beyond * x**2 * (x < 0)
    epsilon = np.abs(F - close)[x >= 0].max()  # on one half
    ratios.append((F[close.argmin()] - F.min()) / (2 * epsilon))
assert max(ratios[:2]) <= 1 < min(ratios[3:])

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.plot(x, F, label="$F$")
ax.plot(x, close.clip(-1), label=r"$\hat F$, close on the right half alone")
ax.set_xlabel("$u$")
ax.legend()

# %% [markdown]
# ## The claim
#
# On polynomials the largest $|F - \hat F|$ is known. For networks $S$ is a finite set: the start,
# both minimisers, what is half-way to them, and the mirror images of all. The bound is then a
# theorem about these points, which checks how the minimisers are found; that it says something is
# the empirical part.

# %%
from deltacontrol.experiments.claims import scoreboard

claim = scoreboard.find(37)
for part in claim.parts:
    print(f"{part.name}: {part.title}; {part.threshold}")
