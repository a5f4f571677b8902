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
# # 1. The gradient of the objective along the costates
#
# ## Statement
#
# Let $x_{t+1} = f_t(x_t, u_t)$, $t = 0, \dots, L-1$, with $x_0$ given, and
#
# $$J(u) = \Phi(x_L) + \sum_{t=0}^{L-1} \ell_t(x_t, u_t), \qquad
# H_t(x, u, p) = \ell_t(x, u) + \langle p, f_t(x, u) \rangle .$$
#
# Define the costates backwards by $p_L = \nabla\Phi(x_L)$ and
# $p_t = \nabla_x H_t(x_t, u_t, p_{t+1})$. Then
#
# $$\boxed{\;\nabla_{u_t} J(u) = \nabla_u H_t(x_t, u_t, p_{t+1})\;} \qquad t = 0, \dots, L-1 .$$
#
# Hence $\nabla J = 0$ if and only if $\nabla_u H_t = 0$ at every step, and one backward sweep gives
# the whole gradient at the memory of the states.
# This is standard; see Bryson & Ho, *Applied Optimal Control* (1975), section 2.2.

# %% [markdown]
# ## Assumptions
#
# 1. $f_t$, $\ell_t$ and $\Phi$ are differentiable at the points of the trajectory.
# 2. The states in the formula are those of *this* control: $x_{t+1} = f_t(x_t, u_t)$ exactly.
# 3. Evaluating $f_t$ twice gives the same value twice (no dropout).
#
# No convexity is used, nor a shape of the state: it may change from step to step.

# %% [markdown]
# ## Derivation
#
# Let $V_t(x)$ be the cost to go from state $x$ at step $t$ under the fixed controls
# $u_t, \dots, u_{L-1}$:
#
# $$V_L(x) = \Phi(x), \qquad V_t(x) = \ell_t(x, u_t) + V_{t+1}(f_t(x, u_t)) .$$
#
# *Step 1: $p_t = \nabla V_t(x_t)$.* True for $t = L$ by definition. If it is true for $t+1$, the
# chain rule gives
#
# $$\nabla V_t(x_t) = \nabla_x \ell_t + (\partial_x f_t)^\top \nabla V_{t+1}(x_{t+1})
# = \nabla_x \ell_t + (\partial_x f_t)^\top p_{t+1} = \nabla_x H_t(x_t, u_t, p_{t+1}) = p_t .$$
#
# *Step 2.* A change of $u_t$ alone leaves $x_0, \dots, x_t$ and the costs before $t$ as they are,
# so
#
# $$\nabla_{u_t} J = \nabla_{u_t} \bigl[ \ell_t(x_t, u_t) + V_{t+1}(f_t(x_t, u_t)) \bigr]
# = \nabla_u \ell_t + (\partial_u f_t)^\top p_{t+1} = \nabla_u H_t(x_t, u_t, p_{t+1}) .
# \qquad\blacksquare$$
#
# The same computation is the stationarity of the Lagrangian $\mathcal L = J + \sum_t \langle
# p_{t+1}, f_t(x_t, u_t) - x_{t+1} \rangle$ in $x_1, \dots, x_L$: the costates are its multipliers.
#
# The derivation as algebra, for two layers $x + w \tanh(a x + u)$ with all symbols free:

# %%
import sympy as sp

x0, target, decay = sp.symbols("x0 y lambda", real=True)
a, w, u = (sp.symbols(f"{name}0 {name}1", real=True) for name in "awu")


def layer(t, x, control):
    return x + w[t] * sp.tanh(a[t] * x + control)


def hamiltonian(t, x, control, p):
    return decay / 2 * control**2 + p * layer(t, x, control)


x1 = layer(0, x0, u[0])
x2 = layer(1, x1, u[1])
J = (x2 - target) ** 2 / 2 + decay / 2 * (u[0] ** 2 + u[1] ** 2)

X, P = sp.symbols("X P", real=True)
p2 = x2 - target
p1 = sp.diff(hamiltonian(1, X, u[1], P), X).subs({X: x1, P: p2}, simultaneous=True)
gradient = [
    sp.diff(hamiltonian(0, x0, u[0], P), u[0]).subs(P, p1),
    sp.diff(hamiltonian(1, X, u[1], P), u[1]).subs({X: x1, P: p2}, simultaneous=True),
]
for t in range(2):
    assert sp.simplify(sp.diff(J, u[t]) - gradient[t]) == 0

# %% [markdown]
# ## Numerical check
#
# The threshold, fixed before measuring: in float64 the relative difference between
# $\nabla_u H_t$ by costates and automatic differentiation through the whole rollout is at most
# $10^{-12}$. The systems: residual layers under squared error and under cross-entropy, a bilinear
# system as in LoRA, controls shared by the batch and one per example.

# %%
import torch

from deltacontrol.theory import (
    Claim,
    ControlProblem,
    CrossEntropyCost,
    Evidence,
    LowRankDynamics,
    ResidualNetwork,
    SquaredErrorCost,
    Threshold,
    judge,
)

generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_controls(problem, per_example=False):
    zeros = problem.zero_controls(per_example=per_example, dtype=torch.float64)
    return tuple(normal(*z.shape) for z in zeros)


def by_autograd(problem, controls):
    leaves = tuple(c.clone().requires_grad_() for c in controls)
    return torch.autograd.grad(problem.objective(leaves), leaves)


def relative_difference(one, other):
    one, other = (torch.cat([g.flatten() for g in gradient]) for gradient in (one, other))
    return float((one - other).norm() / other.norm())


