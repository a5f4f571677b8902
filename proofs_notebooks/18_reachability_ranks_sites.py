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
# # 18. What one layer, or one site, can gain: the controllability Gramian
#
# ## Statement
#
# Let $y = \sum_t C_t\, \delta u_t$ be the change of the outputs (margins, logits) in the linearised
# model, $C_t = \Phi_t B_t$ with $\Phi_t = A_{L-1} \cdots A_{t+1}$, and
# $W_t = C_t C_t^\top$ the Gramian of step $t$ (or of one site: some columns of $C_t$). Let the loss
# be $\phi(y) = g^\top y + \frac12 y^\top H y$ with $H \succeq 0$, and let a control cost
# $\frac\lambda2 \|\delta u\|^2$, $\lambda > 0$. If the step $t$ alone is controlled, then
#
# **A.** the objective $\phi(C_t \delta u) + \frac\lambda2 \|\delta u\|^2$ falls at most by
#
# $$\boxed{\; G_t = \tfrac12\, g^\top (\lambda I + W_t H)^{-1} W_t\, g \;}$$
#
# attained at $y^* = -(\lambda I + W_t H)^{-1} W_t g$. Only $W_t$ enters, never $C_t$.
#
# **B.** $G_t$ grows with $W_t$ in the order of positive semidefinite matrices: more controls never
# gain less. It falls with $\lambda$; $\lambda G_t \to \frac12 g^\top W_t g$ for $\lambda \to
# \infty$ (a gradient step), and $G_t \to \frac12 g^\top H^{-1} g$ for $\lambda \to 0$, whatever
# $t$, if $W_t$ and $H$ are invertible: without a price on the control every such layer gains alike.
#
# **C.** For LoRA, $x \mapsto x W + s\, x A B$ with $B = 0$ at the start, the columns of $A$ are
# zero, and over the draw of $A \in \mathbb R^{d \times r}$ with independent entries of mean zero
# and variance $\sigma^2$,
#
# $$\mathbb E\, W_{\mathrm{LoRA}} = s^2 r \sigma^2\; W_{\mathrm{full}},$$
#
# $W_{\mathrm{full}}$ the Gramian of the whole matrix. With the usual $A_{ij} \sim
# \mathcal U(-d^{-1/2}, d^{-1/2})$, $\sigma^2 = 1/(3d)$ and the factor is $s^2 r / (3 d)$.
#
# The claim: with the $W_t$ of a real model at the untrained delta, $G_t$ ranks what *really* tuning
# each site alone gains.

# %% [markdown]
# ## Assumptions
#
# - A, B: the linear-quadratic model itself: $\delta u$ so small that $y$ is linear in it, and $y$
#   so small that the loss is quadratic. For the real model both are approximations, and the
#   claim is that the *order* of the $G_t$ survives them.
# - C: $B = 0$, and the entries of $A$ are independent with equal variance.
# - The control is shared by all examples: $W_t$ couples them, and is the empirical tangent kernel
#   of the delta at step $t$.

# %% [markdown]
# ## Derivation
#
# **A.** The objective is strictly convex in $\delta u$ with Hessian $\lambda I + C^\top H C$ and
# slope $C^\top g$ at $0$, so that it falls by
# $\frac12 g^\top C (\lambda I + C^\top H C)^{-1} C^\top g$. From
# $C (\lambda I + C^\top H C) = (\lambda I + C C^\top H)\, C$,
#
# $$C (\lambda I + C^\top H C)^{-1} C^\top = (\lambda I + W H)^{-1} C C^\top =
# (\lambda I + W H)^{-1} W .$$
#
# The inverse exists: the eigenvalues of $W H$ are those of $H^{1/2} W H^{1/2} \succeq 0$.
# The minimiser is $\delta u^* = -(\lambda I + C^\top H C)^{-1} C^\top g$, and $y^* = C \delta u^*$.
# $\blacksquare$
#
# **B.** For an invertible $W$, $(\lambda I + W H)^{-1} W = (\lambda W^{-1} + H)^{-1}$, which grows
# with $W$ and falls with $\lambda$; a singular $W$ is a limit of invertible ones. The limits are
# immediate. $\blacksquare$
#
# **C.** For one output, let $q_\tau$ be its derivative by the site's output at token $\tau$ and
# $x_\tau$ the site's input (a row). Its derivative by $B$ is $s \sum_\tau A^\top x_\tau^\top
# q_\tau$, by $A$ it is $s \sum_\tau x_\tau^\top q_\tau B^\top = 0$. Two outputs $i, j$ hence have
#
# $$(W_{\mathrm{LoRA}})_{ij} = s^2 \sum_{\tau, \tau'} (x_\tau A A^\top x_{\tau'}^\top)\,
# (q_\tau q_{\tau'}^\top), \qquad \mathbb E\, A A^\top = r \sigma^2 I ,$$
#
# and without $A A^\top$ that is $s^2$ times the entry of $W_{\mathrm{full}}$. The variance of
# $\mathcal U(-a, a)$ is $a^2/3$. $\blacksquare$

