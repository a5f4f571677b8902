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
# # 7. The damped Gauss-Newton step is the optimum of a layerwise linear-quadratic problem
#
# ## Statement
#
# Let $x_{t+1} = f_t(x_t, u_t)$ with $J(u) = \Phi(x_L) + \sum_t \ell_t(x_t, u_t)$, and along a
# trajectory $A_t = \partial f_t / \partial x$, $B_t = \partial f_t / \partial u$. For
# $\mu \ge 0$ let $d$ minimise
#
# $$\sum_t \Big[ \ell_x^\top \delta x_t + \ell_u^\top d_t + \tfrac12
# \begin{pmatrix} \delta x_t \\ d_t \end{pmatrix}^{\!\top} \nabla^2 \ell_t
# \begin{pmatrix} \delta x_t \\ d_t \end{pmatrix} + \tfrac\mu2 \|d_t\|^2 \Big] +
# \Phi_x^\top \delta x_L + \tfrac12 \delta x_L^\top \nabla^2 \Phi\, \delta x_L$$
#
# subject to $\delta x_{t+1} = A_t \delta x_t + B_t d_t$, $\delta x_0 = 0$.
#
# **A.** $d$ is the damped Gauss-Newton step: $(G + \mu I)\, d = -\nabla J(u)$, with $G$ the
# generalised Gauss-Newton matrix of the costs seen through the rollout.
#
# **B.** This holds for controls that a batch shares, if the state of the layerwise problem is that
# of the whole batch, stacked. It fails if each example has a problem of its own and the solutions
# are averaged.
#
# **C.** For LoRA, $x_{t+1} = x_t (W_t + A_t B_t)$, the $r^2$ directions $(A_t X, -X B_t)$ of each
# layer lie in the null space of $G$ where the costs ignore $u$. With weight decay $\lambda$, at a
# stationary point with $u_t \ne 0$, the *exact* Hessian differs from $G$ by as much as $\lambda$
# itself: along the singular pair of $x_t^\top p_{t+1}$ that balances the decay it adds
# $\pm \lambda$ to the curvature $\lambda$ of the decay.

# %% [markdown]
# ## Assumptions
#
# - The costs are twice and the steps once continuously differentiable.
# - $G + \mu I \succ 0$: convex costs and $\mu > 0$ suffice.
# - C: linear layers with a low-rank control; in a Transformer the layer around the product adds
#   terms of its own.

# %% [markdown]
# ## Derivation
#
# **A.** Stack $\delta x = (\delta x_1, \dots, \delta x_L)$. The constraint is linear, so
# $\delta x = S d$ with $S = \partial x / \partial u$, the derivative of the rollout. With
# $y = (x, u)$, total cost $c(y)$ and $T = (S; I)$, the objective is
#
# $$\nabla c^\top T d + \tfrac12 d^\top T^\top \nabla^2 c\, T d + \tfrac\mu2 \|d\|^2 .$$
#
# By the chain rule $T^\top \nabla c = \nabla J(u)$, and $T^\top \nabla^2 c\, T = G$ by definition.
# The unique minimiser solves $(G + \mu I) d = -\nabla J$. It is also the solution of the problem
# that dynamic programming solves backward in $t$. $\blacksquare$
#
# What $G$ leaves out: $\nabla^2 J = G + \sum_t (\text{second derivatives of } f_t$ along
# $(\delta x_t, d_t)$, weighted by $p_{t+1})$. So Gauss-Newton is Newton where the costates
# vanish (zero loss) or the layers are linear in $(x, u)$ jointly.
#
# **B.** With a shared control the columns of the stacked $B_t$ are those of the examples, one below
# the other, $B_t = (B_t^1; \dots; B_t^N)$. $G = \frac1N \sum_i G^i$ and $\nabla J = \frac1N
# \sum_i \nabla J^i$, so $d = -(\frac1N \sum_i G^i + \mu I)^{-1} \frac1N \sum_i \nabla J^i$, which
# is no average of the $-(G^i + \mu I)^{-1} \nabla J^i$ unless the $G^i$ agree.
#
# **C.** $A S S^{-1} B = A B$ for every invertible $S$; the derivative at $S = I$ along $X$ of
# $(A S, S^{-1} B)$ is $(A X, -X B)$. It changes no state, so $T$ maps it to $(0, d)$, and without a
# cost of controls $G d = 0$. With decay: the part of $\nabla^2 J$ that $G$ leaves out is, in
# $(\delta A, \delta B)$ of one linear layer, the form $2 \langle M, \delta A\, \delta B \rangle$
# with $M = x_t^\top p_{t+1}$. Stationarity reads $M B^\top = -\lambda A$, $A^\top M = -\lambda B$
# (notebook 2). For a pair $M v = \sigma w$, $M^\top w = \sigma v$ of unit singular vectors put
# $\delta A = \alpha\, w e^\top$, $\delta B = \beta\, e v^\top$ with a unit vector $e$ in the
# space of the rank: the neglected form is $2 \alpha \beta \sigma$, of eigenvalues $\pm \sigma$.
# By stationarity $\sigma = \lambda$ occurs. Along $\alpha = \beta$ and $\alpha = -\beta$ the
# curvature $\lambda$ of the decay becomes $2 \lambda$ and $0$. $\blacksquare$
#
# Consequence: where the data do not bend $J$ along such a direction, the undamped step $-g/\lambda$
# overshoots to the mirror point when the true curvature is $2 \lambda$. Gauss-Newton on LoRA with
# weight decay therefore converges linearly and needs damping, whatever the accuracy of its inner
# solves; Newton's method does not.

