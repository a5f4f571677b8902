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
# # 34. LoRA has intruder dimensions, and scaling them down lowers forgetting
#
# ## Statement
#
# Let $W_0$ be a pre-trained matrix with left singular vectors $u_i^0$, and $W$ the tuned one. A
# leading singular vector $u_j$ of $W$, one of the first ten, is an *intruder* where
# $\max_i |\langle u_i^0, u_j \rangle| < 0.5$.
#
# **A.** At equal training loss LoRA's matrices have more intruders than those of full fine-tuning.
#
# **B.** Halving the singular values of the intruders removes a tenth or more of what tuning has
# added to the loss on held text.
#
# **C.** It gives back at most a fifth of what the training loss had fallen by.
#
# The definition of an intruder is the source's; that ten vectors are looked at and the cosine is
# 0.5, and the thresholds, are ours.
#
# ## Assumptions
#
# Both fine-tunings reach one training loss; B and C need intruders and forgetting. Here the last
# two layers of SmolLM2-135M are tuned, three matrices of each, on a few rows until these are known
# by heart, at the largest rate at which the loss of another task falls steadily: tens of steps,
# much less than in the source.

# %% [markdown]
# ## Derivation
#
# Why low rank makes intruders. Let $W = W_0 + \sigma\, a b'$ with unit vectors $a, b$. If $\sigma >
# \|W_0\|_2$ by far, the leading left singular vector of $W$ tends to $a$ (Wedin: its angle to $a$
# is at most of the order $\|W_0\|_2 / \sigma$), and $a$ is like no $u_i^0$ if it was not made of
# them: a random $a$ in dimension $n$ has cosines of the order $\sqrt{2 \log n / n}$ with all $n$ of
# them. The same Frobenius norm $\sigma$ spread over $k$ directions has singular values $\sigma /
# \sqrt{k}$; for full rank these are below the leading ones of $W_0$, whose vectors they only turn a
# little. So a low rank is what is needed, and a large update. Neither follows from training: A is
# empirical, as are B and C. $\blacksquare$

# %%
import sympy as sp

s, w, e = sp.symbols("s w e", positive=True)
# W0 = w e1 e1', W = W0 + s a b' with a, b orthogonal to e1: singular values w and s.
W = sp.Matrix([[w, 0], [0, s]])
assert set(W.singular_values()) == {w, s}  # the new direction leads where s > w

# %% [markdown]
# ## Numerical check
#
# One matrix and updates of one size: of rank one, and of full rank.

# %%
import matplotlib.pyplot as plt
import torch

from deltacontrol.experiments.measures.tuning.top_layers import Leading

torch.set_default_dtype(torch.float64)
random = torch.Generator().manual_seed(0)
n = 200
before = torch.linalg.qr(torch.randn(n, n, generator=random)).Q
W0 = (before * 0.7 ** torch.arange(n)) @ before.mT


def update(rank: int) -> torch.Tensor:
    """A random update of Frobenius norm one, with equal singular values."""
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=random)).Q for _ in range(2))
    return left @ right.mT / rank**0.5


sizes, counts = [0.3, 1.0, 3.0], {1: [], n: []}
for size in sizes:
    for rank, found in counts.items():
        leading = Leading.of(W0 + size * update(rank), before, 3, 0.5)
        found.append(int(leading.intruders.sum()))
assert counts[1][-1] == 1 and counts[n][-1] == 0

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for rank, found in counts.items():
    ax.plot(sizes, found, "o-", label=f"rank {rank}")
ax.set_xlabel("size of the update")
ax.set_ylabel("intruders among three")
ax.legend()

# %% [markdown]
# Scaling an intruder down takes back a part of the update, and nothing else.

# %%
W = W0 + 3.0 * update(1)
leading = Leading.of(W, before, 3, 0.5)
assert (leading.scaled(W, leading.intruders, 0.0) - W0).norm() < 0.5 * (W - W0).norm()

# %% [markdown]
# ## What breaks it (negative control)
#
# A: random updates as large as LoRA's and of full rank have no intruders; of rank one they have
# them. B: as many leading directions that are no intruders are scaled down, which takes from the
# pre-trained matrix and leaves the update. Where these directions are what has changed, scaling
# them removes the change. C: all of the update is scaled down.

# %%
leading = Leading.of(W, before, 3, 0.5)
count = int(leading.intruders.sum())
other = leading.first(count, intruders=False)
assert count == int(other.sum()) == 1
assert (leading.scaled(W, other, 0.5) - W0).norm() > (W - W0).norm()

own = Leading.of(W0, before, 3, 0.5)
doubled = own.scaled(W0, own.first(1, intruders=False), 2.0)
leading = Leading.of(doubled, before, 3, 0.5)
back = leading.scaled(doubled, leading.first(1, intruders=False), 0.5)
assert (back - W0).norm() < 1e-9 * W0.norm()

# %% [markdown]
# ## The claim

# %%
from deltacontrol.experiments.claims import scoreboard

claim = scoreboard.find(34)
for part in claim.parts:
    print(f"{part.name}: {part.title}; {part.threshold}")
