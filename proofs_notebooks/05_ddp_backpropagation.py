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
# # 5. DDP without cross terms is stage-wise Newton, and then back-propagation
#
# ## Statement
#
# One backward sweep of differential dynamic programming (DDP) around a trajectory forms at each
# step the quadratic model $Q_t(\delta x, \delta u)$ of the cost to go and minimises it in
# $\delta u$, which gives $\delta u_t = k_t + K_t \delta x_t$ with $k_t = -Q_{uu}^{-1} Q_u$ and
# $K_t = -Q_{uu}^{-1} Q_{ux}$. If $Q_{ux}$ is set to $0$ at every step, then
#
# **A.** $K_t = 0$ and $k_t = -(\nabla^2_{u_t} J)^{-1} \nabla_{u_t} J$: Newton's step of each
# control alone, the others held fixed;
#
# **B.** with $Q_{uu} = I/\eta$ as well, $k_t = -\eta \nabla_{u_t} J$: gradient descent, its
# gradient computed by back-propagation.
#
# Liu, Chen & Theodorou, ICLR 2021, proposition 2 (their method is called DDPNOpt).

# %% [markdown]
# ## Assumptions
#
# - $f_t$, $\ell_t$, $\Phi$ twice differentiable; the trajectory belongs to the present $u$.
# - A: every $\nabla^2_{u_t} J$ is positive definite, else the step of that control is no minimum.
# - Second derivatives of the dynamics are kept. Without them (iterative LQR) A holds with the
#   Gauss-Newton matrix of each control in place of its Hessian.
# - $Q_{ux} = 0$ is an approximation that is *imposed*; it holds by itself only where state and
#   control do not interact. In a residual network it is wrong, as the last section measures.

# %% [markdown]
# ## Derivation
#
# With $V' = V_{t+1}$ and all derivatives at the trajectory, the model of DDP is
#
# $$Q_x = \ell_x + f_x^\top V'_x, \qquad Q_u = \ell_u + f_u^\top V'_x,$$
#
# $$Q_{xx} = \ell_{xx} + f_x^\top V'_{xx} f_x + V'_x \cdot f_{xx}, \qquad
# Q_{uu} = \ell_{uu} + f_u^\top V'_{xx} f_u + V'_x \cdot f_{uu},$$
#
# and the value function after the minimisation is
# $V_x = Q_x - Q_{xu} Q_{uu}^{-1} Q_u$, $V_{xx} = Q_{xx} - Q_{xu} Q_{uu}^{-1} Q_{ux}$.
#
# Put $Q_{ux} = 0$. Then $V_x = Q_x = \ell_x + f_x^\top V'_x$ with $V_x = \nabla \Phi$ at the end:
# this is the equation of the costates, so $V_x = p_t$ and $Q_u = \nabla_u H_t = \nabla_{u_t} J$ by
# notebook 1. The derivatives of the dynamics are contracted with $p_{t+1}$, in agreement with the
# form of DDP that takes the costate there from the start.
#
# Next $V_{xx} = Q_{xx}$. Let $J_t(x)$ be the cost from step $t$ on when the *present* controls are
# applied: $J_t(x) = \ell_t(x, u_t) + J_{t+1}(f_t(x, u_t))$. Two derivatives by the chain rule give
# $\nabla^2 J_t = \ell_{xx} + f_x^\top \nabla^2 J_{t+1} f_x + \nabla J_{t+1} \cdot f_{xx}$, the same
# recursion from the same end, so $V_{xx} = \nabla^2 J_t(x_t)$. Only the terms of $J$ from step $t$
# on contain $u_t$, hence $\nabla^2_{u_t} J = \ell_{uu} + f_u^\top \nabla^2 J_{t+1} f_u +
# \nabla J_{t+1} \cdot f_{uu} = Q_{uu}$. That is A; B follows by inserting $Q_{uu} = I/\eta$, which
# leaves $V_x$ untouched. $\blacksquare$
#
# What $Q_{ux}$ adds: the undamped sweep with it is Newton's method on $J$ in all controls at once,
# $-(\nabla^2 J)^{-1} \nabla J$ to first order. So A is block-Jacobi Newton, B is the first-order
# method, and the cross terms are exactly the coupling between layers. One scalar layer after
# another shows it:

# %%
import sympy as sp

a, b, c, x0, u0, u1, eta = sp.symbols("a b c x0 u0 u1 eta", real=True)
f = (lambda x, u: x + a * sp.sin(x + u), lambda x, u: x + b * sp.sin(x * u))
x1 = f[0](x0, u0)
J = f[1](x1, u1) ** 2 / 2 + c / 2 * (u0**2 + u1**2)

# Backward with Q_ux = 0, in symbols: V_x = Q_x and V_xx = Q_xx at each step.
z, w = sp.symbols("z w", real=True)
V = z**2 / 2
at = {}
gradient, curvature = sp.diff(V, z), sp.diff(V, z, 2)
x2 = f[1](x1, u1)
Vx, Vxx = gradient.subs(z, x2), curvature.subs(z, x2)
for t, (x, u) in reversed(list(enumerate(((x0, u0), (x1, u1))))):
    step = f[t](z, w)
    here = {z: x, w: u}
    fx, fu = sp.diff(step, z).subs(here), sp.diff(step, w).subs(here)
    fxx, fuu = sp.diff(step, z, 2).subs(here), sp.diff(step, w, 2).subs(here)
    at[t] = (c * u + fu * Vx, c + fu**2 * Vxx + Vx * fuu)
    Vx, Vxx = fx * Vx, fx**2 * Vxx + Vx * fxx