# %%
import sympy as sp

alpha, beta, sigma, lam = sp.symbols("alpha beta sigma lambda", positive=True)
exact = sp.hessian(lam / 2 * (alpha**2 + beta**2) + sigma * alpha * beta, (alpha, beta))
assert set(exact.subs(sigma, lam).eigenvals()) == {0, 2 * lam}

# One layer, one example, everything a number: x1 = x0 (w + a b).
a, b, w, x0, target = sp.symbols("a b w x0 target", real=True)
x1 = x0 * (w + a * b)
loss = (x1 - target) ** 2 / 2 + lam / 2 * (a**2 + b**2)
gauss_newton = sp.Matrix([x1]).jacobian([a, b]).T * sp.Matrix([x1]).jacobian([a, b])
gauss_newton += lam * sp.eye(2)
neglected = sp.hessian(loss, (a, b)) - gauss_newton
assert sp.simplify(neglected - x0 * (x1 - target) * sp.Matrix([[0, 1], [1, 0]])) == sp.zeros(2, 2)

# %% [markdown]
# ## Numerical check
#
# Threshold, fixed before measuring: the step by products and conjugate gradients, the step by
# Riccati on the stacked batch, and the step by dense normal equations agree to $10^{-9}$,
# relatively.

# %%
import torch

from deltacontrol.theory import (
    Claim,
    ControlProblem,
    Evidence,
    LowRankDynamics,
    ResidualNetwork,
    SquaredErrorCost,
    Threshold,
    judge,
    solve,
)
from deltacontrol.theory.linear.curvature import GaussNewtonCurvature, HessianCurvature
from deltacontrol.theory.solvers.gauss_newton import NewtonCG, damped_step
from deltacontrol.theory.solvers.layerwise import layerwise_step

generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def flat(controls):
    return torch.cat([c.detach().flatten() for c in controls])


def problem_of(dynamics, width, batch=5, decay=0.05):
    return ControlProblem(
        dynamics, SquaredErrorCost(normal(batch, width), decay), normal(batch, width)
    )


problems = {
    "residual": problem_of(ResidualNetwork.random(8, 6, 12, 6, seed=1), 6),
    "low rank": problem_of(LowRankDynamics([normal(5, 5) / 2 for _ in range(4)], rank=2), 5),
}


def dense_step(problem, controls, damping):
    """Normal equations with the Jacobian of the last state; the decay is the only running cost."""
    sizes = [c.numel() for c in controls]

    def final(z):
        return problem.rollout(tuple(z.split(sizes)))[-1].flatten()

    S = torch.func.jacrev(final)(flat(controls))
    batch, decay = len(problem.x0), problem.cost.weight_decay
    system = S.mT @ S / batch + (decay + damping) * torch.eye(sum(sizes), dtype=S.dtype)
    return -torch.linalg.solve(system, flat(problem.gradient(controls)))


measured = {}
for name, problem in problems.items():
    controls = tuple(0.5 * normal(m) for m in problem.dynamics.control_sizes)
    for damping in (0.01, 1.0):
        by_products = damped_step(GaussNewtonCurvature(problem, controls), damping, rtol=1e-13).step
        by_layers = flat(layerwise_step(problem, controls, damping))
        dense = dense_step(problem, controls, damping)
        measured[name, damping] = max(
            float((by_products - dense).norm() / dense.norm()),
            float((by_layers - dense).norm() / dense.norm()),
            float((by_layers - by_products).norm() / dense.norm()),
        )
print(measured)
assert max(measured.values()) <= 1e-9

# %% [markdown]
# **C.** The gauge directions of LoRA, and the neglected curvature at an optimum.

