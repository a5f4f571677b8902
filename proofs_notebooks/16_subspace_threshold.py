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
# # 16. The dimension at which random subspaces succeed
#
# ## Statement
#
# $L(\theta) = L_{\min} + \tfrac12 (\theta-\theta^*)^\top H (\theta-\theta^*)$ with $H \succeq 0$
# of rank $n$, start $\theta_0$, gradient $g = H(\theta_0 - \theta^*)$, and $P \in
# \mathbb{R}^{D \times d}$ Gaussian. Let
#
# $$F(\kappa) = \tfrac12\, g^\top (H + \kappa I)^{-1} g, \qquad
#   d(\kappa) = \operatorname{tr} H (H + \kappa I)^{-1} =
#   \sum_i \frac{\lambda_i}{\lambda_i+\kappa}.$$
#
# Then, to leading order in $n$,
#
# $$\boxed{\; L(\theta_0) - \min_z L(\theta_0 + Pz) \approx F(\kappa) \quad\text{at}\quad
#   d = d(\kappa), \;}$$
#
# so that half of the subspaces of dimension $d^* = d(\kappa^*)$, $F(\kappa^*) = L(\theta_0) -
# L_{\text{target}}$, reach the target, and the share that does is $\Phi((d - d^*)/s)$ with
# $s^2 = 2\sum_i \lambda_i\kappa/(\lambda_i+\kappa)^2$.

# %% [markdown]
# ## Assumptions
#
# - the loss is quadratic between the start and the subspace's optimum: *the* assumption, since an
#   optimum in a random subspace is far from $\theta_0$ in the flat directions of $H$;
# - $P$ is Gaussian, or uniform in its directions; training in the subspace reaches its minimum;
# - $d^*$ is large: an error of order one remains.

# %% [markdown]
# ## Derivation
#
# *Subspace and cone.* A subspace meets the sublevel set $S = \{L \le L_{\text{target}}\}$ iff the
# subspace of directions meets the cone $C = \{t(\theta - \theta_0): \theta \in S, t \ge 0\}$. By
# Gordon's inequality, and sharply by Amelunxen et al., it does so with probability near one or
# near zero as $d$ is above or below the statistical dimension of the polar cone,
#
# $$d^* = D - \delta(C), \qquad
#   \delta(C) = \mathbb{E} \max_{x \in C,\, \|x\| \le 1} (h^\top x)_+^2, \quad h \sim N(0, I_D).$$
#
# $\delta(C)$ is the squared Gaussian width $w^2$ of $C \cap S^{D-1}$, up to one.
#
# *The cone of an ellipsoid.* With $\delta = \theta - \theta_0$, $x$ is in $C$ iff for some $t > 0$
# $\;g^\top x\, t + \tfrac12 t^2 x^\top H x \le -F$; the best $t$ gives $g^\top x < 0$ and
# $(g^\top x)^2 \ge 2F\, x^\top H x$: a cone over a quadratic form $A = 2F H - gg^\top$, which has
# one negative eigenvalue when $F < F(0)$.
#
# *Projection on it.* With a multiplier $\mu \ge 0$ for $x^\top A x \le 0$ the projection of $h$ is
# $x = (I + \mu A)^{-1} h$ with $x^\top A x = 0$, so that $h^\top x = \|x\|^2$ and
#
# $$\|h - x\|^2 = \|h\|^2 - h^\top x = h^\top \big(I - (I+\mu A)^{-1}\big) h.$$
#
# Without its rank-one part $I + \mu A$ is diagonal, $1 + 2F\mu\lambda_i$. The rank-one part makes
# one eigenvalue small: the constraint needs a component $x_v$ of order $\sqrt n$ along its
# eigenvector $v$, and $h_v$ is of order one. To leading order, then, $I + \mu A$ is singular. With
# $\kappa = 1/(2F\mu)$ this reads $1 = \mu\, g^\top(I + 2F\mu H)^{-1} g$, that is
#
# $$g^\top (H + \kappa I)^{-1} g = 2F,$$
#
# and $h_v x_v = O(\sqrt n)$ leaves, with the shares $a_i = \lambda_i/(\lambda_i+\kappa)$,
#
# $$D - \delta(C) = \mathbb{E}\,\|h - x\|^2 \approx \sum_i a_i = d^*.$$

# %%
import sympy as sp

