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
# # 22. Bang-bang controls, and what binary controls lose
#
# ## Statement
#
# Controls in a box $|u_{t,i}| \le c$, no running cost, $d$ outputs (examples times width), $M$
# controls in all.
#
# **A.** Where the Hamiltonian is linear in the control, an optimal $u_{t,i}$ is at a bound wherever
# its switching function $\partial H_t / \partial u_{t,i}$ is not zero.
#
# **B.** If the outputs are affine in the controls, $x_L = \xi + \sum_j u_j b_j$, and $\Phi$ is
# convex, then among the optimal controls there are some with at most $d$ entries inside the box.
# The fraction at the bounds is at least $1 - d/M$ and tends to one with depth. If the optimal
# output is on the boundary of the reachable set, *every* optimal control has its entries inside
# only where $\langle \nabla \Phi, b_j \rangle = 0$.
#
# **C.** Then, if $\nabla^2 \Phi \preceq \beta I$, some binary controls lose at most
# $\frac{\beta}{2} c^2 \sum_{j \in I} \|b_j\|^2$ of the optimum, with $I$ the at most $d$ entries
# inside. With columns of norm $O(M^{-1/2})$, as in residual networks whose layers are scaled by
# $1/\sqrt L$, that is $O(d/M)$: it vanishes with depth.
#
# In a real network none of these premises holds exactly; the claim measures what remains, by parts:
# A by the switching function at the solver's optimum; the share $1 - d/M$ of B; whether at least
# half of the controls of deep networks are at a bound; and the loss of C.

# %% [markdown]
# ## Assumptions
#
# - A: $f_t$ and $\ell_t$ affine in $u$, or $\ell_t$ absent.
# - B, C: outputs affine in all controls together. In a tanh network that is the linearisation;
#   second derivatives in $u$ add curvature of either sign, which can hold a control inside the box.
# - The solver finds *an* optimal control. Where the target can be reached, optimal controls form a
#   polytope and a second-order method ends in its interior, far from the extreme points of B.

# %% [markdown]
# ## Derivation
#
# **A.** $H_t = \mathrm{const} + \langle \partial_u H_t, u \rangle$ in $u$, and stationarity in a
# box (`deltacontrol.theory.control.problem`) says $-\nabla_u H_t \in N_U(u_t)$: where
# $\partial H_t / \partial u_{t,i} > 0$ the control is at $-c$, where it is negative at $c$.
# $\blacksquare$
#
# **B.** Let $y^*$ be an optimal output. The controls that reach it are the polytope
# $\{u \in [-c, c]^M : \sum_j u_j b_j = y^* - \xi\}$, not empty and bounded, so it has an extreme
# point. At an extreme point the columns $b_j$ of the entries strictly inside are linearly
# independent (otherwise one could move both ways along their dependence), and there are at most
# $d$ of those. The last sentence is A for $H = \langle \nabla \Phi, x_L \rangle$. $\blacksquare$
#
# **C.** Take the extreme point of B and round its entries $j \in I$, $|I| \le d$, to $\pm c$
# independently at random with mean $u_j$. The output's error $e = \sum_I (\pm c - u_j) b_j$ has
# mean zero and mean square $\sum_I (c^2 - u_j^2) \|b_j\|^2 \le c^2 \sum_I \|b_j\|^2$, and some
# rounding is no worse than the mean.
# $\Phi(y^* + e) - \Phi(y^*) \le \langle \nabla \Phi, e \rangle + \frac{\beta}{2} \|e\|^2$, and
# $\langle \nabla \Phi, b_j \rangle = 0$ for $j \in I$, because an optimal control inside the box
# has no slope: the first order vanishes. $\blacksquare$
#
# Sign-rounding is not that rounding: it ignores what the other entries do. From an interior optimum
# it errs by $O(1)$, and a search over single flips must repair it.

# %%
import sympy as sp

c, u, beta, n2 = sp.symbols("c u beta n2", positive=True)
probability = (c + u) / (2 * c)  # of rounding u up to c
mean = probability * (c - u) + (1 - probability) * (-c - u)
square = probability * (c - u) ** 2 + (1 - probability) * (-c - u) ** 2
assert sp.simplify(mean) == 0
assert sp.simplify(square - (c**2 - u**2)) == 0

# %% [markdown]
# ## Numerical check
#
# An affine problem, where B and C are theorems. Thresholds, fixed before measuring: at the extreme
# point at most $d$ entries are inside; the best rounding of them loses at most
# $\frac12 c^2 \sum_I \|b_j\|^2$.

