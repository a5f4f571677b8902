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
# # 19. The least control energy bounds the norm of a trained delta
#
# ## Statement
#
# Let the linearised model change its outputs by $y = C u$, $u$ all controls together (measured from
# their start) and $C = [C_0, \dots, C_{L-1}]$, and let $W = C R^{-1} C^\top$ be the Gramian for the
# energy $E(u) = \frac12 u^\top R u$, $R \succ 0$.
#
# **A.** Every control, however it was found, obeys
#
# $$\boxed{\; E(u) \;\ge\; \tfrac12\, y^\top W^+ y, \qquad y = C u \;}$$
#
# with equality exactly for $u = R^{-1} C^\top W^+ y$.
#
# **B.** With $R = I$: gradient descent from $u = 0$ on any loss of $y$, with any step sizes,
# momentum and (coupled or decoupled) weight decay, attains the bound at every iteration. Adam does
# not: its steps leave the range of $C^\top$, and the surplus $E(u) - \frac12 y^\top W^+ y$ is the
# energy of its part in the kernel of $C$, which moves no output.
#
# **C.** If only the controls of a part $S$ may move, $W_S \preceq W$ and the bound is larger. A
# control that uses more than $S$ may lie below it.
#
# **D.** For the true, nonlinear model the bound holds up to the remainder: with
# $r = F(u) - F(0) - C u$, $E(u) \ge \frac12 (y - r)^\top W^+ (y - r)$, $y$ the *true* change.
# Where the outputs are more than linear in the control, as LoRA's are in $(A, B)$ together, the
# ratio of $E(u)$ to $\frac12 y^\top W^+ y$ may fall below one.

# %% [markdown]
# ## Assumptions
#
# - A: linearity; $y$ is the change that this control makes (so $y$ lies in the range of $C$).
# - B: the loss sees the control through $y$ alone, up to the weight decay; the start is $u = 0$.
# - C: the same energy on the part.

# %% [markdown]
# ## Derivation
#
# **A.** With $v = R^{1/2} u$ and $S = C R^{-1/2}$, $y = S v$ and $W = S S^\top$. Split
# $v = S^+ y + n$ with $S n = 0$; the two are orthogonal, $S^+ y$ lying in the range of $S^\top$. So
#
# $$E(u) = \tfrac12 \|v\|^2 = \tfrac12 \|S^+ y\|^2 + \tfrac12 \|n\|^2, \qquad
# \|S^+ y\|^2 = y^\top (S S^\top)^+ y = y^\top W^+ y. \qquad \blacksquare$$
#
# **B.** The gradient of $\phi(C u)$ by $u$ is $C^\top \nabla\phi$, in the range of $C^\top$. Steps
# along it, sums of such steps, and shrinking keep $u$ in that range, which is orthogonal to the
# kernel: $n = 0$. Adam divides entry by entry and leaves the range. $\blacksquare$
#
# **C.** $W - W_S$ is the Gramian of the other controls, hence $\succeq 0$; on the range of $W_S$,
# $W_S \preceq W$ gives $y^\top W_S^+ y \ge y^\top W^+ y$ (for a $y$ that is reachable by $S$, both
# are least energies, one over more controls). $\blacksquare$
#
# **D.** $C u = y - r$ and A. $\blacksquare$

# %%
import sympy as sp

# One output, two controls: the bound is the distance of a line from the origin.
a, b, y = sp.symbols("a b y", real=True, nonzero=True)
u = sp.symbols("u", real=True)
other = (y - a * u) / b  # every control that reaches y
energy = (u**2 + other**2) / 2
(best,) = sp.solve(sp.diff(energy, u), u)
assert sp.simplify(energy.subs(u, best) - y**2 / (2 * (a**2 + b**2))) == 0
assert sp.simplify(best - a * y / (a**2 + b**2)) == 0
surplus = sp.factor(sp.simplify(energy - y**2 / (2 * (a**2 + b**2))))
assert sp.simplify(surplus - (u - best) ** 2 * (a**2 + b**2) / (2 * b**2)) == 0

# %% [markdown]
# ## Numerical check
#
# A residual network with weighted and unweighted energies: random controls and trained ones.
# Threshold: ratio at least $1 - 10^{-9}$, in float64. The board measures the linear model of a real
# network (part a), what remains of A in the real model, where D says that it may fail (a part for
# each delta, over seeds), and B's equality (the last part).

# %%
import torch

from deltacontrol.theory.control.costs import CrossEntropyCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.systems import LowRankDynamics, ResidualNetwork
from deltacontrol.theory.linear.linearisation import Linearisation
from deltacontrol.theory.linear.reachability import Reachability

F64 = torch.float64
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=F64)


L, width, batch = 6, 3, 4
network = ResidualNetwork.random(L, width=width, hidden=8, control_size=5, seed=3)
labels = torch.tensor([0, 1, 2, 0])
problem = ControlProblem(network, CrossEntropyCost(labels), normal(batch, width))
lin = Linearisation.of(problem, problem.zero_controls(), keep=True)
outputs = Reachability(lin).output_map()
start = lin.states[-1]


def ratio(controls, change, part=None):
    spent = 0.5 * sum(float(c.square().sum()) for c in controls)
    return spent / outputs.minimum_energy(change, part).energy


