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
# # 8. How well the linear-quadratic model predicts the loss drop of a step
#
# ## Statement
#
# Let $d$ be a direction in the space of all controls and $s > 0$. The linear-quadratic model of
# notebook 7 predicts the decrease
#
# $$\Delta_G(s) = -s\, \nabla J^\top d - \tfrac{s^2}{2}\, d^\top G d,$$
#
# and $\Delta_H(s)$ is the same with the exact Hessian in place of $G$. Let $\Delta(s) = J(u) -
# J(u + s d)$ be the actual one.
#
# **A.** $\Delta_G(s) - \Delta(s) = \frac{s^2}{2} d^\top (\nabla^2 J - G)\, d + O(s^3)$: the error
# is of second order, with a coefficient that is known without taking the step.
#
# **B.** $\Delta_H(s) - \Delta(s) = O(s^3)$.
#
# **C.** Along a damped Gauss-Newton direction, $(G + \mu I) d = -\nabla J \ne 0$, the relative
# error $\Delta_G / \Delta - 1$ is $O(s)$: the prediction of the drop is asymptotically exact.
#
# **D.** Where the costates vanish (zero loss and no decay), or the steps are affine in $(x, u)$
# jointly, $G = \nabla^2 J$ and the error of $\Delta_G$ is of third order too (zero for quadratic
# costs on affine steps).
#
# So "error $O(\|\delta\|^2)$" is right for Gauss-Newton's model, and pessimistic for the exact one.

# %% [markdown]
# ## Assumptions
#
# - $J$ is three times continuously differentiable along the segment $u + [0, s] d$. That holds for
#   GELU and tanh networks; a ReLU network satisfies it only between its kinks.
# - A has order exactly two if $d^\top (\nabla^2 J - G) d \ne 0$.
# - C: $G + \mu I \succ 0$.

# %% [markdown]
# ## Derivation
#
# By Taylor's theorem $J(u + s d) = J + s \nabla J^\top d + \frac{s^2}{2} d^\top \nabla^2 J\, d +
# \frac{s^3}{6} J'''(\xi)[d, d, d]$. Subtracting the model gives A and B at once.
#
# The neglected form is, with $\delta x_{t+1} = A_t \delta x_t + B_t d_t$,
#
# $$d^\top (\nabla^2 J - G) d = \sum_t \big\langle p_{t+1},\; \nabla^2_{x,u} f_t\,
# [(\delta x_t, d_t), (\delta x_t, d_t)] \big\rangle ,$$
#
# because the second derivative of $s \mapsto x_{t+1}$ along the segment, $\ddot x_{t+1} = A_t \ddot
# x_t + \nabla^2 f_t [\cdot, \cdot]$, enters $J$ through the costates. It vanishes if all $p$ do, or
# if all $\nabla^2 f_t$ do. That is D.
#
# For C, $-\nabla J^\top d = \nabla J^\top (G + \mu I)^{-1} \nabla J > 0$, so that $\Delta(s) = s
# |\nabla J^\top d| + O(s^2)$ and the ratio of an $O(s^2)$ error to it is $O(s)$. $\blacksquare$

# %%
import sympy as sp

s, u, w, x0, y = sp.symbols("s u w x0 y", real=True)
d = sp.symbols("d", real=True)
final = sp.tanh(w * x0 + u)
J = (final - y) ** 2 / 2
gradient, hessian = sp.diff(J, u), sp.diff(J, u, 2)
gauss_newton = sp.diff(final, u) ** 2
drop = J - J.subs(u, u + s * d)
error = (-s * gradient * d - s**2 / 2 * gauss_newton * d**2) - drop
second = sp.diff(error, s, 2).subs(s, 0) / 2
assert error.subs(s, 0) == 0 and sp.expand(sp.diff(error, s).subs(s, 0)) == 0
assert sp.expand(second - d**2 / 2 * (hessian - gauss_newton)) == 0
# The neglected part is the costate at the output times the second derivative of the step.
assert sp.expand(hessian - gauss_newton - (final - y) * sp.diff(final, u, 2)) == 0

