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
# # 17. Bounds on the error of a fine-tuning in few dimensions
#
# ## Statements
#
# $n$ training rows; $q(h)$ the share of them that a classifier $h$ gets wrong, $e(h)$ its error
# over the distribution of the rows. $\mathrm{kl}(q \| p)$ is the divergence of two coins. The prior
# $P$ is fixed before the rows are seen. With probability at least $1 - \delta$ over the rows:
#
# 1. *Compression.* For all $h$ of a countable class at once, $e(h) \le q(h)$ or
#    $$\boxed{\; \mathrm{kl}(q(h) \| e(h)) \le \frac{\ln 1/P(h) + \ln 1/\delta}{n} \;}$$
# 2. *PAC-Bayes.* For all distributions $Q$ over classifiers at once, with means over $Q$,
#    $$\boxed{\; \mathrm{kl}(q(Q) \| e(Q)) \le \frac{\mathrm{KL}(Q \| P) + \ln \xi(n)/\delta}{n},
#    \quad \xi(n) = \sum_k \binom nk \left(\tfrac kn\right)^k \left(1 - \tfrac kn\right)^{n-k} \;}$$
#
# 3. *Draws.* $q(Q)$ itself is bounded from $m$ draws with means $q_1, \dots, q_m \in [0, 1]$:
#    $\mathrm{kl}(\bar q \| q(Q)) \le \ln(1/\delta)/m$ or $q(Q) \le \bar q$.
#
# A fine-tuning in a $d$-dimensional subspace, with its coefficients rounded to $L$ levels, is one
# of countably many $h$; $-\ln P(h)$ is the length of a code. A code of $d$ levels costs at most
# $d \ln L$ nats and less if some are frequent.

# %% [markdown]
# ## Assumptions
#
# - The rows are independent draws, or drawn from a population without replacement (then $e$ is the
#   error over the population). Training may use them in any way.
# - The start of the model, the head and the projection do not depend on them. A pre-trained model
#   that has read the *texts* is allowed; one that has seen the labels is not.
# - Whatever else was chosen by looking at the rows, such as the learning rate, $d$ or $L$, is part
#   of $h$ and is paid for: a choice among $K$ settings costs $\ln K$ nats.

# %% [markdown]
# ## Derivation
#
# *1.* Fix $h$ with error $e$ and let $k \sim \mathrm{Bin}(n, e)$ be its count of errors. For $q <
# e$ and $s < 0$, Markov's inequality on $\mathrm{e}^{sk}$ gives
# $\Pr[k \le nq] \le \left(\mathrm{e}^{-sq}(1 - e + e\,\mathrm{e}^s)\right)^n$, and the least such
# bound is $\mathrm{e}^{-n\,\mathrm{kl}(q\|e)}$. So $\mathrm{kl}(q(h)\|e(h)) > \varepsilon$ with
# $q(h) < e(h)$ has probability at most $\mathrm{e}^{-n\varepsilon}$; choose $\varepsilon$ so that
# this is $\delta P(h)$ and sum over $h$, $\sum P(h) \le 1$.
#
# *2.* For fixed $h$,
# $E\, \mathrm{e}^{n\,\mathrm{kl}(q\|e)} = \sum_k \binom nk e^k (1-e)^{n-k}
# \frac{(k/n)^k (1-k/n)^{n-k}}{e^k (1-e)^{n-k}} = \xi(n)$, whatever $0 < e < 1$ is. Hence
# $E\, E_{h \sim P}\, \mathrm{e}^{n\,\mathrm{kl}} = \xi(n)$, as $P$ does not look at the rows, and
# by Markov $E_P\, \mathrm{e}^{n\,\mathrm{kl}} \le \xi(n)/\delta$ with probability $1 - \delta$. The
# change of measure $E_Q f \le \mathrm{KL}(Q\|P) + \ln E_P\, \mathrm{e}^f$ with $f =
# n\,\mathrm{kl}$, and Jensen for the jointly convex $\mathrm{kl}$, finish it.
#
# *3.* For independent $X_i \in [0, 1]$ convexity gives
# $E\,\mathrm{e}^{sX_i} \le 1 - p_i + p_i \mathrm{e}^s$, and the geometric mean of the factors is at
# most the factor of the mean $p$: (1) again, with $m$ for $n$.
#
# *Without replacement.* Both (1) and (2) rest on the expectation of a convex function of the count;
# it is at most that for independent rows (Hoeffding 1963, theorem 4). Rows drawn so from strata, in
# proportion to their sizes, are a sum of unequal coins, where the same holds with their mean, as in
# (3) for (1) and by Hoeffding 1956 for (2). $\blacksquare$

# %% [markdown]
# ## Numerical check
#
# Probabilities by summing over all counts of errors.

# %%
import itertools
import math

import numpy as np
import torch
from scipy.stats import binom, hypergeom

from deltacontrol.theory.bounds import (
    binary_kl,
    code_length,
    countable_class_bound,
    gaussian_kl,
    kl_inverse,
    maurer_constant,
    monte_carlo_bound,
    pac_bayes_bound,
    quantise,
)

