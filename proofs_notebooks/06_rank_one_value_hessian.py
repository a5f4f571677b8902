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
# # 6. When a rank-one terminal Hessian stays rank one
#
# ## Statement
#
# Let $V_t$ be the Hessian in the state of the value function in the backward sweep of DDP, for one
# example. If
#
# - the layers are $x \mapsto A_t x + b_t(u)$,
# - the running cost does not contain the state,
#
# then $\operatorname{rank} V_t \le \operatorname{rank} V_{t+1}$ at every layer. In particular a
# terminal Hessian $\varphi'' g g^\top$ (squared error of one logit, cross-entropy of two classes)
# gives $V_t = v_t\, g_t g_t^\top$ with $g_t = A_t^\top g_{t+1}$ and a scalar recursion for $v_t$.
# With $C$ classes the rank stays at most $C - 1$.
#
# The same holds for *any* layers if second derivatives of the dynamics are dropped (Gauss-Newton,
# iterative LQR). It does **not** hold in general for exact DDP where the control multiplies the
# state, $x \mapsto A_t(u) x$ as in LoRA, although such a layer is linear in the state.
#
# After Liu, Chen & Theodorou, ICLR 2021, proposition 3, whose factorisation takes the Gauss-Newton
# form.

# %% [markdown]
# ## Assumptions
#
# - Controls per example: with a control that the batch shares, the sweep couples the examples and
#   $V$ belongs to all of them together; its rank is then bounded by the sum of their ranks.
# - $Q_{uu} \succ 0$ at every step, with or without damping.

# %% [markdown]
# ## Derivation
#
# For $f = A x + b(u)$ both $f_{xx}$ and $f_{ux}$ vanish, and with $\ell = \ell(u)$ so do
# $\ell_{xx}$ and $\ell_{ux}$. With $B = b'(u)$ and $V' = V_{t+1}$,
#
# $$Q_{xx} = A^\top V' A, \qquad Q_{ux} = B^\top V' A, \qquad Q_{uu} = R + B^\top V' B,$$
#
# where $R$ collects $\ell_{uu}$, $p \cdot b''$ and any damping. Therefore
#
# $$V = Q_{xx} - Q_{xu} Q_{uu}^{-1} Q_{ux}
# = A^\top \left( V' - V' B\, Q_{uu}^{-1} B^\top V' \right) A
# = A^\top V' \left( I - B\, Q_{uu}^{-1} B^\top V' \right) A ,$$
#
# and $V'$ is a factor: the rank cannot grow, whether or not the controls are optimised. Only
# $V = Q_{xx} - \dots$ was used, so that the same formula serves with $Q_{ux} = 0$.
#
# With $V' = v' g' g'^\top$ and $\beta = B^\top g'$ this is $V = v\, g g^\top$, $g = A^\top g'$,
#
# $$v = v' - v'^2\, \beta^\top (R + v' \beta \beta^\top)^{-1} \beta
# = \frac{v'}{1 + v'\, \beta^\top R^{-1} \beta}$$
#
# by Sherman & Morrison (for invertible $R$): optimising the control only shrinks the scalar.
#
# *Gauss-Newton.* Dropping $p \cdot f_{xx}$, $p \cdot f_{ux}$ and $p \cdot f_{uu}$ leaves the same
# formulas with $A = f_x$, $B = f_u$ of any layer.
#
# *Where it fails.* $Q_{xx}$ gains $\ell_{xx}$ (a tracking term: its rank) or $p \cdot f_{xx}$
# (curved layers). If $f_{ux} \ne 0$, then $Q_{ux} = B^\top V' A + p \cdot f_{ux}$ and
# $Q_{xu} Q_{uu}^{-1} Q_{ux}$ may have any rank up to $\min(n, m)$. For $f = x (W + a b)$ with
# $a$ a column and $b$ a row, $p \cdot f_{ux}$ has the blocks $(b p^\top) I$ and $a p$: rank $n$
# wherever $b p^\top \ne 0$. $\blacksquare$

# %%
import sympy as sp