# %%
bare = ControlProblem(
    problems["low rank"].dynamics, SquaredErrorCost(normal(5, 5)), problems["low rank"].x0
)
controls = tuple(normal(m) for m in bare.dynamics.control_sizes)
directions = []
for t, control in enumerate(controls):
    down, up = bare.dynamics.factors(t, control)
    X = normal(2, 2)
    directions += [(down @ X).flatten(), (-X @ up).flatten()]
gauge = torch.cat(directions)
gauge = gauge / gauge.norm()
curvature = GaussNewtonCurvature(bare, controls)
elsewhere = normal(len(gauge))
elsewhere = elsewhere / elsewhere.norm()
share = float((curvature @ gauge).norm() / (curvature @ elsewhere).norm())
print(f"G along the gauge, relative to a random direction: {share:.1e}")
assert share < 1e-12

problem = problems["low rank"]
controls = tuple(0.5 * normal(m) for m in problem.dynamics.control_sizes)
solution = solve(problem, NewtonCG(), controls, max_steps=80, tol=1e-9)
decay = problem.cost.weight_decay
exact = HessianCurvature(problem, solution.controls)
approximate = GaussNewtonCurvature(problem, solution.controls)
checked = 0
for t, control in enumerate(solution.controls):
    if control.norm() < 1e-3:
        continue
    M = solution.states[t].mT @ solution.costates[t + 1]
    left, values, right = torch.linalg.svd(M)
    near = int((values - decay).abs().argmin())
    assert abs(float(values[near]) - decay) < 1e-6
    for sign in (1.0, -1.0):
        A, B = torch.zeros(5, 2, dtype=M.dtype), torch.zeros(2, 5, dtype=M.dtype)
        A[:, 0], B[0] = left[:, near] / 2**0.5, sign * right[near] / 2**0.5
        parts = [torch.zeros_like(c) for c in solution.controls]
        parts[t] = torch.cat([A.flatten(), B.flatten()])
        along = flat(parts)
        difference = float(along @ (exact @ along - approximate @ along))
        print(f"layer {t}: neglected curvature {difference:+.6f}, decay {decay}")
        assert abs(difference - sign * decay) < 1e-6
    checked += 1
assert checked > 0

# %% [markdown]
# ## What breaks it (negative control)
#
# Give each example its own layerwise problem and average the steps: B says that this is another
# step. For a batch of one example it is the same.


# %%
def first(problem, count):
    """The problem on the first examples of its batch."""
    cost = SquaredErrorCost(problem.cost.target[:count], problem.cost.weight_decay)
    return ControlProblem(problem.dynamics, cost, problem.x0[:count])


def averaged_difference(problem, controls, damping):
    """From the dense step to the mean of the layerwise steps of single examples, relatively."""
    steps = []
    for x0, target in zip(problem.x0, problem.cost.target, strict=True):
        one = ControlProblem(
            problem.dynamics, SquaredErrorCost(target, problem.cost.weight_decay), x0
        )
        steps.append(flat(layerwise_step(one, controls, damping)))
    dense = dense_step(problem, controls, damping)
    return float((torch.stack(steps).mean(0) - dense).norm() / dense.norm())


broken, harmless = {}, {}
for name, problem in problems.items():
    controls = tuple(0.5 * normal(m) for m in problem.dynamics.control_sizes)
    broken[name] = averaged_difference(problem, controls, 0.1)
    harmless[name] = averaged_difference(first(problem, 1), controls, 0.1)
print(f"whole batches: {broken}, one example: {harmless}")
assert min(broken.values()) > 1e-2 and max(harmless.values()) <= 1e-9

# %%
import matplotlib.pyplot as plt

shown = {f"{name}, damping {damping}": value for (name, damping), value in measured.items()}
shown |= {f"{name}, mean of single examples": value for name, value in broken.items()}
figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.barh(list(shown), list(shown.values()), color=["C0"] * len(measured) + ["C3"] * len(broken))
ax.axvline(1e-9, color="black", lw=0.5)
ax.set_xscale("log")
ax.set_xlabel("relative difference of the steps")

# %%
claim = Claim(
    id=7,
    name="gauss-newton-layerwise",
    title="Gauss-Newton is layerwise LQR",
    statement="the damped Gauss-Newton step is the optimum of the layerwise LQ problem",
    source="Dunn & Bertsekas, JOTA 63(1), 1989; Sideris & Bobrow, IEEE TAC 50(12), 2005",
    notebook="07_gauss_newton_layerwise",
    threshold=Threshold("<=", 1e-9, "relative difference of the steps"),
    predict=lambda: {"relative_difference": 0.0},
    measure=lambda prediction: Evidence.worst(measured),
    negative_control=lambda prediction: Evidence.worst(broken, least=True),
    passing_control=lambda prediction: Evidence.worst(harmless),
)
outcome = judge(claim)
print(outcome.text, "-", outcome.part().reason)
assert outcome.holds
