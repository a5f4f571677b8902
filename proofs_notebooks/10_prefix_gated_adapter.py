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
# # 10. Prefix tuning is a gated parallel adapter
#
# ## Statement
#
# One attention head, $\mathrm{Attn}(h) = \mathrm{softmax}(h W_q K^\top) V$ at a state $h$ (a row).
# With $l$ prefix keys $P_k$ and values $P_v$ in front,
#
# $$\boxed{\; \mathrm{Attn}'(h) = (1 - \lambda(h))\, \mathrm{Attn}(h) +
# \lambda(h)\, \phi(h W_d)\, W_u \;}, \qquad W_d = W_q P_k^\top,\; W_u = P_v,\;
# \phi = \mathrm{softmax},$$
#
# $\lambda(h)$ being the softmax mass on the prefix. This is an adapter of bottleneck $l$, parallel
# to the attention, with a gate that depends on the state; an adapter proper has no gate.
#
# The gate is a logistic function of two log-sums:
# $\lambda(h) = \sigma(\mathrm{lse}(h W_d) - \mathrm{lse}(h W_q K^\top))$.

# %% [markdown]
# ## Assumptions
#
# One head, any inputs. For several heads the statement holds head by head, each with its own gate.
# Scaling of the scores belongs to $W_q$; a mask over the content belongs to $K$.

# %% [markdown]
# ## Derivation
#
# Let $Z = \sum_j e^{h W_q k_j^\top}$ and $P = \sum_m e^{h W_q p_m^\top}$. Then
#
# $$\mathrm{Attn}'(h) = \frac{\sum_j e^{h W_q k_j^\top} v_j + \sum_m e^{h W_q p_m^\top} w_m}{Z + P}
# = \frac{Z}{Z+P} \cdot \frac{\sum_j e^{h W_q k_j^\top} v_j}{Z} +
# \frac{P}{Z+P} \cdot \frac{\sum_m e^{h W_q p_m^\top} w_m}{P},$$
#
# and $P/(Z+P) = 1/(1 + e^{\log Z - \log P}) = \sigma(\log P - \log Z)$. $\blacksquare$

# %%
import sympy as sp

z, p, attention, other = sp.symbols("z p A B", positive=True)
gate = 1 / (1 + sp.exp(sp.log(z) - sp.log(p)))
whole = (z * attention + p * other) / (z + p)
assert sp.simplify(whole - ((1 - gate) * attention + gate * other)) == 0

# %% [markdown]
# ## Numerical check
#
# A head of width 6 in float64, threshold $10^{-12}$.

# %%
import torch

F64 = torch.float64
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=F64)


n, d, w, length = 9, 8, 6, 4
h, W_q = normal(n, d), normal(d, w) / 2
K, V, P_k, P_v = normal(n, w), normal(n, w), normal(length, w), normal(length, w)
attention = (h @ W_q @ K.T).softmax(-1) @ V
prefixed = (h @ W_q @ torch.cat([P_k, K]).T).softmax(-1) @ torch.cat([P_v, V])
W_d, W_u = W_q @ P_k.T, P_v
adapter = (h @ W_d).softmax(-1) @ W_u
gate = torch.sigmoid((h @ W_d).logsumexp(-1) - (h @ W_q @ K.T).logsumexp(-1))[:, None]
formula = (1 - gate) * attention + gate * adapter
difference = float((prefixed - formula).norm() / prefixed.norm())
print(f"relative difference {difference:.1e}, gate from {gate.min():.2g} to {gate.max():.2g}")
assert difference <= 1e-12

# %% [markdown]
# ## What breaks it (negative control)
#
# Without the gate, or with the best one that does not depend on the state, the two sides differ.

# %%
towards, moved = adapter - attention, prefixed - attention
best = (towards * moved).sum() / towards.square().sum()
constant = (1 - best) * attention + best * adapter
for name, other in (("best constant gate", constant), ("no gate", attention + adapter)):
    error = float((prefixed - other).norm() / prefixed.norm())
    print(f"{name}: relative difference {error:.2g}")
    assert error > 1e-2

# %% [markdown]
# Fitted to one token at a time, over which no gate can vary, the same fit gives the two sides.

# %%
each = (towards * moved).sum(-1, keepdim=True) / towards.square().sum(-1, keepdim=True)
error = float((prefixed - attention - each * towards).norm() / prefixed.norm())
print(f"best gate of each token: relative difference {error:.1e}")
assert error <= 1e-12

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.bar(range(n), gate[:, 0].numpy(), label="gate of the token")
ax.axhline(float(best), color="black", lw=0.8, label="best constant gate")
ax.set_xlabel("token")
ax.legend()
