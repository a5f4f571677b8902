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
# # 27. Certificates for linearised delta-tuning
#
# ## Statement
#
# Around a point, logits are affine in the change $u$ of the controls. The program
#
# $$\min_u\; P(u) = \frac1N \sum_i \ell(z_i + G_i u;\, y_i) + R(u)$$
#
# has the dual $\max_a D(a)$ with, for $v(a) = -\frac1N \sum_i G_i^\top a_i$,
#
# $$D(a) = \frac1N \sum_i \big[\langle a_i, z_i\rangle - \ell^*(a_i; y_i)\big] - R^*(v(a)) .$$
#
# **A.** $P(u) \ge D(a)$ for all $u$ and $a$, and the optima are equal.
#
# **B.** For cross-entropy $\ell^*(a; y) = \sum_c p_c \log p_c$ with $p = a + e_y$ in the simplex,
# else $\infty$. For a norm, $(\lambda \|\cdot\|)^*$ is the indicator of $\|v\|_\circ \le \lambda$.
#
# **C.** $u = 0$ is optimal if and only if $\lambda \ge \|v(\nabla\ell(z))\|_\circ$.
#
# **D.** If $\nabla\ell$ is $S$-Lipschitz and $a$ is feasible with gap $\gamma = P(u) - D(a)$, the
# dual optimum $a^\star$ satisfies $\|a - a^\star\| \le \sqrt{2 N S \gamma}$, $S = \frac12$ for
# cross-entropy. So $\sigma_j(V_g) + \|G_g\| \sqrt{2 N S \gamma}/N < \lambda w_g$ proves that the
# $j$-th singular direction is unused by every optimum.
#
# **E.** Ridge, norm balls and group lasso may be solved in the row space of the features, and the
# nuclear norm in their column and row spaces, exactly. For a box this is false.
#
# **F.** Let $f - \frac\sigma2\|\cdot\|^2$ be convex, for a $\sigma$ of any sign. At any point $w$
# with $e = \nabla f(w)$, on the ball of radius $r$ around $c$, with $q = c - w$ and
# $h = e + \sigma q$,
#
# $$\min f \;\ge\; f(w) + \langle e, q\rangle + \frac\sigma2\|q\|^2 +
# \min_{0 \le s \le r} \Big(\frac\sigma2 s^2 - \|h\| s\Big),$$
#
# with equality where $w$ minimises a convex $f$, or a quadratic one of any sign with
# $\sigma = \lambda_{\min}(H)$. For a network $z(u + d) = z + Gd + \rho(d)$ and convex $\Phi$, with
# $a = \nabla\Phi$ at the linearised outputs of $w$, controls gain at most the bound of the
# linearisation plus $\max_d -\langle a, \rho(d)\rangle$.

# %% [markdown]
# ## Assumptions
#
# - $\ell(\cdot; y)$ convex and finite everywhere; $R$ convex, closed, $R(0) = 0 \le R$.
# - D: $\ell$ differentiable with an $S$-Lipschitz gradient.
# - E: $R$ is a nondecreasing function of unitarily invariant norms of the groups.

