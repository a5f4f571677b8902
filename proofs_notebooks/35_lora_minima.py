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
# # 35. LoRA's minima are low-rank and small, or high-rank and large
#
# ## Statement
#
# Let $f$ be convex and twice differentiable on matrices, and $F(A, B) = f(B A) +
# \frac{\lambda}{2} (\|A\|^2 + \|B\|^2)$ with $A$ of $r$ rows, $B$ of $r$ columns.
#
# **A.** A second-order stationary point of $F$ with $\operatorname{rank}(B A) < r$ is a global
# minimum. So a minimum that is not global has full rank $r$.
#
# **B.** Such minima have a larger norm $\|B A\|$ than the global one. This is an empirical
# statement about random problems; it does not follow from A.
#
# **C.** LoRA on one matrix of a real model, whose loss is not convex in $B A$, ends from large
# starts either low-rank and global or high-rank and large.
#
# The abstract of the source says that LoRA "converges to a global minimizer with low rank and small
# magnitude, or a qualitatively distinct solution with high rank and large magnitude". Its theorem
# needs restricted convexity and smoothness with constants, which are not repeated here.
#
# ## Assumptions
#
# A: convexity of $f$, decay $\lambda > 0$ of both factors, stationarity with a positive
# semidefinite Hessian. B and C: large starts, and a global minimum of rank at most $r$ (B) or
# below it (C).

# %% [markdown]
# ## Derivation
#
# Decay of the factors is a nuclear norm: $\frac{1}{2} (\|A\|^2 + \|B\|^2) \ge \|B A\|_*$, with
# equality for balanced factors. So $\min F \ge \min_X f(X) + \lambda \|X\|_*$, a convex program,
# whose minimisers are the $X$ with $-\nabla f(X) \in \lambda\, \partial \|X\|_*$.
#
# **A.** Let $G = \nabla f(B A)$. Stationarity, $B' G = -\lambda A$ and $G A' = -\lambda B$, makes
# the factors balanced, $A A' = B' B$, and with $B A = U \Sigma V'$ gives $U' G = -\lambda V'$, $G
# V = -\lambda U$. So $-G/\lambda = U V' + W$ with $U' W = 0$, $W V = 0$, and what is left to show
# is $\|W\|_2 \le 1$. If the rank of $B A$ is below $r$, then, the factors being balanced, some
# unit $q$ has $B q = 0$ and $q' A = 0$. Move to $B + s\, u q'$, $A + s\, q v'$ with unit vectors
# $u, v$: the product changes by $s^2 u v'$ alone, and $F$ by $s^2 (u' G v + \lambda) + O(s^4)$. A
# positive semidefinite Hessian therefore needs $u' G v \ge -\lambda$ for all $u, v$, which is
# $\|G\|_2 \le \lambda$. $\blacksquare$
#
# Convexity is used once: stationary points of the convex program are its minima.

# %%
import sympy as sp

s, lam, g = sp.symbols("s lambda g", real=True)
# f(X + s² u v') - f(X) = s² u'Gv + O(s⁴), g = u'Gv; the decay of the two new parts is λ s².
change = s**2 * g + lam / 2 * (s**2 + s**2)
assert sp.expand(change - s**2 * (g + lam)) == 0

# %% [markdown]
# ## Numerical check
#
# Nine numbers $\langle G_i, X \rangle$ of a matrix of 5 x 5 and rank one are to be met with $r = 3$
# from large starts. Ends of less than full rank reach the dual bound of the convex program.

# %%
import torch

from deltacontrol.experiments.measures.low_rank_minima import LinearLoRA

torch.set_default_dtype(torch.float64)
gaps = []
for seed in range(900, 906):
    random = torch.Generator().manual_seed(seed)
    G = torch.randn(9, 5, 5, generator=random)
    u, v = torch.randn(2, 5, generator=random)
    y = torch.einsum("mij,i,j->m", G, u / u.norm(), v / v.norm())
    decay = 0.02 * float(torch.linalg.matrix_norm(torch.einsum("m,mij->ij", y, G) / 9, 2))
    linear = LinearLoRA(G, torch.zeros(9), y, "squared", decay)
    end = linear.minimise(rank=5, seed=seed, size=10.0)
    gaps.append((end.objective - end.bound) / linear.start)
assert max(gaps) < 1e-6

# %% [markdown]
# A start of rank one stays of rank one, a saddle where a second direction would help. It is no
# minimum, so that A says nothing about it. One entry more than the rank can meet shows it:

# %%
target, decay = torch.diag(torch.tensor([2.0, 1.0])), 0.1


def descended(A: torch.Tensor, B: torch.Tensor, steps: int = 4000) -> torch.Tensor:
    """B A after gradient descent on ½‖B A - target‖² + λ/2 (‖A‖² + ‖B‖²)."""
    for _ in range(steps):
        G = B @ A - target
        A, B = A - 0.05 * (B.T @ G + decay * A), B - 0.05 * (G @ A.T + decay * B)
    return B @ A


one = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
stuck, free = descended(one, one), descended(torch.eye(2), torch.eye(2))
assert torch.linalg.matrix_rank(stuck, rtol=1e-6) == 1
assert torch.allclose(free, torch.diag(torch.tensor([1.9, 0.9])), atol=1e-6)

# %% [markdown]
# ## What breaks it (negative control)
#
# Losses bent to $(1 - e^{-5 l})/5$ are not convex: what is badly met has no slope, and decay
# pulls the matrix to a low rank at which much is left unmet. Bent a thousandth as much they are
# as good as convex near what is met. One number $x = a b$ shows it: a second minimum at zero
# appears.

# %%
import numpy as np

a = np.linspace(-2.0, 2.0, 401)
loss = 0.5 * (a * a - 2.0) ** 2  # x = a², to be 2
bent = (1 - np.exp(-5.0 * loss)) / 5.0 + 0.05 * a**2
straight = loss + 0.05 * a**2


def minima(values: np.ndarray) -> int:
    """How many inner points lie below both neighbours."""
    return int(((values[1:-1] < values[:-2]) & (values[1:-1] < values[2:])).sum())


assert minima(straight) == 2 and minima(bent) == 3

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.plot(a, straight, label="squared error: two minima, both global")
ax.plot(a, bent, label="bent: a third at zero")
ax.set_ylim(0, 1)
ax.set_xlabel("a, with x = a²")
ax.set_ylabel("loss and decay")
ax.legend()

# %% [markdown]
# ## The claim

# %%
from deltacontrol.experiments.claims import scoreboard

claim = scoreboard.find(35)
for part in claim.parts:
    print(f"{part.name}: {part.title}; {part.threshold}")
