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
# # 23. What a delta loses is at most Lipschitz times distance
#
# ## Statement
#
# $F: \mathbb{R}^D \to \mathbb{R}$ is the objective of full fine-tuning with a global minimiser
# $\theta^+$, $\psi: \mathbb{R}^d \to \mathbb{R}^D$ a delta's parametrisation with closed image
# $\mathrm{Im}\,\psi$, and $\tilde F = F \circ \psi$. Let $\tilde\theta$ be a point of the image
# next to $\theta^+$, $\rho = \|\tilde\theta - \theta^+\|$, and $\Lambda$ the Lipschitz constant of
# $F$ on the segment $[\theta^+, \tilde\theta]$. Then
#
# $$\boxed{\; 0 \;\le\; \min \tilde F - \min F \;\le\; \Lambda\, \rho \;}$$
#
# If $F$ is differentiable, $\Lambda = \max_s \|\nabla F(\theta^+ + s(\tilde\theta - \theta^+))\|$
# is one such constant, and so is the largest slope along it,
# $\max_s |\nabla F(\cdot)^\top e|$ with $e = (\tilde\theta - \theta^+)/\rho$, which is the least.
#
# *When it says nothing.* For $F \ge 0$ the gap of a trained delta is at most
# $F(\theta_0) - \min F$ anyway, $\theta_0 \in \mathrm{Im}\,\psi$ being the start. A bound above
# the untrained loss $F(\theta_0)$ is therefore true and empty; the board has a part for it.

# %% [markdown]
# ## Assumptions
#
# - $\theta^+$ minimises $F$, or at least $F(\theta^+) \le F(\theta)$ for the points compared;
# - $\tilde F$ attains its minimum, or the infimum is meant;
# - $\Lambda$ belongs to the whole segment, not to one of its points.

# %% [markdown]
# ## Derivation
#
# *Lower bound.* Every value of $\tilde F$ is a value of $F$.
#
# *Upper bound.* $\tilde\theta = \psi(z)$ for some $z$, so
# $\min \tilde F \le \tilde F(z) = F(\tilde\theta) \le F(\theta^+) + \Lambda \rho$.
#
# *The constant.* By the mean value theorem
# $F(\tilde\theta) - F(\theta^+) = \int_0^1 \nabla F(\theta^+ + s\delta)^\top \delta\, ds
# \le \max_s |\nabla F^\top e| \, \|\delta\| \le \max_s \|\nabla F\| \, \|\delta\|$ with
# $\delta = \tilde\theta - \theta^+$. $\blacksquare$
#
# *How loose.* At $\theta^+$ the gradient vanishes, so for small $\rho$ the gap is of second order,
# $\frac12 \delta^\top \nabla^2 F\, \delta$, and the bound, $\approx \|\nabla^2 F \delta\| \rho$, is
# larger by a factor of at least two, however small the distance.

# %%
import sympy as sp

h, rho = sp.symbols("h rho", positive=True)
gap, slope = h * rho**2 / 2, h * rho  # one curved direction
assert sp.simplify(slope * rho / gap) == 2

# %% [markdown]
# ## Numerical check
#
# $F$ convex quadratic, where everything is known: $\min \tilde F$ over a random subspace in closed
# form, the nearest point by projection.

# %%
import torch

F64 = torch.float64
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=F64)


D = 30
root = normal(D, D)
H, best = root @ root.T / D, normal(D)


def F(theta):
    return 0.5 * (theta - best) @ H @ (theta - best)


ratios, shown = [], []
for d in (1, 5, 15, 29):
    basis, _ = torch.linalg.qr(normal(D, d))
    z = torch.linalg.solve(basis.T @ H @ basis, basis.T @ H @ best)
    gap = float(F(basis @ z))
    nearest = basis @ (basis.T @ best)
    points = [best + s * (nearest - best) for s in torch.linspace(0, 1, 11, dtype=F64)]
    constant = max(float((H @ (p - best)).norm()) for p in points)
    bound = constant * float((nearest - best).norm())
    ratios.append(gap / bound)
    shown.append((gap, float(F(nearest)), bound))
    print(f"d = {d}: gap {gap:.3g}, F at the nearest point {F(nearest):.3g}, bound {bound:.3g}")
    assert 0 <= gap <= float(F(nearest)) <= bound
assert max(ratios) <= 0.5

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for name, values in zip(
    ("gap", "F at the nearest point", "bound"), zip(*shown, strict=True), strict=True
):
    ax.semilogy((1, 5, 15, 29), values, "o-", label=name)
ax.set_xlabel("dimension of the subspace")
ax.legend()

# %% [markdown]
# ## What breaks it (negative control)
#
# A constant from one point of the segment: at the minimiser itself the gradient is zero, and so
# would be the bound. And a point that is no minimiser: started from there, the "gap" is negative.

# %%
constant = float((H @ (best - best)).norm())
assert gap > constant * float((nearest - best).norm()) == 0
other = best + normal(D)
assert float(F(basis @ z)) - float(F(other)) < 0