# %% [markdown]
# ## Derivation
#
# **A.** By definition of the conjugates $\ell(z) \ge \langle a, z\rangle - \ell^*(a)$ and
# $R(u) \ge \langle u, v\rangle - R^*(v)$. Sum the first over $i$ with $z = z_i + G_i u$: the terms
# $\frac1N\sum_i \langle a_i, G_i u\rangle + \langle u, v(a)\rangle$ cancel. Equality: $\ell$ is
# finite, hence continuous, so Fenchel's theorem applies (Borwein & Lewis 2006, theorem 3.3.5).
#
# **B.** $\sup_z \langle a, z\rangle - \log\sum_c e^{z_c} + z_y$ is stationary where
# $\mathrm{softmax}(z) = a + e_y = p$, with value $\sum_c p_c z_c - \log\sum_c e^{z_c} =
# \sum_c p_c \log p_c$; boundary points follow by closure; outside the simplex a direction of
# ascent exists. For a norm, $\sup_u \langle u, v\rangle - \lambda\|u\|$ is $0$ when
# $\|v\|_\circ \le \lambda$, and grows along the maximiser of $\langle u, v \rangle / \|u\|$
# otherwise. As $s p + (1 - s) e_y$ is in the simplex, $s a$ stays in the domain for
# $0 \le s \le 1$: shrinking makes any $a$ feasible for both.
#
# **C.** $0$ minimises $P$ iff $v(\nabla\ell(z)) \in \partial R(0)$, for $R = \lambda\|\cdot\|$ the
# dual ball of radius $\lambda$.
#
# **D.** $\ell^*$ is $1/S$-strongly convex, so $D$ is $1/(NS)$-strongly concave and
# $\frac{1}{2NS}\|a - a^\star\|^2 \le D(a^\star) - D(a) \le P(u) - D(a) = \gamma$. For cross-entropy
# the Hessian $\mathrm{diag}(p) - pp^\top$ has norm at most $\frac12$: $w^\top(\cdot)w$ is the
# variance of a variable in an interval of length $\max w - \min w \le \sqrt2\|w\|$, at most
# $\frac14 \cdot 2\|w\|^2$. Singular values move by at most the norm of the change (Weyl), and
# $\langle U, V^\star\rangle = \lambda w \|U\|_*$ forces the singular vectors of $U$ to be those of
# $V^\star$ with $\sigma = \lambda w$.
#
# **E.** The loss sees $u$ through $Gu$ alone. With the orthogonal projection $\Pi$ on the row
# space, $G \Pi u = G u$ and $\|\Pi u\|_2 \le \|u\|_2$. For $\langle G_i, W\rangle$ with all
# $G_i = \Pi_1 G_i \Pi_2$, the matrix $\Pi_1 W \Pi_2$ has the same logits and no larger singular
# values.
#
# **F.** The tangent of the convex $f - \frac\sigma2\|\cdot\|^2$ at $w$ gives
# $f(v) \ge f(w) + \langle e, v - w\rangle + \frac\sigma2\|v - w\|^2$. With $v = c + s$ the right
# side is $f(w) + \langle e, q\rangle + \frac\sigma2\|q\|^2 + \langle h, s\rangle +
# \frac\sigma2\|s\|^2$, least against $h$. If $w$ is a minimiser, then $e = \lambda q$ with
# $\lambda \ge 0$, $\lambda(\|q\| - r) = 0$ and $\lambda + \sigma \ge 0$: for a convex $f$ by the
# conditions of Karush, Kuhn and Tucker, for a quadratic by those of Moré and Sorensen. So
# $h = (\lambda + \sigma) q$, the least $s$ has the length $\|q\|$, and the terms behind $f(w)$ add
# up to $\lambda\|q\|^2 + \sigma\|q\|^2 - (\lambda + \sigma)\|q\|^2 = 0$.
# For the network, $\Phi(z(u + d)) \ge \Phi(z') + \langle a, z + Gd - z'\rangle + \langle a,
# \rho(d)\rangle$ by convexity, and the minimum of the first two terms, with the weight decay, is
# the bound of the linearisation. $\blacksquare$

# %% [markdown]
# ## Numerical check

# %%
import numpy as np
import torch

from deltacontrol.theory.control.problem import Box
from deltacontrol.theory.convex import ConvexTuning, GroupLasso, NuclearNorm, Ridge
from deltacontrol.theory.linear.operator import SymmetricMatrix

torch.manual_seed(0)
N, K, sizes = 20, 3, (6, 6, 6, 6)
F64 = torch.float64
features = torch.randn(N, K, sum(sizes), dtype=F64)
offset = torch.randn(N, K, dtype=F64)
labels = torch.randint(0, K, (N,))
tuning = ConvexTuning(features, labels, groups=sizes, offset=offset, penalty=GroupLasso())
weight = 0.5 * tuning.largest_weight
solution = tuning.solve(weight)