# %% [markdown]
# ## Numerical check
#
# The slope of $\log |\Delta_G - \Delta|$ against $\log s$ is 2 for *every* quadratic model with the
# right gradient, also for one without curvature. What tells Gauss-Newton's from another is the
# coefficient of A. Threshold, fixed before measuring: $(\Delta_G - \Delta)/s^2$ at the shortest
# step equals $\frac12 d^\top (\nabla^2 J - G)\, d$ to one percent. Beside it the slopes, 2 and 3.

# %%
import numpy as np
import torch

from deltacontrol.theory import (
    Claim,
    ControlProblem,
    Evidence,
    LinearDynamics,
    LowRankDynamics,
    QuadraticCost,
    ResidualNetwork,
    SquaredErrorCost,
    Threshold,
    judge,
)
from deltacontrol.theory.linear.curvature import GaussNewtonCurvature, HessianCurvature
from deltacontrol.theory.linear.operator import unflatten
from deltacontrol.theory.solvers.gauss_newton import damped_step

generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


residual = ResidualNetwork.random(8, width=6, hidden=12, control_size=6, seed=1)
lora = LowRankDynamics([normal(5, 5) / 2 for _ in range(4)], rank=2)
problems = {
    "residual": ControlProblem(residual, SquaredErrorCost(normal(5, 6), 0.05), normal(5, 6)),
    "low rank": ControlProblem(lora, SquaredErrorCost(normal(5, 5), 0.05), normal(5, 5)),
}
STEPS = 2.0 ** -np.arange(4, 13)


def errors(problem, controls, share=1.0):
    """Errors of both models along the damped Gauss-Newton direction; A's coefficient; d'Gd.

    Gauss-Newton's model has a share of its curvature.
    """
    gauss_newton = GaussNewtonCurvature(problem, controls)
    exact = HessianCurvature(problem, controls)
    direction = damped_step(gauss_newton, 0.1, rtol=1e-10).step
    slope = float(gauss_newton.gradient @ direction)
    bends = [float(direction @ (c @ direction)) for c in (gauss_newton, exact)]
    rows = []
    for step in STEPS:
        ahead = tuple(
            a + step * b for a, b in zip(controls, unflatten(direction, controls), strict=True)
        )
        drop = float(problem.objective(controls) - problem.objective(ahead))
        models = share * bends[0], bends[1]
        rows.append([-step * slope - step**2 / 2 * bend - drop for bend in models] + [drop])
    return np.array(rows), 0.5 * (bends[1] - bends[0]), bends[0]


def order(values):
    return float(np.polyfit(np.log(STEPS), np.log(np.abs(values)), 1)[0])


misses, lines = {}, {}
for name, problem in problems.items():
    controls = tuple(0.5 * normal(m) for m in problem.dynamics.control_sizes)
    rows, coefficient, bend = errors(problem, controls)
    found = rows[-1, 0] / STEPS[-1] ** 2
    ratios = rows[:, 0] / rows[:, 2] + 1
    misses[name] = abs(found / coefficient - 1)
    lines[name] = rows
    print(
        f"{name}: coefficient {found:.5f}, predicted {coefficient:.5f}; orders "
        f"{order(rows[:, 0]):.3f} and {order(rows[:, 1]):.3f}; predicted/actual {ratios[0]:.4f} "
        f"at s = {STEPS[0]}, {ratios[-1]:.6f} at s = {STEPS[-1]:.1e}"
    )
    assert 1.8 < order(rows[:, 0]) < 2.2 and 2.8 < order(rows[:, 1]) < 3.2
    assert abs(order(ratios - 1) - 1) < 0.2
