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
# # 20. Perturbations in depth: a Grönwall bound with measured constants
#
# ## Statement
#
# Let $x_{t+1} = f_t(x_t)$, $t = 0, \dots, L-1$, and let $y_0, \dots, y_L$ be *any* other sequence
# of states, with defects $d_t = y_{t+1} - f_t(y_t)$. With
#
# $$\mathrm{Lip}_t = \sup_{0 \le s \le 1} \big\| Df_t(x_t + s (y_t - x_t)) \big\|_2 ,$$
#
# $$\boxed{\; \|y_L - x_L\| \;\le\; \Big(\prod_t \mathrm{Lip}_t\Big) \|y_0 - x_0\| +
# \sum_t \Big(\prod_{s>t} \mathrm{Lip}_s\Big) \|d_t\| .\;}$$
#
# Two uses. *A delta*: $f_t$ is the frozen layer, $y$ the states with the delta, so that
# $d_t = f_t(y_t, u_t) - f_t(y_t)$ is what the delta adds to its own layer, at the states where it
# works. *A discretisation of depth*: $y$ are the states of a finer discretisation of
# $x' = f_t(x) - x$, and $d_t$ is the local error of one Euler step of size 1.
#
# **Corollary (why the slack grows with depth).** The bound is attained when every layer amplifies
# exactly the direction in which the deviation arrives. If the deviation arrives in a direction that
# is uniformly random to each layer, a linear layer multiplies its mean square by
# $\|A_t\|_F^2 / n$ instead, and the bound exceeds the root mean square deviation by
# $\prod_t \|A_t\|_2 \sqrt n / \|A_t\|_F$, exponentially in depth.

# %% [markdown]
# ## Assumptions
#
# - $f_t$ continuously differentiable on the segment from $x_t$ to $y_t$. Nothing else: no constant
#   on the whole space is needed, and dot-product self-attention has none (Kim, Papamakarios & Mnih,
#   ICML 2021).
# - Norms are Euclidean over all entries of one example, tokens and width together (the Frobenius
#   norm of the matrix of hidden states). Examples of a batch do not interact, hence one bound each.
# - *What is measured, not proven*: the supremum is replaced by the largest of a few points of the
#   segment, and $\|\cdot\|_2$ by Lanczos iterations, which approach it from below. Both errors make
#   the measured bound too small, so a violation by a hair would not refute the statement. Where
#   $Df_t$ has a Lipschitz constant $M_t$, the first is closed by a remainder: between $K$
#   equidistant points, $\mathrm{Lip}_t \le \max_k \|Df_t(z_k)\|_2 + M_t\,
#   \|y_t - x_t\| / (2(K-1))$. It is used below where $M_t$ is known.

# %% [markdown]
# ## Derivation
#
# Put $e_t = y_t - x_t$. By the definition of the defect,
#
# $$e_{t+1} = d_t + f_t(y_t) - f_t(x_t) = d_t + \int_0^1 Df_t(x_t + s e_t)\, e_t \, ds ,$$
#
# and the norm of the integral is at most $\sup_s \|Df_t(x_t + s e_t)\|_2 \|e_t\|$ (the mean value
# inequality; for vectors there is no mean value *equation*). So $\|e_{t+1}\| \le \|d_t\| +
# \mathrm{Lip}_t \|e_t\|$. Unrolling from $\|e_0\|$ gives the bound by induction. $\blacksquare$
#
# *Which point the defect is taken at matters.* With $d_t = y_{t+1} - f_t(y_t)$ the propagated part
# is a difference of the **frozen** layer, whose constant is needed along the segment only. With the
# defect at $x_t$, $f_t(x_t, u_t) - f_t(x_t)$, the layer **with** the delta would propagate and its
# constant would be needed.
#
# *Corollary.* Let $A$ be $n \times n$ and $v$ uniform on the unit sphere. Then $E\, v v^\top = I/n$
# and $E \|A v\|^2 = \mathrm{tr}(A^\top A)/n = \|A\|_F^2/n$. If each arriving direction is uniform
# given the past, the mean squares multiply, while the bound multiplies by $\|A_t\|_2^2$.
# $\blacksquare$

# %%
import sympy as sp

L = 4
lip = sp.symbols(f"l0:{L}", positive=True)
defects = sp.symbols(f"d0:{L}", positive=True)
initial = sp.symbols("e0", positive=True)
bound = initial
for t in range(L):
    bound = defects[t] + lip[t] * bound
closed = sp.prod(lip) * initial + sum(sp.prod(lip[t + 1 :]) * defects[t] for t in range(L))
assert sp.expand(bound - closed) == 0

