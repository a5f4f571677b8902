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
# # 14. LoRA's B wants a larger step than A
#
# ## Statement
#
# A layer $h \mapsto (W + B A) h$ of width $n$, $A \in \mathbb{R}^{r \times n}$ with entries of
# variance $1/n$, $B \in \mathbb{R}^{n \times r}$ zero, and inputs $h$ with entries of order one.
# Under Adam, whose first steps are $\eta\,\mathrm{sign}(g)$ entry by entry, both factors contribute
# a change of order one to the features $(W + BA)h$, in a fixed number of steps, exactly if
#
# $$\boxed{\; \eta_B = \Theta(1), \quad \eta_A = \Theta(1/n), \qquad \eta_B/\eta_A = \Theta(n) \;}$$

# %% [markdown]
# ## Assumptions
#
# - widths grow while the rank, the number of steps and the number of examples stay;
# - frozen weights keep features of order one (variance $1/n$);
# - gradients are low-rank sums over examples, $g_A = \sum_i (B^\top q_i) h_i^\top$ with
#   $q_i = \partial L/\partial ((W + BA) h_i)$, so that signs align with the inputs.

# %% [markdown]
# ## Derivation
#
# With one example $g_A = (B^\top q) h^\top$, so that $\mathrm{sign}(g_A)_{kj} =
# \mathrm{sign}(B^\top q)_k\, \mathrm{sign}(h_j)$ and
#
# $$(\delta A\, h)_k = -\eta_A\, \mathrm{sign}(B^\top q)_k \sum_j |h_j| = \Theta(\eta_A n).$$
#
# With $g_B = q (A h)^\top$,
#
# $$(\delta B\, A h)_j = -\eta_B\, \mathrm{sign}(q_j) \sum_k |(A h)_k| = \Theta(\eta_B),$$
#
# because $A h$ has entries of order one. After a step $B = \Theta(\eta_B)$, hence
#
# $$\delta(BAh) = \delta B\, A h + B\, \delta A\, h = \Theta(\eta_B) + \Theta(\eta_B\, \eta_A n).$$
#
# The first term is of order one for $\eta_B = \Theta(1)$, the second then for
# $\eta_A = \Theta(1/n)$. With a common rate $\eta$ the terms are $\eta$ and $\eta^2 n$: where the
# second is of order one, $\eta = n^{-1/2}$, the first vanishes with the width. $\blacksquare$

# %%
import sympy as sp

n, a, b = sp.symbols("n a b", positive=True)
first, second = b, b * a * n
(rates,) = sp.solve([sp.Eq(first, 1), sp.Eq(second, 1)], [a, b], dict=True)
assert sp.simplify(rates[b] / rates[a] - n) == 0
common = sp.solve(sp.Eq(second.subs({a: b}), 1), b)[0]
assert sp.limit(common, n, sp.oo) == 0

# %% [markdown]
# ## Numerical check
#
# The effect of one step of rate one on the features, over widths: exponents 1 for $A$, 0 for $B$.

# %%
import torch

generator = torch.Generator().manual_seed(0)


def effects(width, inputs, rank=4, examples=8):
    """Root mean square of dA h and of dB A h after one sign step of rate one.

    The layer has so many outputs, and so many inputs.
    """
    F64 = torch.float64
    h = torch.randn(examples, inputs, generator=generator, dtype=F64)
    A = torch.randn(rank, inputs, generator=generator, dtype=F64) / inputs**0.5
    B = torch.randn(width, rank, generator=generator, dtype=F64)  # after a step of B
    q = torch.randn(examples, width, generator=generator, dtype=F64) / width
    dA = -((q @ B).T @ h).sign()
    dB = -(q.T @ (h @ A.T)).sign()
    return [float(x.square().mean().sqrt()) for x in (h @ dA.T, h @ A.T @ dB.T)]


widths = [64, 256, 1024, 4096]
logs = torch.tensor(widths, dtype=torch.float64).log()


def exponents(inputs=lambda width: width):
    found = [[effects(w, inputs(w)) for _ in range(20)] for w in widths]
    means = torch.tensor(found).double().log().mean(1)
    centred = logs - logs.mean()
    return [(centred @ means[:, k] / centred.square().sum()).item() for k in (0, 1)]


of_a, of_b = exponents()
print(f"effect of a step grows with the width to the power {of_a:.3f} (A), {of_b:.3f} (B)")
assert abs(of_a - 1) < 0.1 and abs(of_b) < 0.1

# %% [markdown]
# ## What breaks it (negative control)
#
# A layer whose inputs do not grow with its outputs: $\sum_j |h_j|$ is then of order one, a step of
# $A$ has the same effect at every width, and the ratio of the best rates no longer grows. Inputs
# that grow in another proportion do no harm.

# %%
of_a, of_b = exponents(lambda width: 128)
print(f"128 inputs at every width: {of_a:.3f} (A), {of_b:.3f} (B)")
assert abs(of_a) < 0.1 and abs(of_b) < 0.1
of_a, of_b = exponents(lambda width: width // 2)
print(f"half as many inputs as outputs: {of_a:.3f} (A), {of_b:.3f} (B)")
assert abs(of_a - 1) < 0.1 and abs(of_b) < 0.1

# %%
import matplotlib.pyplot as plt

found = [effects(width, width) for width in widths]
figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for place, name in enumerate(("A", "B")):
    ax.loglog(widths, [effect[place] for effect in found], "o-", label=f"a step of {name}")
ax.set_xlabel("width")
ax.set_ylabel("effect on the output")
ax.legend()