v, R1, R2, b1, b2 = sp.symbols("v R1 R2 b1 b2", positive=True)
R, beta = sp.diag(R1, R2), sp.Matrix([b1, b2])
schur = v - (v**2 * beta.T * (R + v * beta * beta.T).inv() * beta)[0]
assert sp.simplify(schur - v / (1 + v * (beta.T * R.inv() * beta)[0])) == 0

# %% [markdown]
# ## Numerical check
#
# Threshold, fixed before measuring: the numerical rank ($10^{-10}$ of the largest singular value)
# is one in every layer and for every example, and $V_t$ equals $v_t\, g_t g_t^\top$ of the scalar
# recursion to $10^{-10}$.

# %%
import torch

from deltacontrol.theory import (
    ControlProblem,
    LinearDynamics,
    LowRankDynamics,
    QuadraticCost,
    ResidualNetwork,
)
from deltacontrol.theory.solvers.quadratic_model import QuadraticModel, sweep

generator = torch.Generator().manual_seed(0)
depth, width, size, batch = 6, 5, 2, 4


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


g_L = normal(width)
starts = normal(batch, width)


def one_logit(m, tracking=0.0, weight=1.0):
    return QuadraticCost(
        Q=[tracking * torch.eye(width, dtype=torch.float64)] * depth,
        R=[weight * torch.eye(m, dtype=torch.float64)] * depth,
        Qf=torch.outer(g_L, g_L),
        qf=-g_L,
    )


def value_hessians(dynamics, cost, second_order=True):
    problem = ControlProblem(dynamics, cost, starts)
    u = tuple(0.1 * normal(batch, m) for m in dynamics.control_sizes)
    model = QuadraticModel.of(problem, u, problem.evaluate(u), second_order=second_order)
    return sweep(model).V


def rank(V):
    values = torch.linalg.svdvals(V)
    return int((values > 1e-10 * values[:, :1]).sum(-1).max())


linear = LinearDynamics(A=normal(depth, width, width) / 2, B=normal(depth, width, size))
Vs = value_hessians(linear, one_logit(size))
assert [rank(V) for V in Vs] == [1] * (depth + 1)

# The objective is an average over the batch: V and R carry the factor 1/batch, v does not.
scalar, g = 1.0, g_L
for t in reversed(range(depth)):
    beta = linear.B[t].T @ g
    scalar = scalar / (1 + scalar * float(beta @ beta))
    g = linear.A[t].T @ g
    expected = scalar * torch.outer(g, g) / batch
    assert (Vs[t] - expected).norm() <= 1e-10 * expected.norm() * batch
print("ranks through linear layers:", [rank(V) for V in Vs])

network = ResidualNetwork.random(depth, width, 7, size, seed=2)
gauss_newton = [rank(V) for V in value_hessians(network, one_logit(size), second_order=False)]
print("ranks through tanh layers, Gauss-Newton:", gauss_newton)
assert gauss_newton == [1] * (depth + 1)

# %% [markdown]
# ## What breaks it (negative control)
#
# Each assumption in turn. The control that multiplies the state is the instructive one: linear
# layers, state-free cost, and yet full rank.

# %%
lora = LowRankDynamics(list(normal(depth, width, width) / 2), rank=1)
broken = {
    "tracking cost": value_hessians(linear, one_logit(size, tracking=0.1)),
    "tanh layers": value_hessians(network, one_logit(size, weight=10.0)),
    "control times state": value_hessians(lora, one_logit(2 * width, weight=100.0)),
}
for name, Vs in broken.items():
    print(f"{name}: ranks", [rank(V) for V in Vs])
    assert rank(Vs[-1]) == 1 and rank(Vs[0]) > 1
# Without weight the tracking cost does no harm.
assert [rank(V) for V in value_hessians(linear, one_logit(size, tracking=0.0))] == [1] * (depth + 1)
no_second_order = value_hessians(lora, one_logit(2 * width, weight=100.0), second_order=False)
assert [rank(V) for V in no_second_order] == [1] * (depth + 1)

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for line, (name, Vs) in zip((6, 3.5, 1), broken.items(), strict=True):  # the three coincide
    ax.plot([rank(V) for V in Vs], lw=line, label=name)
ax.plot([1] * (depth + 1), "k--", label="one logit, linear layers")
ax.set_xlabel("layer")
ax.set_ylabel("rank of the value function's Hessian")
ax.legend()
