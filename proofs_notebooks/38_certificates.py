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
# # 38. What controls in a ball can still gain is certified
#
# ## Statement
#
# Let $B = \{v : \|v - c\| \le r\}$ and $f$ a function whose curvature is at least $\sigma$, of any
# sign: $f(v) - \frac{\sigma}{2} \|v\|^2$ is convex.
#
# **A.** For every point $w$ with $e = \nabla f(w)$, $q = c - w$ and $h = e + \sigma q$,
#
# $$\min_B f \;\ge\; f(w) + \langle e, q \rangle + \tfrac{\sigma}{2} \|q\|^2
#   + \min_{0 \le s \le r} \bigl(\tfrac{\sigma}{2} s^2 - \|h\| s\bigr).$$
#
# **B.** Equality holds at a $w \in B$ with $e = \lambda q$, where $\lambda \ge 0$,
# $\lambda + \sigma \ge 0$, and $\lambda = 0$ unless $\|q\| = r$. Minimisers of a convex $f$ on $B$
# and global minimisers of a quadratic, definite or not, are such points.
#
# **C.** Let $J(v) = \Phi(z(v)) + \frac{w}{2}\|v\|^2$ with convex $\Phi$ and outputs
# $z(u + d) = z + G d + \rho(d)$ of a network. Nothing in the ball around $u$ gains more than the
# bound of the linearised problem plus $R = \max_d -\langle a, \rho(d) \rangle$, where $a$ is the
# gradient of $\Phi$ at the point that the bound is made from.
#
# **D.** The bound with an estimate of $R$ is within a factor of 2 of what a step gains in a real
# network. This is empirical.
#
# ## Assumptions
#
# A and B: $f$ is differentiable at $w$. C: $\Phi$ is convex and differentiable.

# %% [markdown]
# ## Derivation
#
# **A.** $f - \frac{\sigma}{2}\|\cdot\|^2$ lies above its tangent at $w$. Adding
# $\frac{\sigma}{2}\|v\|^2$ to both sides,
# $f(v) \ge f(w) + \langle e, v - w \rangle + \frac{\sigma}{2}\|v - w\|^2$. With $v = c + s t$,
# $\|t\| = 1$ and $0 \le s \le r$ the right side is
# $f(w) + \langle e, q \rangle + \frac{\sigma}{2}\|q\|^2 + s \langle h, t \rangle
# + \frac{\sigma}{2} s^2$, and least for $t = -h/\|h\|$. Nothing was asked of $w$.
#
# **B.** There $h = (\lambda + \sigma) q$ with $\lambda + \sigma \ge 0$. If $\lambda = 0$ then
# $e = 0$, $h = \sigma q$, and $s = \|q\|$ gives $-\frac{\sigma}{2}\|q\|^2$. Else $\|q\| = r$, the
# slope $\sigma s - \|h\|$ in $s$ is at most $\sigma r - (\lambda + \sigma) r \le 0$, so that
# $s = r$, and the terms sum to $\lambda r^2 + \frac{\sigma}{2} r^2 + \frac{\sigma}{2} r^2
# - (\lambda + \sigma) r^2 = 0$. The condition is that of Karush, Kuhn and Tucker for a convex $f$,
# and that of Moré and Sorensen for a quadratic.
#
# **C.** At any $z'$ with $a = \nabla\Phi(z')$,
# $\Phi(z + G d + \rho(d)) \ge \Phi(z') + \langle a, z + G d - z' \rangle
# + \langle a, \rho(d) \rangle$.
# Without the last term, and with $\frac{w}{2}\|u + d\|^2$, the right side is the paraboloid of A
# for the linearised problem, hence not below $J(u)$ less its bound. $\blacksquare$

# %% [markdown]
# ## Symbolic check
#
# In the second case of B the terms behind $f(w)$ sum to zero.

# %%
import sympy as sp

lam, sigma, r = sp.symbols("lambda sigma r", positive=True)
e_q, q_q, h = lam * r**2, r**2, (lam + sigma) * r
behind = e_q + sigma / 2 * q_q + sigma / 2 * r**2 - h * r
assert sp.simplify(behind) == 0

# %% [markdown]
# ## Numerical check
#
# The bound from any point is below the least value on the ball, here of indefinite quadratics, and
# equal to it at the minimiser.

# %%
import numpy as np
import torch

from deltacontrol.theory.certificates import Ball, least_on_ball, quadratic_gap

random = np.random.default_rng(0)
slack = []
for _ in range(50):
    root = random.normal(size=(6, 6))
    H, g = torch.from_numpy(root + root.T), torch.from_numpy(random.normal(size=6))
    lowest = float(torch.linalg.eigvalsh(H)[0])
    best = quadratic_gap(g, H, 1.5)
    least = -best.lower
    ball = Ball(torch.zeros(6, dtype=torch.float64), 1.5)
    for _ in range(20):
        w = torch.from_numpy(2 * random.normal(size=6))
        bound = least_on_ball(float(g @ w + w @ H @ w / 2), g + H @ w, w, lowest, ball).bound
        assert bound <= least + 1e-12
        slack.append(least - bound)
    assert abs(best.upper - best.lower) <= 1e-9 * max(1.0, best.upper)
print(f"1,000 points: none above; the least value is {np.median(slack):.2f} higher in the median")

# %% [markdown]
# ## What breaks it (negative control)
#
# A curvature that is denied: with $\sigma = 0$ for an indefinite $H$ the bound lies above what can
# be reached, and the certificate is wrong.

# %%
from deltacontrol.theory.linear.operator import SymmetricMatrix

wrong = quadratic_gap(g, SymmetricMatrix(H), 1.5, floor=0.0)
print(f"at least {best.lower:.3f} can be gained; with a curvature that is denied the bound says "
      f"{wrong.upper:.3f}")  # fmt: skip
assert wrong.upper < best.lower

# %% [markdown]
# ## A network
#
# The bound of the linearisation, the remainder that was found, and what a step really gains, as the
# ball grows.

# %%
import matplotlib.pyplot as plt

from deltacontrol.theory.certificates import gap_bound
from deltacontrol.theory.control.costs import CrossEntropyCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.systems import ResidualNetwork

dynamics = ResidualNetwork.random(4, width=3, hidden=5, control_size=4, seed=0)
x0 = torch.from_numpy(random.normal(size=(6, 3)))
problem = ControlProblem(dynamics, CrossEntropyCost(torch.arange(6) % 3, 0.1), x0)
u = tuple(torch.from_numpy(0.3 * random.normal(size=4)) for _ in range(4))
radii = np.geomspace(0.01, 3, 8)
found = [gap_bound(problem, u, float(radius)) for radius in radii]
assert all(one.attained <= one.estimate + 1e-12 for one in found)

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.loglog(radii, [one.estimate for one in found], label="bound and estimated remainder")
ax.loglog(radii, [one.upper for one in found], "--", label="bound of the linearisation")
ax.loglog(radii, [one.attained for one in found], "o", label="gained by a step")
ax.set_xlabel("radius")
ax.legend()

# %% [markdown]
# ## The claim
#
# On problems whose gap another method knows, on the linearised real model, and on the real one.

# %%
from deltacontrol.experiments.claims import scoreboard

claim = scoreboard.find(38)
for part in claim.parts:
    print(f"{part.name}: {part.title}; {part.threshold}")
