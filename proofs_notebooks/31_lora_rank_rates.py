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
# # 31. How LoRA's best learning rate depends on the rank
#
# ## Statement
#
# A layer $h \mapsto (W + s B A) h$ with $n$ inputs, $A \in \mathbb{R}^{r \times n}$ with entries of
# variance $1/n$ or so, $B$ zero, and the multiplier $s = s_0 r^{-\gamma}$. Under Adam with one rate
# $\eta$ for both factors and a fixed number of steps, the best rate of a wide layer goes with the
# rank as
#
# $$\boxed{\; \eta_* \propto r^{-(1-\gamma)/2} \;}$$
#
# so that its logarithm has the slope 0 in $\log r$ for the usual $s = \alpha/r$ (**a**), and the
# slope $-\frac12$ for a fixed multiplier (**b**).
#
# The claim cites corollary 4.4 of Chen, Villar & Hayou, arXiv 2602.06204, as it stands in this
# project's list of claims. What follows is derived here.

# %% [markdown]
# ## Assumptions
#
# - A step of Adam is $\eta$ times the sign of the gradient, entry by entry, as its first steps are;
#   where a gradient is zero, nothing moves.
# - $A h$ has entries of order one at every rank, and $\|h\|_1 = \Theta(n)$.
# - The best rate is the one with which the layer's output has changed by a given amount of order
#   one after a given number of steps $T$, and the signs of $q = \partial L / \partial (sBAh)$ stay
#   until then.
# - The layer is wide: $n \gg s r$.

# %% [markdown]
# ## Derivation
#
# The gradients are $g_B = s\, q (A h)^\top$ and $g_A = s\, (B^\top q) h^\top$.
#
# *First step.* $g_A = 0$, so that $B$ alone moves, $B_{jk} = -\eta\, \mathrm{sign}(q_j)\,
# \mathrm{sign}((A h)_k)$, and the output changes by
#
# $$s B A h = -\eta\, s r\, a\; \mathrm{sign}(q), \qquad a = \frac1r \sum_k |(A h)_k| = \Theta(1).$$
#
# Every one of the $r$ columns adds the same: the signs are aligned.
#
# *Later steps.* Now $(B^\top q)_k$ has the sign of $-(A h)_k$, and a step adds
# $\eta\, \mathrm{sign}((A h)_k) \|h\|_1$ to $(A h)_k$. After $t$ steps $|B_{jk}| = t \eta$ and
# $|(A h)_k|$ has grown by $(t - 1)\, \eta \|h\|_1$:
#
# $$s B A h = -\,\mathrm{sign}(q)\; s r\, t \eta\, \big(a + (t - 1)\, \eta \|h\|_1\big).$$
#
# *Best rate.* Set the amount after $T$ steps to $c$:
#
# $$s r\, T \eta\, \big(a + (T - 1)\, \eta \|h\|_1\big) = c.$$
#
# Rank and multiplier enter as $s r = s_0 r^{1 - \gamma}$ alone. For $\gamma = 1$ the equation does
# not contain the rank at all. Otherwise the second term decides in a wide layer, where
# $T \eta \|h\|_1 \gg a$, and $\eta_* = (c / (s r T (T - 1) \|h\|_1))^{1/2} \propto
# r^{-(1-\gamma)/2}$; by this $\eta_*$ wide means $n \gg s r\, a^2$. Of one step alone, or in a
# narrow layer, the first term decides and $\eta_* \propto r^{-(1-\gamma)}$: a fixed multiplier has
# a slope between $-\frac12$ and $-1$, and the former where $A$ has had time to move. Whether the
# amount is what $T$ steps reach or what a few steps overshoot changes $c$ and $T$, and no exponent
# of $r$. $\blacksquare$

# %%
import sympy as sp

r, n, T, a, c, s0 = sp.symbols("r n T a c s_0", positive=True)
gamma, eta = sp.Symbol("gamma", real=True), sp.Symbol("eta", positive=True)
size = s0 * r ** (1 - gamma)
change = size * T * eta * (a + (T - 1) * eta * n)
# The slope d log eta / d log r along change = c, at any eta.
slope = sp.simplify(-(r * sp.diff(change, r)) / (eta * sp.diff(change, eta)))
assert sp.simplify(sp.limit(slope, n, sp.oo) + (1 - gamma) / 2) == 0
assert sp.simplify(slope.subs(n, 0) + (1 - gamma)) == 0
assert sp.simplify(slope.subs(gamma, 1)) == 0

# %% [markdown]
# ## Numerical check
#
# Sign steps with $q$ fixed and $|(A h)_k| = a$ give the formula to rounding.

# %%
import torch

F64 = torch.float64
random = torch.Generator().manual_seed(0)


def signs(*shape):
    return (2 * torch.rand(*shape, generator=random, dtype=F64) - 1).sign()