# %% [markdown]
# ## Numerical check
#
# **Residual layers with known constants.** $f_t(x) = x + W_2 \tanh(W_1 x + B u)$ has
# $|\tanh''| \le 4/(3\sqrt3)$, hence $\|Df_t(a) - Df_t(b)\|_2 \le \frac{4}{3\sqrt 3} \|W_2\|_2
# \|W_1\|_2^2 \|a - b\|$, so that sampling can be closed rigorously. Controls of random size perturb
# a network of 6 layers at 200 starts; requirement: ratio $\le 1$ for each, with the rigorous
# constants *and* with the sampled ones.

# %%
import math

import torch

from deltacontrol.theory import (
    Claim,
    Evidence,
    LinearDynamics,
    ResidualNetwork,
    Threshold,
    Verdict,
    judge,
)
from deltacontrol.theory.depth.perturbation import example_norms, growth_bound, segment_norms

F64 = torch.float64
BATCH, DEPTH, WIDTH = 200, 6, 4
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=F64)


network = ResidualNetwork.random(DEPTH, width=WIDTH, hidden=8, control_size=3, seed=1)
network = ResidualNetwork(network.W1, 3.0 * network.W2, network.B)
zero = torch.zeros(3, dtype=F64)


def rollout(x0, controls):
    states = [x0]
    for t, u in enumerate(controls):
        states.append(network.step(t, states[-1], u))
    return states


x0 = normal(BATCH, WIDTH)
x = rollout(x0, [zero] * DEPTH)
size = torch.logspace(-3, 1, BATCH, dtype=F64)[:, None]
y = rollout(x0, [size * normal(BATCH, 3) for _ in range(DEPTH)])

K = 9
norms = [
    segment_norms(network, t, x[t], y[t], zero, num_points=K, num_iterations=WIDTH)
    for t in range(DEPTH)
]
sampled = [found.value.amax(0) for found in norms]
defects = [example_norms(y[t + 1] - network.step(t, y[t], zero)) for t in range(DEPTH)]
actual = torch.stack([example_norms(b - a) for a, b in zip(x, y, strict=True)])


def remainder(t):
    spectral = [torch.linalg.matrix_norm(M[t], ord=2) for M in (network.W1, network.W2)]
    change = 4 / (3 * math.sqrt(3)) * spectral[1] * spectral[0] ** 2
    return change * actual[t] / (2 * (K - 1))


rigorous = [sampled[t] + remainder(t) for t in range(DEPTH)]
fine = [
    segment_norms(network, t, x[t], y[t], zero, num_points=200, num_iterations=WIDTH).value.amax(0)
    for t in (1, DEPTH - 1)
]
for found, t in zip(fine, (1, DEPTH - 1), strict=True):
    assert bool((found <= rigorous[t]).all()), "the remainder covers what lies between the points"
    print(f"layer {t}: {K} points miss at most {float((found - sampled[t]).max()):.1e}")

initial = torch.zeros(BATCH, dtype=F64)
ratio = {
    name: float((actual[-1] / growth_bound(constants, defects, initial)[-1]).max())
    for name, constants in (("sampled", sampled), ("rigorous", rigorous))
}
slack = (growth_bound(sampled, defects, initial) / actual)[1:].median(1).values
print(ratio, "median slack by depth", [f"{s:.2f}" for s in slack])
assert ratio["rigorous"] <= ratio["sampled"] <= 1

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for name, values in (("actual", actual), ("bound", growth_bound(sampled, defects, initial))):
    ax.semilogy(range(1, DEPTH + 1), values[1:].median(1).values, "o-", label=name)
ax.set_xlabel("layer")
ax.set_ylabel("change of the state, median")
ax.legend()

# %% [markdown]
# The largest sampled norm is not at an end of the segment for some examples, so that constants from
# the two trajectories alone would not do:

# %%
inside = sum(int((found.value.argmax(0) % (K - 1) != 0).sum()) for found in norms)
print(f"{inside} of {DEPTH * BATCH} maxima lie inside the segment")
assert inside > 0

# %% [markdown]
# **The bound is sharp.** Scalars with positive factors and defects: an equality.

# %%
rates = (0.5, 3.0, 1.2)
one = torch.ones(1, 1, dtype=F64)
scalar = LinearDynamics(A=[a * one for a in rates], B=[0 * one] * 3)
xs, ys = [one], [one + 0.1]
for t in range(3):
    xs.append(scalar.step(t, xs[-1], zero[:1]))
    ys.append(scalar.step(t, ys[-1], zero[:1]) + 0.2)
constants = [segment_norms(scalar, t, xs[t], ys[t], zero[:1]).value.amax(0) for t in range(3)]
best = growth_bound(constants, [0.2 * one[0]] * 3, 0.1 * one[0])
assert float((best[-1] - example_norms(ys[-1] - xs[-1])).abs()) < 1e-14

