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
# # 9. A prefix cannot change relative attention
#
# ## Statement
#
# One attention head with fixed inputs $h_1, \dots, h_n$, queries $q_i$, keys $k_j$, values $v_j$
# and weights $A_{ij} = \mathrm{softmax}_j(q_i^\top k_j)$. Give it $l$ more keys $p_1, \dots, p_l$
# and values $w_1, \dots, w_l$, and let $A'$ be the weights over the content then, $\lambda_i$ the
# softmax mass on the prefix.
#
# **A.** $A'_{ij} / A'_{ik} = A_{ij} / A_{ik}$ for all $j, k$; precisely
# $A'_{ij} = (1 - \lambda_i) A_{ij}$.
#
# **B.** The output $t'_i$ obeys $t'_i - (1 - \lambda_i)\, t_i \in \mathrm{span}(w_1, \dots, w_l)$,
# whatever the inputs: $l$ dimensions, and with $l = 1$ a single direction.
#
# **C.** In depth neither need hold: from the second layer on the inputs $h_i$ differ from those of
# the model without a prefix.

# %% [markdown]
# ## Assumptions
#
# The inputs of the layer are the same with the prefix and without; the prefix is visible to every
# token; no dropout of attention weights.

# %% [markdown]
# ## Derivation
#
# With $Z_i = \sum_k e^{q_i^\top k_k}$ and $P_i = \sum_m e^{q_i^\top p_m}$,
#
# $$A'_{ij} = \frac{e^{q_i^\top k_j}}{Z_i + P_i} = \frac{Z_i}{Z_i + P_i} A_{ij}
# = (1 - \lambda_i) A_{ij}, \qquad \lambda_i = \frac{P_i}{Z_i + P_i}.$$
#
# The factor does not depend on $j$, which is **A**. Then
#
# $$t'_i = \sum_j A'_{ij} v_j + \sum_m \frac{e^{q_i^\top p_m}}{Z_i + P_i} w_m
# = (1 - \lambda_i)\, t_i + \sum_m \mu_{im} w_m, \qquad \sum_m \mu_{im} = \lambda_i,$$
#
# which is **B**. A prefix at layer 1 changes its outputs, the inputs of layer 2; the scores there
# are functions of those, which leaves nothing of the argument: **C**. $\blacksquare$

# %%
import sympy as sp

# Two content tokens and one prefix token, by symbols.
a, b, p = sp.symbols("a b p", real=True)
whole = sp.exp(a) + sp.exp(b) + sp.exp(p)
mass = sp.exp(p) / whole
alone = sp.exp(a) / (sp.exp(a) + sp.exp(b))
assert sp.simplify(sp.exp(a) / whole - (1 - mass) * alone) == 0
assert sp.simplify((sp.exp(a) / whole) / (sp.exp(b) / whole) - sp.exp(a - b)) == 0

# %% [markdown]
# ## Numerical check
#
# A head of width 6 over 9 tokens, prefixes of 1 to 4 positions, in float64.

# %%
import torch

F64 = torch.float64
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=F64)


def head(h, maps, prefix=None):
    """Weights over prefix and content, and the output."""
    q, k, v = (h @ m for m in maps)
    if prefix is not None:
        k, v = (torch.cat([extra, own]) for extra, own in zip(prefix, (k, v), strict=True))
    weights = (q @ k.T).softmax(-1)
    return weights, weights @ v


n, d, w = 9, 8, 6
h, maps = normal(n, d), [normal(d, w) / 2 for _ in range(3)]
plain, output = head(h, maps)
spectra = {}
for length in (1, 2, 3, 4):
    prefix = normal(length, w), normal(length, w)
    weights, moved = head(h, maps, prefix)
    gate = weights[:, :length].sum(-1, keepdim=True)
    assert float((weights[:, length:] - (1 - gate) * plain).abs().max()) < 1e-14
    added = moved - (1 - gate) * output
    sizes = torch.linalg.svdvals(added)
    spectra[length] = sizes
    assert int((sizes > 1e-13 * sizes[0]).sum()) == length
    print(f"{length} positions: {length} dimensions, gate {gate.min():.2g} to {gate.max():.2g}")

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for length, sizes in spectra.items():
    ax.semilogy(range(1, len(sizes) + 1), sizes / sizes[0], "o-", label=f"{length} positions")
ax.set_xlabel("number of the singular value")
ax.set_ylabel("of what the prefix adds")
ax.legend()

# %% [markdown]
# ## What breaks it (negative control)
#
# Two layers with a residual connection, a prefix in both: in the second one the relative attention
# moves, and the added term fills more dimensions than the prefix has positions. A prefix in the
# second layer alone keeps both statements there.

# %%
second = [normal(d, w) / 2 for _ in range(3)]
out = normal(w, d)
prefix = normal(1, w), normal(1, w)
between = h + output @ out
_, controlled = head(h, maps, prefix)
moved_between = h + controlled @ out
for name, inputs, expected in (("alone", between, True), ("in both", moved_between, False)):
    before, t = head(between, second)
    weights, t_moved = head(inputs, second, prefix)
    content = weights[:, 1:] / weights[:, 1:].sum(-1, keepdim=True)
    change = float((content - before).abs().max())
    outside = torch.linalg.svdvals(t_moved - (1 - weights[:, :1]) * t)[1]
    share = float(outside / torch.linalg.svdvals(t_moved)[0])
    print(f"prefix {name}: relative attention moves by {change:.1e}, outside the span {share:.1e}")
    assert (change < 1e-14) == expected
    assert (share < 1e-14) == expected