F, mu, lam, kappa = sp.symbols("F mu lambda kappa", positive=True)
# The singularity of I + mu (2F H - gg'), for one eigenvalue: 1 = mu g^2/(1 + 2 F mu lambda).
g2 = sp.symbols("g2", positive=True)
determinant = 1 + 2 * F * mu * lam - mu * g2
at = determinant.subs(mu, 1 / (2 * F * kappa)) * 2 * F * kappa
assert sp.simplify(at - (2 * F * (kappa + lam) - g2)) == 0  # zero iff g2/(lambda + kappa) = 2F
# What h loses outside of the rank-one direction: (1 - 1/(1 + 2 F mu lambda)) of each direction.
share = (1 - 1 / (1 + 2 * F * mu * lam)).subs(mu, 1 / (2 * F * kappa))
assert sp.simplify(share - lam / (lam + kappa)) == 0

# %% [markdown]
# *Check by an independent route.* The fall in the subspace is $\tfrac12 g^\top P(P^\top H P)^{-1}
# P^\top g$, and $\mathbb{E}\, P(P^\top H P)^{-1}P^\top \approx (H + \kappa I)^{-1}$ with
# $d = d(\kappa)$ (Derezinski et al.): the same $\kappa$, the same $F$.
#
# *Width.* The intrinsic volumes of $C$, as a distribution, have the variance
# $\operatorname{Var}\|\Pi_C h\|^2 - 2\delta(C)$. From $\|x\|^2 = h^\top x$:
# $x_v^2 = \sum_i (1-a_i) - \sum_i (1-a_i)^2$. The gradient of $\|\Pi_C h\|^2$ is $2x$, so its
# variance is $2\sum_i(1-a_i)^2 + 4x_v^2$ to leading order.

# %%
a = sp.symbols("a")  # of one direction; the sums over directions follow
x_v2 = (1 - a) - (1 - a) ** 2
variance = 2 * (1 - a) ** 2 + 4 * x_v2 - 2 * (1 - a)
assert sp.simplify(variance - 2 * a * (1 - a)) == 0
assert (
    sp.simplify((a * (1 - a)).subs(a, lam / (lam + kappa)) - lam * kappa / (lam + kappa) ** 2) == 0
)

# %% [markdown]
# *The published formula.* Larsen et al. bound $w$ of the ellipsoid seen from the distance $R =
# \|\theta_0-\theta^*\|$: $d = D - \sum_i r_i^2/(R^2+r_i^2)$ with $r_i^2 = 2\epsilon/\lambda_i$.
# That is $d(\kappa)$ with $\kappa = 2\epsilon/R^2$; it counts displacement along flat directions,
# which no loss sees, and is an upper bound. $\blacksquare$

# %%
lam_i, eps, R = sp.symbols("lambda_i epsilon R", positive=True)
r2 = 2 * eps / lam_i
assert sp.simplify((1 - r2 / (R**2 + r2)) - lam_i / (lam_i + 2 * eps / R**2)) == 0

# %% [markdown]
# ## Numerical check
#
# Exact solves in nested Gaussian subspaces against $d^*$ and $s$.

# %%
import math

import torch

from deltacontrol.theory.dimension.gaussian_width import QuadraticLoss, published_threshold
from deltacontrol.theory.dimension.random_subspaces import measured_threshold

F64 = torch.float64
generator = torch.Generator().manual_seed(0)
n, draws = 200, 100
displacement = torch.randn(n, generator=generator, dtype=F64)
for exponent, part in ((0.5, 0.7), (1.0, 0.8), (2.0, 0.99)):
    values = torch.arange(1, n + 1, dtype=F64) ** -exponent
    loss = QuadraticLoss.exact(values, displacement)
    fall = part * loss.largest_fall
    predicted = loss.threshold(fall)
    measured = measured_threshold(values, values * displacement, fall, n, range(draws))
    published = published_threshold(values, displacement, loss.largest_fall - fall)
    print(
        f"lambda = i^-{exponent:g}: predicted {predicted.dimension:.1f}, measured "
        f"{measured.median:.1f} in {measured.interval()}, published formula {published:.1f}"
    )
    assert abs(measured.median - predicted.dimension) < 1 + 0.05 * predicted.dimension
    assert published > predicted.dimension

# %% [markdown]
# The success curve, at one width below and above:

# %%
for sign in (-1, 0, 1):
    d = predicted.dimension + sign * predicted.width
    share = measured.share(round(d))
    print(f"d = {d:.0f}: predicted {predicted.probability(d):.2f}, measured {share:.2f}")
    # Four standard errors of 100 draws, and what one dimension changes.
    assert abs(share - predicted.probability(d)) < 0.2 + 0.4 / predicted.width

# %%
import matplotlib.pyplot as plt