# A: random feasible points bound the optimum from below; the solution's own point closes the gap.
onehot = torch.eye(K, dtype=F64)[labels]
bounds = []
for _ in range(200):
    a = torch.softmax(3 * torch.randn(N, K, dtype=F64), 1) - onehot
    bounds.append(max(tuning.bound(s * a, weight) for s in (0.0, 0.05, 0.2, 0.5, 1.0)))
assert max(bounds) < solution.objective
assert 0 <= solution.gap + 1e-14 < 1e-9
print(f"optimum {solution.objective:.6f}, random bounds up to {max(bounds):.6f}")
print(f"gap of the solution's own dual point: {solution.gap:.1e}")

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.hist(bounds, bins=30, label="bounds from random feasible points")
ax.axvline(solution.objective, color="C3", label="optimum")
ax.set_xlabel("objective")
ax.legend()

# %%
# B: the conjugate of cross-entropy against a maximisation by Newton's method.
a = torch.softmax(torch.randn(K, dtype=F64), 0) - onehot[0]
z = torch.zeros(K, dtype=F64)
for _ in range(60):
    p = torch.softmax(z, 0)
    step = torch.linalg.lstsq(torch.diag(p) - torch.outer(p, p), a + onehot[0] - p).solution
    z = z + step.clamp(-1, 1)
found = a @ z - torch.logsumexp(z, 0) + z[labels[0]]
entropy = torch.special.xlogy(a + onehot[0], a + onehot[0]).sum()
assert abs(found - entropy) < 1e-12
print(f"conjugate {float(found):.12f}, negative entropy {float(entropy):.12f}")

# %%
# C: the largest weight is sharp on both sides.
top = tuning.largest_weight
assert not tuning.solve(top).active and tuning.solve(0.999 * top).active

# D: a rough certificate rules out only what an accurate one does not use.
rough = ConvexTuning(
    features, labels, groups=sizes, offset=offset, penalty=GroupLasso(), tolerance=0.02
)
for share in (0.9, 0.7, 0.5, 0.3):
    exact, loose = tuning.solve(share * top), rough.solve(share * top)
    assert all(r <= b for r, b in zip(exact.ranks, loose.rank_bounds, strict=True))
    assert exact.ranks == exact.rank_bounds
    print(f"{share:.1f} of the largest weight: active groups {exact.active}")

# The dual optimum is within the radius, for many other labels.
for seed in range(5):
    other = tuning.with_labels(
        torch.randint(0, K, (N,), generator=torch.Generator().manual_seed(seed))
    )
    best = other.solve(weight)
    loose = other.solve(1.01 * weight)  # its dual point is feasible for `weight` after shrinking
    a = loose.dual / 1.01
    gap = best.objective - other.bound(a, weight)
    assert (a - best.dual).norm() <= np.sqrt(2 * N * 0.5 * gap) + 1e-6

# %%
# E: 400 controls and 20 x 2 independent rows; the reduced program against autograd's optimality.
wide = torch.randn(N, K, 400, dtype=F64) / 5
reduced = ConvexTuning(wide, labels, groups=(200, 200), offset=offset, penalty=GroupLasso())
lam = 0.3 * reduced.largest_weight
u = torch.cat(reduced.solve(lam).controls).requires_grad_()
loss = torch.nn.functional.cross_entropy(offset + wide @ u, labels)
(gradient,) = torch.autograd.grad(loss, u)
for part, slope in zip(u.detach().split(200), gradient.split(200), strict=True):
    if part.norm() > 0:
        expected = -lam * np.sqrt(200) * part / part.norm()
        assert (slope - expected).norm() < 1e-5 * expected.norm()
    else:
        assert slope.norm() <= lam * np.sqrt(200)
print("optimality holds in all 400 coordinates")

matrices = torch.randn(N, K, 3, 5, dtype=F64)
left, right = (torch.linalg.qr(torch.randn(m, k, dtype=F64))[0] for m, k in ((30, 3), (20, 5)))
embedded = left @ matrices @ right.mT
small = ConvexTuning([matrices], labels, offset=offset, penalty=NuclearNorm())
large = ConvexTuning([embedded], labels, offset=offset, penalty=NuclearNorm())
lam = 0.4 * small.largest_weight
W, V = small.solve(lam), large.solve(lam)
assert abs(W.objective - V.objective) < 1e-7 and W.ranks == V.ranks
assert (left @ W.controls[0] @ right.mT - V.controls[0]).norm() < 1e-3
print(f"rank {W.ranks[0]} in 3 x 5 and embedded in 30 x 20")