# %% [markdown]
# **The slack of the corollary.** Gaussian linear layers, a deviation that is small and random: the
# root mean square over starts against $\prod \|A_t\|_F/\sqrt n$, and the bound against it.

# %%
n, depth, starts = 64, 8, 4000
layers = [normal(n, n) / math.sqrt(n) for _ in range(depth)]
deviation = normal(starts, n)
deviation = deviation / deviation.norm(dim=1, keepdim=True)
for A in layers:
    deviation = deviation @ A.mT
observed = float(deviation.square().sum(1).mean().sqrt())
typical = math.prod(float(A.norm()) / math.sqrt(n) for A in layers)
largest = math.prod(float(torch.linalg.matrix_norm(A, ord=2)) for A in layers)
print(f"observed {observed:.3f}, predicted {typical:.3f}, bound {largest:.1f}")
# The layers are fixed and so is only the first direction uniform; the others are nearly so, which
# makes the prediction good to a few standard errors of the products of Gaussian matrices.
assert abs(observed / typical - 1) < 0.15
assert largest / observed > 1.5**depth

# %% [markdown]
# **The real model.** The board's measurement: the blocks of MiniLM-L6; deltas trained by a few
# steps of Adam from several seeds; the change of $x_0$ that the linearised blocks amplify most, and
# that of $x_{L-1}$ for the last block, where the bound should nearly be attained; and the finer
# discretisations of depth. Part a is the inequality itself, for every change and state behind the
# first one that changes, where the bound *is* the change. The other parts ask what it is worth:
# the share of the bound that the effect of a trained delta on the last state is.

# %%
from deltacontrol.experiments.claims import scoreboard

outcome = scoreboard.stored(scoreboard.find(20))
if outcome is None:
    print("not judged yet: deltacontrol claims run 20")
else:
    for part in outcome.parts:
        print(f"{part.name} {part.title}: {part.evidence.text}, {part.verdict.text}")
    for name, found in outcome.part("a").evidence.details["changes"].items():
        change = found["relative change of the last state"]
        ratios = ", ".join(f"{ratio:.2g}" for ratio in found["by state"].values())
        print(f"{name}: last state changes by {change:.1%} at most; largest ratios {ratios}")
        if "change by halving" in found:
            print(f"    of it, since the discretisation before: {found['change by halving']:.1%}")

# %% [markdown]
# ## What breaks it (negative control)
#
# The supremum may not be replaced by a typical gain. With $\|A_t\|_F/\sqrt n$, the root mean square
# of $\|A_t v\|$ over random unit $v$, in the place of $\mathrm{Lip}_t$, the bound fails for the
# change of $x_0$ along the first right singular vector of the product of all layers. The reason is
# known beforehand: $\|P\|_2 \ge \|P\|_F/\sqrt n$ for the product $P$, with equality only where
# $P$ is a multiple of an orthogonal matrix. Random probing of a model's layers therefore gives no
# bound, however well it may estimate what a trained delta does. On the board, two other things are
# broken. For part a nothing is carried on: $\mathrm{Lip}_t = 0$ leaves the last defect alone, which
# the effect of a trained delta exceeds unless the blocks forget. For the others the spectral norms
# give way to Frobenius norms, which bound them and are larger by up to $\sqrt n$ a block.

# %%
P = torch.linalg.multi_dot([A for A in reversed(layers)])
direction = torch.linalg.svd(P).Vh[0]
amplified = float((P @ direction).norm())
measured, broken = amplified / largest, amplified / typical
print(f"worst case over bound: {measured:.2g} with the norms, {broken:.2g} with typical gains")
assert measured <= 1 < broken
harmless = float((P @ torch.linalg.svd(P).Vh[-1]).norm()) / typical  # hardly amplified at all

# %%
claim = Claim(
    id=20,
    name="depth-perturbation",
    title="A delta's effect is bounded in depth (Grönwall)",
    statement="the discrete Grönwall inequality with Lipschitz constants on the segments",
    source="Hairer, Nørsett & Wanner 1993, Section I.10, in discrete form",
    notebook="proofs_notebooks/20_depth_perturbation.py",
    threshold=Threshold("<=", 1.0, "largest ratio of the change of the last state to its bound"),
    predict=lambda: {"largest_ratio": 1.0},
    measure=lambda prediction: Evidence(max(measured, ratio["sampled"])),
    negative_control=lambda prediction: Evidence(broken),
    passing_control=lambda prediction: Evidence(harmless),
)
judged = judge(claim).part()
print(judged.verdict.text, "-", judged.reason)
assert judged.verdict is Verdict.HOLDS