network = ResidualNetwork.random(12, width=8, hidden=16, control_size=5, seed=1)
lora = LowRankDynamics([normal(8, 8) / 3 for _ in range(6)], rank=2)
batch = normal(10, 8)
problems = {
    "residual, squared error": ControlProblem(network, SquaredErrorCost(normal(10, 8), 0.1), batch),
    "residual, cross-entropy": ControlProblem(
        network, CrossEntropyCost(torch.arange(10) % 8), batch
    ),
    "low rank, squared error": ControlProblem(lora, SquaredErrorCost(normal(10, 8), 0.1), batch),
}

measured = {}
for name, problem in problems.items():
    for per_example in (False, True):
        controls = random_controls(problem, per_example)
        difference = relative_difference(problem.gradient(controls), by_autograd(problem, controls))
        measured[name, "per example" if per_example else "shared"] = difference
for key, difference in measured.items():
    print(*key, f"{difference:.1e}", sep=", ")
assert max(measured.values()) <= 1e-12

# %% [markdown]
# Central differences know nothing of either method. Their error against
# $\langle \nabla_u H, v \rangle$ is $O(h^2)$: halving $h$ divides it by four.

# %%
problem = problems["residual, squared error"]
controls = random_controls(problem)
direction = random_controls(problem)
slope = sum(
    float(g.flatten() @ v.flatten())
    for g, v in zip(problem.gradient(controls), direction, strict=True)
)


def central_difference_error(h):
    ahead, behind = (
        float(
            problem.objective(
                tuple(c + s * h * v for c, v in zip(controls, direction, strict=True))
            )
        )
        for s in (1, -1)
    )
    return abs((ahead - behind) / (2 * h) - slope)


ratio = central_difference_error(1e-2) / central_difference_error(5e-3)
print(f"error ratio {ratio:.3f}")
assert abs(ratio - 4) < 0.1

# %% [markdown]
# ## What breaks it (negative control)
#
# Each assumption, broken on purpose, must fail the threshold.
#
# - *Stale states* (assumption 2): the sweep runs along the states of slightly different controls,
#   as happens when states are cached across an update.
# - *Random layers* (assumption 3): the sweep evaluates a layer again and draws another dropout
#   mask.
# - *The wrong sign*: costates of the maximum principle ($p \to -p$) in the minimisation
#   Hamiltonian. Without a running cost this only flips the gradient; with one it gives neither
#   sign.

# %%
exact = by_autograd(problem, controls)

moved = tuple(c + 0.1 * v for c, v in zip(controls, direction, strict=True))
stale = problem.adjoint(problem.rollout(moved), controls)[1]


class DropoutNetwork(ResidualNetwork):
    """Residual layers whose output is thinned at random at each evaluation."""

    def step(self, t, x, u):
        kept = torch.rand(x.shape, generator=generator, dtype=x.dtype) < 0.9
        return x + (super().step(t, x, u) - x) * kept / 0.9


random_problem = ControlProblem(
    DropoutNetwork(network.W1, network.W2, network.B), problem.cost, batch
)
redrawn = random_problem.gradient(controls)

states = problem.rollout(controls)
costates = problem.costates(states, controls)
flipped = tuple(
    torch.func.grad(problem.hamiltonian, argnums=2)(t, x, c, -p)
    for t, (x, c, p) in enumerate(zip(states[:-1], controls, costates[1:], strict=True))
)

controls_of_the_check = {
    "stale states": relative_difference(stale, exact),
    "random layers": relative_difference(redrawn, exact),
    "wrong sign": min(
        relative_difference(flipped, exact),
        relative_difference(flipped, tuple(-g for g in exact)),
    ),
}
for name, difference in controls_of_the_check.items():
    print(name, f"{difference:.1e}", sep=", ")
assert min(controls_of_the_check.values()) > 1e-3

# Where the controls did not move, the same sweep passes: the check does not fail whatever it sees.
unmoved = relative_difference(problem.adjoint(problem.rollout(controls), controls)[1], exact)
print("states that are not stale", f"{unmoved:.1e}", sep=", ")
assert unmoved <= 1e-12

# %%
import matplotlib.pyplot as plt

shown = {", ".join(key): value for key, value in measured.items()} | controls_of_the_check
colours = ["C0"] * len(measured) + ["C3"] * len(controls_of_the_check)
figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.barh(list(shown), list(shown.values()), color=colours)
ax.axvline(1e-12, color="black", lw=0.5)
ax.set_xscale("log")
ax.set_xlim(1e-17, 10)
ax.set_xlabel("relative difference to automatic differentiation; no bar: none at all")

# %% [markdown]
# Together, as a claim that judges itself:

# %%
claim = Claim(
    id=1,
    name="costate-gradient",
    title="Gradient by costates",
    statement="dJ/du_t = grad_u H_t(x_t, u_t, p_{t+1}) along the costates",
    source="Bryson & Ho 1975, section 2.2",
    notebook="proofs_notebooks/01_costate_gradient.py",
    threshold=Threshold("<=", 1e-12, "relative difference to automatic differentiation"),
    predict=lambda: {"relative_difference": 0.0},
    measure=lambda prediction: Evidence.worst(measured),
    negative_control=lambda prediction: Evidence.worst(controls_of_the_check, least=True),
    passing_control=lambda prediction: Evidence(unmoved),
)
outcome = judge(claim)
print(outcome.text, "-", outcome.part().reason)
assert outcome.holds