# %%
# F: from random points, and closing at the minimiser; the matrix has eigenvalues of both signs.
from deltacontrol.theory.certificates import Ball, gap_bound, least_on_ball, quadratic_gap

root, slope = torch.randn(6, 6, dtype=F64), torch.randn(6, dtype=F64)
H = root + root.mT
sigma, ball = float(torch.linalg.eigvalsh(H)[0]), Ball(torch.zeros(6, dtype=F64), 1.5)


def f(v: torch.Tensor) -> float:
    return float(slope @ v + 0.5 * v @ H @ v)


found = quadratic_gap(slope, H, ball.radius)
inside = [f(ball.project(3 * v)) for v in torch.randn(500, 6, dtype=F64)]
below = [
    least_on_ball(f(w), slope + H @ w, w, sigma, ball).bound for w in torch.randn(500, 6, dtype=F64)
]
assert max(below) <= -found.lower <= min(inside) and found.upper - found.lower < 1e-9
print(f"least {-found.lower:.6f}, at random points from {min(inside):.6f}")
print(f"bounds from random points up to {max(below):.6f}, from the minimiser {-found.upper:.6f}")

# A network: the bound of its linearisation, and what that leaves out at 200 points of the ball.
from deltacontrol.theory.control.costs import CrossEntropyCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.systems import ResidualNetwork

layers = ResidualNetwork.random(3, width=3, hidden=6, control_size=4, seed=1)
problem = ControlProblem(
    layers, CrossEntropyCost(torch.arange(6) % 3, 0.1), torch.randn(6, 3, dtype=F64)
)
start = problem.zero_controls()
certificate = gap_bound(problem, start, 0.5)
print(certificate)
z0, J0 = problem.rollout(start)[-1], problem.objective(start)
for d in torch.randn(200, 12, dtype=F64):
    step = (0.5 * d / d.norm()).split(4)
    z, along = torch.func.jvp(lambda *u: problem.rollout(u)[-1], start, tuple(step))
    left_out = -(certificate.dual * (problem.rollout(step)[-1] - z0 - along)).sum()
    assert J0 - problem.objective(step) <= certificate.upper + left_out

# %% [markdown]
# ## What breaks it
#
# A point outside the domain bounds nothing: scaling $a$ *up* violates
# $\|v_g\|_\circ \le \lambda w_g$, and $D$ is $-\infty$, not merely small. And with a box the
# rotation of E is wrong: the box of the reduced coordinates is another set.
# F needs a $\sigma$ that is not above the least curvature; an estimate may be above it.

# %%
assert tuning.bound(1.01 * solution.dual, weight) == -np.inf
assert tuning.bound(solution.dual, 0.9 * weight) == -np.inf

target = torch.randn(4, 1, dtype=F64)
wide = torch.randn(4, 1, 12, dtype=F64)
options = {"loss": "squared-error", "penalty": Ridge()}
boxed = ConvexTuning(wide, target, box=Box(-0.1, 0.1), **options).solve(1e-3)
Q = torch.linalg.qr(wide[:, 0].mT)[0]
rotated = ConvexTuning(wide @ Q, target, box=Box(-0.1, 0.1), **options).solve(1e-3)
assert boxed.gap < 1e-8 and rotated.gap < 1e-8
assert rotated.objective > boxed.objective + 1e-3
print(f"box in the controls {boxed.objective:.4f}, in rotated coordinates {rotated.objective:.4f}")

above = quadratic_gap(slope, SymmetricMatrix(H), ball.radius, floor=0.0)
assert above.upper < found.lower
print(f"with sigma = 0: at most {above.upper:.4f}, and {found.lower:.4f} is gained")
