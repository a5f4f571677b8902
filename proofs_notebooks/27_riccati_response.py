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
# # 27. Riccati gains with cross terms foretell the answer of optimal controls
#
# ## Statement
#
# Let $u^*$ minimise $J(u) = \Phi(x_L) + \sum_t \ell_t(x_t, u_t)$ along $x_{t+1} = f_t(x_t, u_t)$,
# $x_0$ given, and let $u^*(x_0)$ be the minimiser as a function of the first state. With
# $A_t, B_t$ the derivatives of $f_t$, and the second derivatives $H_{xx}, H_{ux}, H_{uu}$ of the
# Hamiltonians $H_t = \ell_t + \langle p_{t+1}, f_t \rangle$ at $u^*$, the gains
#
# $$ K_t = -Q_{uu}^{-1} Q_{ux}, \qquad Q_{ux} = H_{ux} + B_t' V_{t+1} A_t, \qquad
#    Q_{uu} = H_{uu} + B_t' V_{t+1} B_t $$
#
# of the Riccati recursion from $V_L = \Phi_{xx}$ give $du_t = K_t\, dx_t$ to first order, where
# $dx_{t+1} = A_t\, dx_t + B_t\, du_t$.
#
# **A.** On the layers of a real model the relative error is at most 10 % where the first state
# changes by one per cent of its norm.
#
# **B.** The relative error falls to zero with the size of the change, at least in proportion.
#
# ## Assumptions
#
# $f_t$, $\ell_t$ and $\Phi$ are twice continuously differentiable (three times for B), $u^*$ is
# stationary, and every $Q_{uu}$ is positive definite. The claim checks the last two by numbers.
# Which radius is small enough in A is a question about a model, not a theorem.

# %% [markdown]
# ## Derivation
#
# Optimal controls satisfy $\nabla_u J(u^*(x_0), x_0) = 0$. Positive $Q_{uu}$ makes
# $\nabla^2_{uu} J$ positive definite, since
# $v' \nabla^2_{uu} J\, v = \sum_t (v_t - K_t dx_t)' Q_{uu} (v_t - K_t dx_t)$ along $dx_0 = 0$,
# $dx_{t+1} = A_t dx_t + B_t v_t$. By the implicit function theorem
# $du = -(\nabla^2_{uu} J)^{-1} \nabla^2_{ux_0} J\, dx_0$, which is the minimiser of the second
# variation of $J$ with $dx_0$ given. Second derivatives of $f_t$ enter it through the costates:
#
# $$ \delta^2 J = dx_L' \Phi_{xx} dx_L + \sum_t \begin{pmatrix} dx_t \\ du_t \end{pmatrix}'
#    \begin{pmatrix} H_{xx} & H_{xu} \\ H_{ux} & H_{uu} \end{pmatrix}
#    \begin{pmatrix} dx_t \\ du_t \end{pmatrix}. $$
#
# Dynamic programming minimises it backward in $t$ and gives $K_t$ as above. $\blacksquare$
#
# B: $u^*(x_0)$ is then twice differentiable, so that what the first order leaves is
# $O(\|dx_0\|^2)$, and over $\|du\|$, which is of first order, $O(\|dx_0\|)$.
#
# One step, one number each, by hand: $J = \frac{1}{2} (x + u x + c u)^2 + \frac{\lambda}{2} u^2$.

# %%
import sympy as sp

x, u, c, lam = sp.symbols("x u c lambda", positive=True)
f = x + u * x + c * u
J = f**2 / 2 + lam * u**2 / 2
answer = -sp.diff(J, u, x) / sp.diff(J, u, 2)  # the implicit function theorem
p, A, B = f, sp.diff(f, x), sp.diff(f, u)  # the costate of the terminal cost f²/2, whose V is 1
with_cross = -(p * sp.diff(f, u, x) + B * A) / (p * sp.diff(f, u, 2) + lam + B * B)
without = -(B * A) / (lam + B * B)
assert sp.simplify(answer - with_cross) == 0
assert sp.simplify(answer - without) != 0

# %% [markdown]
# ## Numerical check
#
# Three steps $x \mapsto \tanh(W x + (C x) \odot (G u))$ with a quadratic cost: the minimiser is
# found again for changed first states and compared with what the gains foretell.

# %%
import matplotlib.pyplot as plt
import torch

from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.dynamics import Dynamics
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.solvers import NewtonCG, solve
from deltacontrol.theory.solvers.quadratic_model import QuadraticModel, sweep

torch.set_default_dtype(torch.float64)
random = torch.Generator().manual_seed(0)
n, m, L = 4, 2, 3
W, C = (torch.randn(n, n, generator=random) / n**0.5 for _ in range(2))
G = torch.randn(n, m, generator=random)


class Bilinear(Dynamics):
    """Three equal steps in which the control multiplies the state."""

    horizon, control_sizes = L, (m,) * L

    def step(self, t, x, u):
        """tanh(W x + (C x) ⊙ (G u))."""
        return torch.tanh(W @ x + (C @ x) * (G @ u))


one = torch.eye(n)
cost = QuadraticCost.constant(L, Q=0.1 * one, R=0.1 * torch.eye(m), Qf=2 * one)
start = torch.randn(n, generator=random)
problem = ControlProblem(Bilinear(), cost, start)
best = solve(problem, NewtonCG(), max_steps=100, tol=1e-12).controls
model = QuadraticModel.of(problem, best, problem.evaluate(best), second_order=True)


def foretold(model, dx):
    """The change of all controls, by the gains."""
    found = []
    for A, B, K in zip(model.A, model.B, sweep(model).K, strict=True):
        found.append(K[0] @ dx)
        dx = A[0] @ dx + B[0] @ found[-1]
    return torch.cat(found)


direction = torch.randn(n, generator=random)
radii = [1e-1, 3e-2, 1e-2, 3e-3, 1e-3]
half = QuadraticModel(
    model.A, model.B,
    [w * torch.block_diag(torch.ones(n, n), torch.ones(m, m)) for w in model.W],
    model.terminal, model.gradient,
)  # fmt: skip
errors = {"with cross terms": [], "without": []}
for radius in radii:
    moved = ControlProblem(Bilinear(), cost, start + radius * direction)
    again = solve(moved, NewtonCG(), best, max_steps=100, tol=1e-12).controls
    true = torch.cat(again) - torch.cat(best)
    for name, of in (("with cross terms", model), ("without", half)):
        error = (foretold(of, radius * direction) - true).norm() / true.norm()
        errors[name].append(float(error))
assert errors["with cross terms"][-1] < 0.02
assert errors["with cross terms"][2] / errors["with cross terms"][-1] > 5

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for name, values in errors.items():
    ax.loglog(radii, values, "o-", label=name)
ax.set_xlabel("size of the change of the first state")
ax.set_ylabel("relative error")
ax.legend()

# %% [markdown]
# ## What breaks it (negative control)
#
# Dropping $H_{ux}$ and keeping everything else, as iLQR's gains do: the error stays where it is,
# however small the change. Where the steps are linear in state and control together, there is no
# such term, and the same gains are right.

# %%
assert errors["without"][-1] > 0.05
assert abs(errors["without"][-1] / errors["without"][-2] - 1) < 0.1

# %% [markdown]
# ## The claim

# %%
from deltacontrol.experiments.claims import scoreboard

claim = scoreboard.find(27)
for part in claim.parts:
    print(f"{part.name}: {part.title}; {part.threshold}")
