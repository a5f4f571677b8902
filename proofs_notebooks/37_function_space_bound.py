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
# ## The claim
#
# $F$ is the loss of a real fine-tuning with weight decay on a few rows, $\hat F$ that of the
# network linearised in its controls at the start, $S$ the points that both minimisations visit.

# %%
from deltacontrol.experiments.claims import scoreboard

claim = scoreboard.find(37)
for part in claim.parts:
    print(f"{part.name}: {part.title}; {part.threshold}")