# %%
import sympy as sp

# A in two outputs and three controls, all symbols free.
C = sp.Matrix(2, 3, sp.symbols("c:6", real=True))
g = sp.Matrix(sp.symbols("g:2", real=True))
h1, h2, h3 = sp.symbols("h1:4", real=True)
H = sp.Matrix([[h1, h2], [h2, h3]])
lam = sp.symbols("lambda", positive=True)
W = C * C.T
push_through = C * (lam * sp.eye(3) + C.T * H * C) - (lam * sp.eye(2) + W * H) * C
assert push_through.expand() == sp.zeros(2, 3)

# One output, one control: G = c^2 g^2 / (2 (lambda + c^2 h)), and its two limits.
c, k, h = sp.symbols("c k h", positive=True)
u = sp.symbols("u", real=True)
objective = k * c * u + h * (c * u) ** 2 / 2 + lam * u**2 / 2
(best,) = sp.solve(sp.diff(objective, u), u)
gain = sp.simplify(-objective.subs(u, best))
assert sp.simplify(gain - c**2 * k**2 / (2 * (lam + c**2 * h))) == 0
assert sp.limit(lam * gain, lam, sp.oo) == c**2 * k**2 / 2
assert sp.limit(gain, lam, 0) == k**2 / (2 * h)

# %% [markdown]
# ## Numerical check
#
# A on a residual network: the gain of each layer alone by the formula, by a dense minimisation over
# that layer's control in the linearised model, and by really optimising that layer, with heavy and
# with light weight decay. Thresholds: formula and minimisation equal to $10^{-10}$; the distance of
# the real gain to the prediction falls with rising $\lambda$, towards zero.

# %%
import torch

from deltacontrol.theory.control.problem import ControlProblem, Cost
from deltacontrol.theory.control.systems import ResidualNetwork
from deltacontrol.theory.linear.linearisation import Linearisation
from deltacontrol.theory.linear.output_map import linear_quadratic_gain
from deltacontrol.theory.linear.reachability import Reachability
from deltacontrol.theory.solvers import Shooting, Status, solve

F64 = torch.float64
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=F64)


class OneLayer(ResidualNetwork):
    """The network with the control of one layer; the others have none."""

    chosen = 0

    @property
    def control_sizes(self):
        return tuple(m if t == self.chosen else 0 for t, m in enumerate(super().control_sizes))

    def step(self, t, x, u):
        full = u if t == self.chosen else u.new_zeros(super().control_sizes[t])
        return super().step(t, x, full)


class Readout(Cost):
    """Logistic loss of one readout of the last state, with signs, plus the price of the control."""

    def __init__(self, weight, signs, weight_decay):
        self.weight, self.signs, self.weight_decay = weight, signs, weight_decay

    def running(self, t, x, u):
        return 0.5 * self.weight_decay * u.square().sum()

    def terminal(self, x):
        return torch.nn.functional.softplus(-self.signs * (x @ self.weight)).mean()


L, width, batch = 5, 6, 12
network = ResidualNetwork.random(L, width=width, hidden=10, control_size=4, seed=2)
x0, weight = normal(batch, width), 2 * normal(width)
signs = normal(batch).sign()


def alone(t, weight_decay):
    dynamics = OneLayer(network.W1, network.W2, network.B)
    object.__setattr__(dynamics, "chosen", t)
    return ControlProblem(dynamics, Readout(weight, signs, weight_decay), x0)


problem = ControlProblem(network, Readout(weight, signs, 0.0), x0)
lin = Linearisation.of(problem, problem.zero_controls())
functionals = torch.eye(batch, dtype=F64)[:, :, None] * weight
outputs = Reachability(lin).output_map(functionals)
z = lin.states[-1] @ weight
slope = -signs * torch.sigmoid(-signs * z) / batch
curvature = torch.diag(torch.sigmoid(z) * torch.sigmoid(-z) / batch)


def predicted(t, weight_decay):
    return linear_quadratic_gain(outputs.gramian({t: slice(None)}), slope, curvature, weight_decay)


for weight_decay in (1e-3, 1.0):
    for t in range(L):
        C = outputs.blocks[t]
        du = -torch.linalg.solve(
            weight_decay * torch.eye(4, dtype=F64) + C.T @ curvature @ C, C.T @ slope
        )
        y = C @ du
        drop = -float(slope @ y + 0.5 * y @ curvature @ y + 0.5 * weight_decay * du @ du)
        assert abs(predicted(t, weight_decay).objective_drop - drop) <= 1e-10 * drop