# %%
import itertools

import numpy as np
import torch
from scipy import optimize

from deltacontrol.theory import Box, ControlProblem, LinearDynamics, QuadraticCost, Status, solve
from deltacontrol.theory.solvers.ilqr import DDP

generator = torch.Generator().manual_seed(0)
bound, width, size = 0.5, 3, 2


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def affine_problem(depth, reach, weight=0.0):
    """``Phi = 1/2 ||x_L - y||^2`` of x_L = x_0 + sum B_t u_t, columns of norm about 1/sqrt(L)."""
    eye = torch.eye(width, dtype=torch.float64)
    dynamics = LinearDynamics(A=[eye] * depth, B=normal(depth, width, size) / depth**0.5)
    target = reach * normal(width)
    cost = QuadraticCost(
        Q=[0 * eye] * depth,
        R=[weight * torch.eye(size, dtype=torch.float64)] * depth,
        Qf=eye,
        qf=-target,
    )
    return ControlProblem(
        dynamics, cost, torch.zeros(width, dtype=torch.float64), Box(-bound, bound)
    )


def columns(problem):
    return torch.cat(list(problem.dynamics.B), 1)


def optimum(problem):
    solution = solve(problem, DDP(), problem.zero_controls(), max_steps=200, tol=1e-9)
    assert solution.status is Status.CONVERGED, solution.message
    return torch.cat(solution.controls), solution


def inside(u):
    return int((u.abs() < bound * (1 - 1e-7)).sum())


def extreme_point(b, output):
    """A vertex of the controls that reach the output, by the simplex method."""
    found = optimize.linprog(
        np.random.default_rng(0).normal(size=b.shape[1]),
        A_eq=b.numpy(),
        b_eq=output.numpy(),
        bounds=(-bound, bound),
        method="highs-ds",
    )
    assert found.success
    return torch.from_numpy(found.x)


for reach, kind in ((0.3, "target reached"), (30.0, "target out of reach")):
    for depth in (4, 16, 64):
        problem = affine_problem(depth, reach)
        b = columns(problem)
        u, solution = optimum(problem)
        vertex = extreme_point(b, b @ u) if kind == "target reached" else u
        free = [j for j in range(len(vertex)) if abs(vertex[j]) < bound * (1 - 1e-7)]
        assert len(free) <= width
        error = b @ vertex - problem.cost.qf.neg()
        best = float("inf")
        for signs in itertools.product((-bound, bound), repeat=len(free)):
            rounded = vertex.clone()
            rounded[free] = torch.tensor(signs, dtype=torch.float64)
            miss = b @ rounded + problem.cost.qf
            best = min(best, float(0.5 * miss @ miss - 0.5 * error @ error))
        allowed = 0.5 * bound**2 * float(b[:, free].square().sum())
        print(f"{kind}, {depth} layers: inside {inside(u)} as found, {len(free)} at the vertex; "
              f"binary controls lose {best:.1e} of at most {allowed:.1e}")  # fmt: skip
        assert best <= allowed + 1e-9

# %% [markdown]
# ## What breaks it (negative control)
#
# A running cost that is strictly convex in the control makes the optimum unique and puts it inside
# the box; and already without one, a solver that ends inside the polytope of optimal controls shows
# no control at its bounds, although bang-bang ones exist. The board's controls have weight decay 1;
# with weight decay $10^{-9}$ the same computation must pass. That of B passes where the optimum is
# moved to an extreme point of the linearised problem, for targets within reach: there the share is
# $1 - d/M$.

# %%
u, solution = optimum(affine_problem(16, 0.3, weight=1.0))
print(f"weight decay: {inside(u)} of {len(u)} controls inside the box")
assert inside(u) == len(u) > width
u, solution = optimum(affine_problem(16, 0.3))
print(f"target reached, as the solver finds it: {inside(u)} of {len(u)} inside")
assert inside(u) > width

# %%
import matplotlib.pyplot as plt

cases = {
    "target out of reach": affine_problem(16, 30.0),
    "target reached": affine_problem(16, 0.3),
    "with weight decay": affine_problem(16, 0.3, weight=1.0),
}
figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for name, problem in cases.items():
    ax.plot((optimum(problem)[0] / bound).sort().values, "o-", ms=3, label=name)
ax.set_xlabel("control, in order of size")
ax.set_ylabel("control over its bound")
ax.legend()