for t, u in enumerate((u0, u1)):
    Qu, Quu = at[t]
    assert sp.simplify(Qu - sp.diff(J, u)) == 0
    assert sp.simplify(Quu - sp.diff(J, u, 2)) == 0

# %% [markdown]
# ## Numerical check
#
# Threshold, fixed before measuring: relative difference at most $10^{-10}$, to blocks of the
# Hessian of $J$ by automatic differentiation (A) and to `torch.optim.SGD` (B).

# %%
import torch

from deltacontrol.theory import ControlProblem, LowRankDynamics, ResidualNetwork, SquaredErrorCost
from deltacontrol.theory.solvers.quadratic_model import QuadraticModel, sweep

generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


problems = {
    "residual": ControlProblem(
        ResidualNetwork.random(4, width=4, hidden=6, control_size=3, seed=1),
        SquaredErrorCost(normal(5, 4), 2.0),
        normal(5, 4),
    ),
    "low rank": ControlProblem(
        LowRankDynamics([normal(4, 4) / 3 for _ in range(2)], rank=1),
        SquaredErrorCost(normal(5, 4), 6.0),
        normal(5, 4),
    ),
}
controls = {
    name: tuple(0.2 * normal(m) for m in problem.dynamics.control_sizes)
    for name, problem in problems.items()
}


def swept(problem, u, **changes):
    model = QuadraticModel.of(problem, u, problem.evaluate(u), second_order=True)
    return torch.cat([k[0] for k in sweep(model, **changes).k])


def whole_hessian(problem, u):
    sizes = [len(control) for control in u]
    return torch.func.hessian(lambda z: problem.objective(z.split(sizes)))(torch.cat(u))


def stagewise(problem, u):
    H, g = whole_hessian(problem, u), torch.cat(problem.gradient(u))
    blocks = torch.block_diag(*[torch.ones(len(c), len(c), dtype=torch.float64) for c in u])
    return -torch.linalg.solve(H * blocks, g)


def descent(problem, u, rate):
    leaves = [control.clone().requires_grad_() for control in u]
    optimiser = torch.optim.SGD(leaves, lr=rate)
    problem.objective(tuple(leaves)).backward()
    optimiser.step()
    return torch.cat([leaf.detach() for leaf in leaves]) - torch.cat(u)


def relative(found, reference):
    return float((found - reference).norm() / reference.norm())


for name, problem in problems.items():
    u = controls[name]
    newton = relative(swept(problem, u, cross=False), stagewise(problem, u))
    first = relative(swept(problem, u, cross=False, step_size=0.1), descent(problem, u, 0.1))
    print(f"{name}: stage-wise Newton {newton:.1e}, gradient descent {first:.1e}")
    assert max(newton, first) <= 1e-10

# %% [markdown]
# ## What breaks it (negative control)
#
# Keep $Q_{ux}$. The open-loop part of the step then already accounts for the reaction of later
# layers, and the whole law is Newton's method on all controls: equal to the dense solve at
# $10^{-9}$, and far from the stage-wise step.

# %%
for name, problem in problems.items():
    u = controls[name]
    model = QuadraticModel.of(problem, u, problem.evaluate(u), second_order=True)
    law = sweep(model)
    departure = relative(torch.cat([k[0] for k in law.k]), stagewise(problem, u))
    dx, step = torch.zeros(model.A[0].shape[-1], dtype=torch.float64), []
    for A, B, k, K in zip(model.A, model.B, law.k, law.K, strict=True):
        du = k[0] + K[0] @ dx
        step.append(du)
        dx = A[0] @ dx + B[0] @ du
    dense = -torch.linalg.solve(whole_hessian(problem, u), torch.cat(problem.gradient(u)))
    print(f"{name}: with cross terms {departure:.2f} away, from Newton "
          f"{relative(torch.cat(step), dense):.1e}")  # fmt: skip
    assert departure > 1e-2
    assert relative(torch.cat(step), dense) <= 1e-9

# %%
import matplotlib.pyplot as plt

# The blocks beside the diagonal are what the cross terms carry from one layer to the next.
figure, axes = plt.subplots(1, 2, figsize=(6, 3), layout="constrained")
for ax, (name, problem) in zip(axes, problems.items(), strict=True):
    picture = ax.imshow(whole_hessian(problem, controls[name]).abs().clamp_min(1e-4).log10())
    ax.set_title(name)
figure.colorbar(picture, ax=axes, label="log₁₀ of |∇²J|")

# %% [markdown]
# With one layer there is no later one: $Q_{ux}$ enters the feedback $K_0$ alone, and keeping it
# does no harm.

# %%
alone = ControlProblem(
    ResidualNetwork.random(1, width=4, hidden=6, control_size=3, seed=1),
    SquaredErrorCost(normal(5, 4), 2.0),
    normal(5, 4),
)
u = (0.2 * normal(3),)
harmless = relative(swept(alone, u), stagewise(alone, u))
print(f"one layer, with cross terms: {harmless:.1e}")
assert harmless <= 1e-10