n, delta = 40, 0.1
for e in (0.05, 0.3, 0.6):
    chances = binom.pmf(np.arange(n + 1), n, e)
    # (1), exactly over all counts, and its inversion
    missed = sum(chances[k] for k in range(n + 1) if countable_class_bound(k / n, 0, n, delta) < e)
    assert missed <= delta
    for k in range(math.ceil(n * e)):
        assert chances[: k + 1].sum() <= math.exp(-n * binary_kl(k / n, e)) * (1 + 1e-12)
    # the identity behind (2)
    moment = sum(chances[k] * math.exp(n * binary_kl(k / n, e)) for k in range(n + 1))
    assert abs(moment / maurer_constant(n) - 1) < 1e-10
    # without replacement: 40 of 60 rows
    errors = round(60 * e)
    drawn = hypergeom.pmf(np.arange(n + 1), 60, errors, n)
    assert sum(drawn[k] * math.exp(n * binary_kl(k / n, errors / 60)) for k in range(n + 1)) <= (
        maurer_constant(n)
    )
    print(f"error {e}: bound missed with probability {missed:.3f} <= {delta}")

# %% [markdown]
# The union over a class, exactly: three classifiers with errors (0.2, 0.4, 0.5) on independent rows
# of their own. The probability that any of the three bounds is missed stays below $\delta$.

# %%
truth, prior = (0.2, 0.4, 0.5), (0.5, 0.25, 0.25)
held = 1.0
for e, p in zip(truth, prior, strict=True):
    chances = binom.pmf(np.arange(n + 1), n, e)
    kept = [countable_class_bound(k / n, -math.log(p), n, delta) >= e for k in range(n + 1)]
    held *= chances[kept].sum()
assert 1 - held <= delta

# %% [markdown]
# ## The code
#
# $P$ of a sequence of levels is what a coder that learns their shares gives it (Krichevsky &
# Trofimov): a probability distribution over all sequences, so Kraft's inequality holds with
# equality.

# %%
total = sum(
    math.exp(-code_length(torch.tensor(s), 3)) for s in itertools.product(range(3), repeat=7)
)
assert abs(total - 1) < 1e-12
z = torch.randn(300, generator=torch.Generator().manual_seed(0))
costs = []
for levels in (3, 5, 9, 17):
    rounded = quantise(z, levels)
    error = float((rounded.vector - z).square().mean())
    costs.append((rounded.code / 300, error))
    print(f"{levels} levels: {rounded.code / 300:.2f} nats a coefficient, mean error {error:.3f}")
    assert rounded.code <= 300 * math.log(levels) + levels * math.log(301) + math.log(128)

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.semilogy(*zip(*costs, strict=True), "o-")
ax.set_xlabel("nats a coefficient")
ax.set_ylabel("mean squared error of rounding")

# %% [markdown]
# ## On a problem whose error is known
#
# Rows $x \sim N(0, I_{20})$ with the label $\mathrm{sign}(x_1)$ turned over in one of ten rows. The
# classifier is linear, fitted by ridge regression on all rows, and its true error has a closed
# form: $0.1 + 0.8\,\theta/\pi$, with $\theta$ the angle between its weight and the first axis.

# %%
generator = torch.Generator().manual_seed(1)
d, rows = 20, 2000


def true_error(w):
    return 0.1 + 0.8 * math.acos(float(w[0] / w.norm())) / math.pi


def empirical(w, x, y):
    return float((torch.sign(x @ w) != y).double().mean())


def fitted(x, y):
    return torch.linalg.solve(x.T @ x + torch.eye(d), x.T @ y)


def best_bound(w, x, y):
    found = []
    for levels in (3, 5, 9):
        rounded = quantise(w, levels)
        q = empirical(rounded.vector, x, y)
        bound = countable_class_bound(q, rounded.code + math.log(3), rows, 0.05)
        found.append((bound, true_error(rounded.vector)))
    return min(found)


x = torch.randn(rows, d, generator=generator)
y = torch.sign(x[:, 0]) * torch.where(torch.rand(rows, generator=generator) < 0.1, -1.0, 1.0)
w = fitted(x, y)
bound, truth_of_it = best_bound(w, x, y)
print(f"compression: true error {truth_of_it:.3f}, bound {bound:.3f}, chance 0.5")
assert truth_of_it <= bound < 0.5

deviation, prior_deviation = 0.3 * float(w.square().mean().sqrt()), 0.2
draws = w + deviation * torch.randn(2000, d, generator=generator)
mean = float(np.mean([empirical(v, x, y) for v in draws]))
upper = monte_carlo_bound(mean, 2000, 0.025)
divergence = gaussian_kl(w, deviation, prior_deviation)
gibbs = pac_bayes_bound(upper, divergence, rows, 0.025)
truth_of_gibbs = float(np.mean([true_error(v) for v in draws]))
print(f"PAC-Bayes: true error {truth_of_gibbs:.3f}, bound {gibbs:.3f}")
assert truth_of_gibbs <= gibbs < 0.5

# %% [markdown]
# ## What breaks it (negative control)
#
# *Random labels.* Nothing can be learned, the true error is one half, and a bound below it would be
# false; the same procedure gives a vacuous one. *A code that is not paid for.* If the classifier is
# chosen after the rows and its code is left out, the "bound" is missed far more often than
# $\delta$: of 500 random classifiers on few rows, the best looks good by chance.

# %%
noise = torch.sign(torch.randn(rows, generator=generator))
noisy, _ = best_bound(fitted(x, noise), x, noise)
print(
    f"random labels: training error {empirical(fitted(x, noise), x, noise):.3f}, bound {noisy:.3f}"
)
assert noisy >= 0.5

missed = unpaid = 0
for trial in range(100):
    random = np.random.default_rng(trial)
    least = random.binomial(100, 0.5, size=500).min() / 100
    unpaid += countable_class_bound(least, 0.0, 100, 0.05) < 0.5
    missed += countable_class_bound(least, math.log(500), 100, 0.05) < 0.5
print(f"missed without paying {unpaid} of 100, with ln 500 nats {missed} of 100")
assert missed <= 5 < 50 < unpaid
assert kl_inverse(0.3, 5.0) > 0.99