assert max(misses.values()) < 0.01

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for colour, (name, rows) in zip(("C0", "C1"), lines.items(), strict=True):
    ax.loglog(STEPS, np.abs(rows[:, 0]), "o-", color=colour, label=f"{name}, Gauss-Newton")
    ax.loglog(STEPS, np.abs(rows[:, 1]), "o--", color=colour, label=f"{name}, exact Hessian")
ax.set_xlabel("step size s")
ax.set_ylabel("error of the predicted drop")
ax.legend()

# %% [markdown]
# **D.** On affine steps with quadratic costs the model is $J$ itself.

# %%
eye = torch.eye(3, dtype=torch.float64)
affine = ControlProblem(
    LinearDynamics(A=normal(4, 3, 3) / 2, B=normal(4, 3, 3) / 2, c=normal(4, 3)),
    QuadraticCost.constant(4, Q=eye, R=eye, Qf=eye),
    normal(3),
)
rows, coefficient, bend = errors(affine, tuple(normal(3) for _ in range(4)))
print("affine: largest error", np.abs(rows[:, :2]).max(), "neglected curvature", coefficient)
assert np.abs(rows[:, :2]).max() < 1e-12 and abs(coefficient) < 1e-12

# %% [markdown]
# ## What breaks it (negative control)
#
# The model without its curvature: the order of its error is 2 all the same, and the coefficient is
# off by $\frac12 d^\top G\, d$. Along a direction in which $G$ vanishes leaving it out does no
# harm: there the check passes, so that it is not one that always fails.

# %%
broken = {}
for name, problem in problems.items():
    controls = tuple(0.5 * normal(m) for m in problem.dynamics.control_sizes)
    rows, coefficient, bend = errors(problem, controls, share=0.0)
    found = rows[-1, 0] / STEPS[-1] ** 2
    broken[name] = abs(found / coefficient - 1)
    assert 1.8 < order(rows[:, 0]) < 2.2, "the slope does not notice"
    assert abs((found - coefficient) / (bend / 2) - 1) < 0.01
print(broken)
assert min(broken.values()) > 0.1

# Without decay, G = J'J/N has a null space: less outputs (25) than controls (80).
problem = ControlProblem(lora, SquaredErrorCost(normal(5, 5)), normal(5, 5))
controls = tuple(0.5 * normal(m) for m in lora.control_sizes)
whole = GaussNewtonCurvature(problem, controls)
size = sum(lora.control_sizes)
columns = torch.stack([whole @ e for e in torch.eye(size, dtype=torch.float64)])
values, vectors = torch.linalg.eigh((columns + columns.mT) / 2)
flat = vectors[:, values < 1e-10 * values[-1]] @ normal(int((values < 1e-10 * values[-1]).sum()))
exact = HessianCurvature(problem, controls)
predicted = 0.5 * float(flat @ (exact @ flat) - flat @ (whole @ flat))
step = STEPS[-1]
ahead = tuple(a + step * b for a, b in zip(controls, unflatten(flat, controls), strict=True))
drop = float(problem.objective(controls) - problem.objective(ahead))
harmless = abs((-step * float(whole.gradient @ flat) - drop) / step**2 / predicted - 1)
print("without curvature where there is none:", harmless)
assert harmless < 0.05

# %%
claim = Claim(
    id=8,
    name="lq-loss-drop",
    title="What the LQ model leaves out of a step's loss drop",
    statement="the Gauss-Newton model's error is s²/2 d'(∇²J - G)d to second order",
    source="Taylor's theorem; Nocedal & Wright, Numerical Optimization, 2006, section 10.3",
    notebook="08_lq_loss_drop",
    threshold=Threshold("<=", 0.1, "largest |error over s²/2 d'(∇²J - G)d - 1|"),
    predict=lambda: {},
    measure=lambda prediction: Evidence.worst(misses),
    negative_control=lambda prediction: Evidence.worst(broken, least=True),
    passing_control=lambda prediction: Evidence(harmless),
)
outcome = judge(claim)
print(outcome.text, "-", outcome.part().reason)
assert outcome.holds