def after(rank, multiplier, rate, inputs, steps, start=0.5, outputs=3):
    """s B A h after sign steps, times -sign(q)."""
    h, q = signs(inputs), signs(outputs)
    A, B = start * signs(rank)[:, None] * h / inputs, torch.zeros(outputs, rank, dtype=F64)
    for _ in range(steps):
        gradient_B = multiplier * torch.outer(q, A @ h)
        gradient_A = multiplier * torch.outer(B.T @ q, h)
        A, B = A - rate * gradient_A.sign(), B - rate * gradient_B.sign()
    return -q.sign() * (multiplier * B @ A @ h)


for rank, multiplier in ((1, 2.0), (8, 2.0), (8, 0.25)):
    found = after(rank, multiplier, 1e-3, 64, 5)
    expected = multiplier * rank * 5e-3 * (0.5 + 4 * 1e-3 * 64)
    assert (found - expected).abs().max() < 1e-14

# %% [markdown]
# Adam itself, on $\frac12 \|s B A h - y\|^2$ with one example of entries $\pm 1$ and the usual
# random $A$: of a grid of rates the best one, between grid points by a parabola.

# %%
import math

RATES = [2.0**k for k in range(-12, 1)]
RANKS = (1, 4, 16, 64)


def best(rank, multiplier, inputs, kind=torch.optim.Adam, rates=RATES, steps=24):
    """log2 of the rate with the least mean loss of the last quarter of the steps."""
    h, y, losses = signs(inputs), signs(4), []
    start = (2 * torch.rand(rank, inputs, generator=random, dtype=F64) - 1) / inputs**0.5
    for rate in rates:
        A, B = start.clone().requires_grad_(), torch.zeros(4, rank, dtype=F64, requires_grad=True)
        optimiser, late = kind([A, B], lr=rate), []
        for step in range(steps):
            loss = 0.5 * (multiplier * (B @ (A @ h)) - y).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            late += [float(loss.detach())] * (step >= steps - steps // 4)
        mean = sum(late) / len(late)
        losses.append(mean if math.isfinite(mean) else math.inf)
    i = losses.index(min(losses))
    assert 0 < i < len(rates) - 1, "the best rate is at an end of the grid"
    low, mid, high = losses[i - 1 : i + 2]
    shift = 0.0 if math.isinf(high) else 0.5 * (low - high) / (low - 2 * mid + high)
    return math.log2(rates[i]) + shift * math.log2(rates[1] / rates[0])


def slope_of(multiplier, inputs, **options):
    x = torch.tensor(RANKS, dtype=F64).log2()
    y = torch.tensor([best(rank, multiplier(rank), inputs(rank), **options) for rank in RANKS])
    return float(((x - x.mean()) * y).sum() / (x - x.mean()).square().sum())


def usual(rank):
    return 1 / rank


def fixed(rank):
    return 1.0


flat, falling = (slope_of(multiplier, lambda rank: 1024) for multiplier in (usual, fixed))
print(f"slope of log best rate in log rank: {flat:.3f} with 1/r, {falling:.3f} with 1")
assert abs(flat) < 0.1 and abs(falling + 0.5) < 0.1

# %% [markdown]
# ## What breaks it (negative control)
#
# The other multiplier. It does no harm where the number of inputs makes up for it, since the
# second term has the factor $s r n$: a fixed multiplier has no slope where inputs get fewer in
# proportion to the rank, and $1/r$ has the slope $-\frac12$ where they get more. In these two cases
# the claim's controls pass.

# %%
fewer = slope_of(lambda rank: 1 / 32, lambda rank: 4096 // rank)  # small: 64 inputs are few
more = slope_of(usual, lambda rank: 64 * rank)
print(f"fixed multiplier, inputs as 1/r: {fewer:.3f}; 1/r, inputs as r: {more:.3f}")
assert abs(fewer) < 0.15 and abs(more + 0.5) < 0.15

# %% [markdown]
# Gradient descent in the place of Adam breaks it too. Its steps know the sizes of gradients: the
# first change is $-\eta s^2 \|A h\|^2 q = \Theta(\eta s^2 r)$, so that $1/r$ makes the best rate
# rise with the rank, about as $r$.

# %%
rising = slope_of(
    usual, lambda rank: 1024, kind=torch.optim.SGD, rates=[2.0**k for k in range(-9, 10)]
)
print(f"gradient descent, 1/r: {rising:.3f}")
assert rising > 0.5

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
lines = {
    "Adam, $s = 1/r$": flat, "Adam, $s$ fixed": falling, "gradient descent, $s = 1/r$": rising,
}  # fmt: skip
for name, found in lines.items():
    ax.loglog(RANKS, [float(rank) ** found for rank in RANKS], marker="o", label=name)
ax.set_xlabel("rank $r$")
ax.set_ylabel("fitted best rate, 1 at rank 1")
ax.legend()

# %% [markdown]
# ## The claim

# %%
from deltacontrol.experiments.claims import scoreboard

claim = scoreboard.find(31)
for part in claim.parts:
    print(f"{part.name}: {part.title}; {part.threshold}")