def trained(make, steps=60):
    """Train the linearised model; the ratio after every step."""
    controls = [torch.zeros(5, dtype=F64).requires_grad_() for _ in range(L)]
    optimiser = make(controls)
    ratios = []
    for _ in range(steps):
        change = lin.tangent(tuple(c.detach() for c in controls))[-1]
        logits = (start + change).requires_grad_()
        (slope,) = torch.autograd.grad(problem.cost.terminal(logits), logits)
        for c, gradient in zip(controls, lin.adjoint(slope)[1], strict=True):
            c.grad = gradient
        optimiser.step()
        now = tuple(c.detach() for c in controls)
        ratios.append(ratio(now, lin.tangent(now)[-1]))
    return now, ratios


random_controls = tuple(normal(5) for _ in range(L))
makers = {
    "gradient descent": lambda c: torch.optim.SGD(c, lr=0.5),
    "momentum and decay": lambda c: torch.optim.SGD(c, lr=0.5, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda c: torch.optim.AdamW(c, lr=0.05),
}
found = {name: trained(make) for name, make in makers.items()}
for name, (_, ratios) in found.items():
    print(f"{name}: ratio from {min(ratios):.12f} to {max(ratios):.3f}")
    assert min(ratios) >= 1 - 1e-9
for name in ("gradient descent", "momentum and decay"):
    assert max(found[name][1]) <= 1 + 1e-9
assert min(found["AdamW"][1]) > 1.01
assert ratio(random_controls, lin.tangent(random_controls)[-1]) > 1.01

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for (name, (_, ratios)), line in zip(found.items(), ("-", "--", "-"), strict=True):
    ax.plot(range(1, len(ratios) + 1), ratios, line, label=name)
ax.set_xlabel("step")
ax.set_ylabel("energy spent over the least")
ax.legend()

# %% [markdown]
# The surplus of Adam is the energy of the part that moves no output.

# %%
controls = found["AdamW"][0]
change = lin.tangent(controls)[-1]
least = outputs.minimum_energy(change)
idle = tuple(c - m for c, m in zip(controls, least.control, strict=True))
assert float(lin.tangent(idle)[-1].norm()) <= 1e-12
surplus = 0.5 * sum(float(c.square().sum()) for c in controls) - least.energy
assert abs(surplus - 0.5 * sum(float(c.square().sum()) for c in idle)) <= 1e-12 * surplus

# %% [markdown]
# Weighted energy: $R_t$ falling with depth, controls at random.

# %%
access = [2.0 ** (t - 3) for t in range(L)]
weighted = Reachability(lin, access=access).output_map()
for _ in range(20):
    sample = tuple(normal(5) for _ in range(L))
    spent = 0.5 * sum(float(c.square().sum()) / r for c, r in zip(sample, access, strict=True))
    assert spent >= weighted.minimum_energy(lin.tangent(sample)[-1]).energy * (1 - 1e-9)

# %% [markdown]
# D, the true model: the ratio in a bilinear network (as LoRA is), with both factors free. At the
# start $u_0$ the outputs are linear to first order; along the least-energy direction the ratio
# tends to one with the size of the control, from below or above.

# %%
weights = [normal(3, 3) / 2 for _ in range(2)]
bilinear = ControlProblem(
    LowRankDynamics(weights, rank=2), CrossEntropyCost(torch.tensor([0, 1])), normal(2, 3)
)
base = tuple(0.3 * normal(m) for m in bilinear.dynamics.control_sizes)
bilinear_lin = Linearisation.of(bilinear, base)
bilinear_map = Reachability(bilinear_lin).output_map()
direction = bilinear_map.minimum_energy(normal(2, 3)).control
ratios = []
for size in (1.0, 0.1, 0.01, -0.01, -0.1, -1.0):
    moved = tuple(s + size * d for s, d in zip(base, direction, strict=True))
    true_change = bilinear.rollout(moved)[-1] - bilinear_lin.states[-1]
    spent = 0.5 * sum(float((size * d).square().sum()) for d in direction)
    ratios.append(spent / bilinear_map.minimum_energy(true_change).energy)
print("true model, ratio by size of the step:", [f"{r:.3f}" for r in ratios])
assert min(ratios) < 1, "the bound is not one for the nonlinear model"
assert max(abs(ratios[2] - 1), abs(ratios[3] - 1)) < 0.1
assert abs(ratios[2] - 1) < abs(ratios[1] - 1) / 5

# %% [markdown]
# ## What breaks it (negative control)
#
# The Gramian of a subset of the controls, held against controls that use all of them: with any
# layer left out the "bound" of a control trained by gradient descent exceeds what was spent. It
# does no harm to leave out a layer that was not trained: by C the bound is then that of the others.
# The board leaves out the last block of the linear model, and the head of the real one: AdamW
# spends so much more than the least energy that a stage of little weight would not show.

# %%
controls = found["gradient descent"][0]
change = lin.tangent(controls)[-1]
broken = [
    ratio(controls, change, {s: slice(None) for s in range(L) if s != left_out})
    for left_out in range(L)
]
print("ratio without one layer:", [f"{r:.3f}" for r in broken])
assert max(broken) < 1 - 1e-3

part = {s: slice(None) for s in range(1, L)}
idle = outputs.minimum_energy(change, part).control  # the first layer is not used
assert ratio(idle, lin.tangent(idle)[-1], part) >= 1 - 1e-9

# %% [markdown]
# A Gramian that is too large, by contrast, such as $2W$, still gives a valid bound, only a weaker
# one: the claim is one-sided.

# %%
assert ratio(controls, change) * 2 >= 1 - 1e-9