def real_gain(t, weight_decay):
    solution = solve(
        alone(t, weight_decay), Shooting(), alone(t, 1.0).zero_controls(), max_steps=500, tol=1e-7
    )
    assert solution.status is Status.CONVERGED, solution.message
    start = float(alone(t, weight_decay).objective(alone(t, 1.0).zero_controls()))
    return start - float(solution.objective)


distances, gains = [], {}
for weight_decay in (0.1, 1.0, 10.0):
    pairs = [
        (predicted(t, weight_decay).objective_drop, real_gain(t, weight_decay)) for t in range(L)
    ]
    distances.append(max(abs(p - m) / p for p, m in pairs))
    gains[weight_decay] = pairs
    print(f"decay {weight_decay}: largest relative distance {distances[-1]:.1e}")
assert distances[0] > distances[1] > distances[2] and distances[2] < 0.05

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(4, 3.5), layout="constrained")
for weight_decay, pairs in gains.items():
    ax.loglog(*zip(*pairs, strict=True), "o", label=f"decay {weight_decay:g}")
ax.axline((1e-3, 1e-3), (1e-2, 1e-2), color="black", lw=0.5)
ax.set_xlabel("predicted gain of a layer")
ax.set_ylabel("real gain")
ax.legend()

# %% [markdown]
# B: the whole gains at least as much as any layer, and the two limits of the weight decay.

# %%
whole = linear_quadratic_gain(outputs.gramian(), slope, curvature, 0.01).objective_drop
assert all(predicted(t, 0.01).objective_drop <= whole for t in range(L))
heavy = linear_quadratic_gain(outputs.gramian(), slope, curvature, 1e7)
assert abs(1e7 * heavy.objective_drop / (0.5 * slope @ outputs.gramian() @ slope) - 1) < 1e-5
# Twelve outputs, twenty controls: W is invertible, and a free control gains all that H allows.
light = linear_quadratic_gain(outputs.gramian(), slope, curvature, 1e-12)
assert abs(light.objective_drop / float(0.5 * (slope / curvature.diagonal()) @ slope) - 1) < 1e-4

# %% [markdown]
# C: the mean of LoRA's Gramian over draws of $A$, for one site that reads `tokens` inputs. The
# error of a mean of $n$ draws is about $n^{-1/2}$: it is followed over two decades.

# %%
d, out, rank, tokens, examples, s = 6, 5, 2, 3, 4, 2.0
x, q = normal(examples, tokens, d), normal(examples, tokens, out)
full = torch.einsum("itd,ito->ido", x, q).flatten(1)
full = full @ full.T
factor = s**2 * rank / (3 * d)


A = (2 * torch.rand(16000, d, rank, generator=generator, dtype=F64) - 1) / d**0.5
rows = s * torch.einsum("itd,ndr,ito->niro", x, A, q).flatten(2)
draws = rows @ rows.mT
errors = []
for n in (160, 1600, 16000):
    means = draws.reshape(-1, n, examples, examples).mean(1)
    errors.append(float((means - factor * full).norm(dim=(1, 2)).square().mean().sqrt()))
errors = [e / float((factor * full).norm()) for e in errors]
print("relative error of the mean of 160, 1600, 16000 draws:", [f"{e:.3f}" for e in errors])
assert errors[2] < 0.05
assert 2 < errors[0] / errors[1] < 5

# %% [markdown]
# ## What breaks it (negative control)
#
# The Gramian of *another* system of the same architecture. Its layers have other gains, so that
# formula A, exact for the right $W_t$, is wrong with the other's: the check must notice.

# %%
other = ResidualNetwork.random(L, width=width, hidden=10, control_size=4, seed=7)
other_problem = ControlProblem(other, Readout(weight, signs, 0.0), x0)
other_lin = Linearisation.of(other_problem, other_problem.zero_controls())
other_outputs = Reachability(other_lin).output_map(functionals)
wrong = []
for t in range(L):
    borrowed = linear_quadratic_gain(
        other_outputs.gramian({t: slice(None)}), slope, curvature, 10.0
    )
    wrong.append(abs(borrowed.objective_drop / real_gain(t, 10.0) - 1))
print("relative distance with the other system's Gramian:", [f"{w:.2f}" for w in wrong])
assert min(wrong) > distances[2]

# %% [markdown]
# On real models the negative control of the scoreboard is the Gramian of the same architecture with
# random weights. It is a severe one: depth, widths and the draw of $A$ are the same, so that
# whatever ranking the architecture alone fixes passes too. Where its correlation cannot be told
# from passing, the claim is inconclusive, whatever the trained model's is.
#
# Three things that the prediction leaves out can reorder the sites of a real model. $A$ moves as
# soon as $B \ne 0$, so that a site may reach more than $W_t$ at the start says. The quadratic model
# is not bounded by the loss itself, whereas a real loss cannot fall below zero, and all sites that
# fit the examples gain alike. And $G_t$ is a minimum: a fixed number of iterations comes the less
# close to it, the more unequal the eigenvalues of $W_t$ are.