reach = math.ceil(3 * predicted.width)
dimensions = range(max(1, round(predicted.dimension) - reach), round(predicted.dimension) + reach)
figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.plot(dimensions, [predicted.probability(d) for d in dimensions], "k--", label="predicted")
ax.plot(dimensions, [measured.share(d) for d in dimensions], "o", label=f"of {draws} draws")
ax.set_xlabel("dimension of the subspace")
ax.set_ylabel("share that reaches the loss")
ax.legend()

# %% [markdown]
# ## Without the quadratic
#
# The first step, $d^* = D - \delta(C)$, asks for a convex sublevel set and nothing more. For a
# cross-entropy of logits that are linear in $\theta$ the projection on $C$ is a program over
# exponential cones, and $\delta(C)$ a mean over draws of $h$. Far from the start it differs from
# the quadratic model, whose Hessian is that of the start: here at four tenths of the loss.

# %%
import numpy as np
from scipy.optimize import minimize

from deltacontrol.theory.dimension.cone_threshold import cross_entropy_threshold
from deltacontrol.theory.linear.model_curvature import softmax_factor

count, size = 30, 60
R = torch.randn(2 * count, size, generator=generator, dtype=F64)
logits, labels = torch.zeros(count, 2, dtype=F64), torch.arange(count) % 2
start, factor_s = float(np.log(2)), softmax_factor(logits, labels)
rows = torch.block_diag(*factor_s[0]).mT @ R
root_values, basis = torch.linalg.eigh(rows @ rows.mT)
weights = root_values * (basis.mT @ factor_s[1].flatten()).square()
kept = root_values > 1e-9
model = QuadraticLoss(
    root_values[kept], torch.ones(int(kept.sum()), dtype=F64), root_values[kept], weights[kept]
)
target = 0.4 * start
cone = cross_entropy_threshold(R @ R.mT, logits, labels, target)
quadratic = model.threshold(start - target).dimension


def least(P):
    """The least cross-entropy in the subspace."""
    signed = (R.view(count, 2, size)[:, 1] - R.view(count, 2, size)[:, 0]) @ P
    signed = signed * (2 * labels - 1)[:, None]

    def value(z):
        at = torch.tensor(z, requires_grad=True)
        found = torch.nn.functional.softplus(-signed @ at).mean()
        return float(found.detach()), torch.autograd.grad(found, at)[0].numpy()

    return minimize(value, np.zeros(P.shape[1]), jac=True, method="L-BFGS-B").fun


found = {}
for d in range(10, 26, 3):
    subspaces = [torch.randn(size, d, generator=generator, dtype=F64) for _ in range(30)]
    found[d] = np.mean([least(P) <= target for P in subspaces])
crossing = float(np.interp(0.5, list(found.values()), list(found)))
print(
    f"solved {crossing:.1f}; cone {cone.dimension:.1f} ± {cone.standard_error:.1f}, quadratic "
    f"model {quadratic:.1f}"
)
assert abs(cone.dimension - crossing) < 1.5 + 4 * cone.standard_error
assert quadratic > crossing + 2

# %% [markdown]
# ## What breaks it (negative control)
#
# Ignore the spectrum, as if all directions were alike: then $d^* = n F / F(0)$.

# %%
isotropic = n * part
assert abs(isotropic / measured.median - 1) > 0.2

# %% [markdown]
# And a loss that is quadratic only nearby. The optimum in a random subspace lies at
# $\mathbb{E}\|\delta\|^2 = g^\top A^2 g\,(1 + \kappa \operatorname{tr}A^2/\operatorname{tr}HA^2)$,
# $A = (H + \kappa I)^{-1}$; with $D \gg n$ flat directions that is $\approx D\,g^\top A^2 g /
# (\kappa \operatorname{tr} HA^2)$, however little of it matters. A loss that bends in a flat
# direction at any finite distance is then no longer the one that was predicted.

# %%
D, d = 4000, 30
values = torch.cat([torch.arange(1, 51, dtype=F64) ** -1.0, torch.zeros(D - 50, dtype=F64)])
gradient = values * torch.randn(D, generator=generator, dtype=F64)
P = torch.randn(D, d, generator=generator, dtype=F64)
z = torch.linalg.solve(P.T @ (values[:, None] * P), P.T @ gradient)
moved = P @ z
curved = values > 0
print(f"moved {moved[curved].norm():.2f} in curved directions, {moved[~curved].norm():.2f} in flat")
loss = QuadraticLoss(
    values[curved], torch.ones(50, dtype=F64), values[curved], gradient[curved].square()
)
kappa = loss.kappa(d)
A2 = (values[curved] + kappa) ** -2
expected = (gradient[curved].square() * A2).sum() * D / kappa / (values[curved] * A2).sum()
assert 0.5 < moved.square().sum() / expected < 2  # one draw
assert moved[~curved].norm() > 5 * moved[curved].norm()
