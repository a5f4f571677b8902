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
# # 2. Successive approximations: gradient descent, and what the exact minimiser of H does
#
# ## Statement
#
# The method of successive approximations (MSA) repeats: roll the states forward under $u^k$, sweep
# the costates backward along them, improve each $u_t$ for $H_t(x_t^k, \cdot, p_{t+1}^k)$ (Li, Chen,
# Tai & E, JMLR 18(165), 2018, algorithm 1).
#
# **A.** With the gradient step $u_t \leftarrow u_t - \eta \nabla_u H_t$ at all steps at once, MSA
# is gradient descent on $J$ with step $\eta$: the iterates are equal.
#
# **B.** With the exact step $u_t \leftarrow \arg\min_v H_t(x_t, v, p_{t+1})$, MSA on a
# linear-quadratic problem is $u \leftarrow u - R^{-1} \nabla J(u)$, $R$ the block diagonal matrix
# of the $R_t$. With $\nabla^2 J = R + M$ it converges from every start if and only if every
# eigenvalue $\mu$ of $R^{-1} M$ satisfies $|\mu| < 1$. It may diverge on a strictly convex $J$.
#
# **C.** For a bilinear control as in LoRA, $x_{t+1} = x_t (W_t + A_t B_t)$, $\arg\min H_t$ is empty
# without a running cost, unless $G_t := x_t^\top p_{t+1} = 0$. With
# $\ell_t = \frac\lambda2 (\|A\|^2 + \|B\|^2)$ it is the single point $0$ if
# $\sigma_{\max}(G_t) < \lambda$, a cone if $=\lambda$, and empty if $> \lambda$.
#
# **D.** In discrete time stationarity and minimality of $H$ are two statements: at the global
# optimum of $J$, $\nabla_u H_t = 0$ always, yet $u_t$ may even *maximise* $H_t$.

# %% [markdown]
# ## Assumptions
#
# - A: those of notebook 1, and that all $u_t$ move at once, from one pair of sweeps.
# - B: $f_t = A_t x + B_t u + c_t$; $\ell_t$ and $\Phi$ quadratic, with $R_t \succ 0$; a cross term
#   between $x$ and $u$ is allowed.
# - C: the state is a row (or a batch of rows, when $G_t$ sums over them); $\lambda > 0$.
# - D: twice differentiable data.

# %% [markdown]
# ## Derivation
#
# **A.** Notebook 1: $\nabla_u H_t(x_t, u_t, p_{t+1}) = \nabla_{u_t} J$ when states and costates
# belong to the present $u$. So the two updates are the same formula. $\blacksquare$
#
# **B.** $H_t$ is a quadratic function of its control with Hessian $R_t$, the states and costates
# held fixed. Its minimiser is one Newton step from anywhere, in particular from the present $u_t$:
#
# $$\arg\min_v H_t(x_t, v, p_{t+1}) = u_t - R_t^{-1} \nabla_u H_t(x_t, u_t, p_{t+1})
# = u_t - R_t^{-1} \nabla_{u_t} J(u) .$$
#
# As $\nabla J(u) = (R + M) u + g$, the error obeys $e^{k+1} = -R^{-1} M\, e^k$. $R^{-1}M$ is
# similar to the symmetric $R^{-1/2} M R^{-1/2}$, so that its eigenvalues are real and its powers
# tend to zero if and only if all of them lie in $(-1, 1)$. When $M \succeq 0$ (no cross term,
# convex state costs), the condition is $M \prec R$. $\blacksquare$
#
# *Scalar example.* $x_{t+1} = x_t + b u_t$, $J = \frac q2 x_L^2 + \frac r2 \sum_t u_t^2$: here $M =
# q b^2\, \mathbf 1 \mathbf 1^\top$, whose one eigenvalue other than $0$ is $q b^2 L$. Exact MSA
# converges from every start if and only if
#
# $$\frac{q\, b^2 L}{r} < 1,$$
#
# and multiplies the error along $\mathbf 1$ by $-q b^2 L / r$ each time otherwise, although $J$ is
# strictly convex: depth alone destroys it. Gradient descent converges for every
# $\eta < 2/(r + q b^2 L)$.

# %%
import itertools

import sympy as sp

q, r, b, x0 = sp.symbols("q r b x0", positive=True)
L = 4
u = sp.symbols(f"u0:{L}", real=True)
x_L = x0 + b * sum(u)
J = q / 2 * x_L**2 + r / 2 * sum(c**2 for c in u)
# The costate is the same at every step, p = q x_L, and H_t = r/2 v^2 + p (x_t + b v).
v, p, x = sp.symbols("v p x", real=True)
(best,) = sp.solve(sp.diff(r / 2 * v**2 + p * (x + b * v), v), v)
update = [best.subs(p, q * x_L)] * L
for c, new in zip(u, update, strict=True):
    assert sp.simplify(new - (c - sp.diff(J, c) / r)) == 0
contraction = sp.Matrix(update).jacobian(sp.Matrix(u))
ones = sp.ones(L, 1)
assert sp.simplify(contraction * ones - (-q * b**2 * L / r) * ones) == sp.zeros(L, 1)
assert contraction.rank() == 1

# %% [markdown]
# **C.** $H_t = \mathrm{const} + \langle p_{t+1}, x_t A B \rangle + \ell_t = \mathrm{const} +
# \langle G_t, A B \rangle + \ell_t$ with $G_t = x_t^\top p_{t+1}$. If $G_t \ne 0$ take singular
# vectors, $G_t b = \sigma a$, and put $s a$ in the first column of $A$, $-s b^\top$ in the first
# row of $B$: $\langle G_t, AB \rangle = -s^2 \sigma \to -\infty$. With weight decay, for all $A,
# B$,
#
# $$|\langle G_t, AB \rangle| \le \sigma_{\max}(G_t)\, \|A\| \|B\|
# \le \tfrac12 \sigma_{\max}(G_t) \left( \|A\|^2 + \|B\|^2 \right),$$
#
# and the singular vectors attain it: $H_t - \mathrm{const} \ge
# \frac12 (\lambda - \sigma_{\max}) (\|A\|^2 + \|B\|^2)$. $\blacksquare$
#
# So exact-argmin MSA on LoRA either sets the control to zero or does not exist. Also: at a
# stationary point with $u_t \ne 0$, $G_t B^\top = -\lambda A$ and $A^\top G_t = -\lambda B$, so
# $\lambda$ *is* a singular value of $G_t$, and $H_t$ has no isolated minimiser there.
#
# **D.** One step, $x_1 = x_0 + u$, $\ell = -\frac12 u^2$, $\Phi(x) = x^2$. Then
# $J = -\frac12 u^2 + (x_0 + u)^2$ has $J'' = 1 > 0$ and its global minimum at $u^* = -2 x_0$. There
# $p_1 = 2 x_1 = -2 x_0$ and $H(v) = -\frac12 v^2 + p_1 (x_0 + v)$ is stationary at $v = p_1 = u^*$,
# which is its global *maximum*. In general $\nabla^2_{u_t} J = \nabla_u^2 H_t + B_t^\top
# \nabla^2 V_{t+1} B_t$ with $V$ the cost to go: the second term can outweigh a negative first one.
# If $H_t$ is convex in $u$ (dynamics linear in $u$, $\ell_t$ convex in $u$), stationarity implies
# minimality.

# %%
start = sp.symbols("x0", real=True)
J1 = -(v**2) / 2 + (start + v) ** 2
(optimum,) = sp.solve(sp.diff(J1, v), v)
costate = 2 * (start + optimum)
H1 = -(v**2) / 2 + costate * (start + v)
assert sp.diff(J1, v, 2) == 1
assert sp.simplify(sp.diff(H1, v).subs(v, optimum)) == 0
assert sp.diff(H1, v, 2) == -1

# %% [markdown]
# ## Numerical check
#
# **A.** Threshold, fixed before measuring: relative difference of all iterates to those of
# `torch.optim.SGD` at most $10^{-12}$ in float64, over 50 steps, on three kinds of problems.

# %%
import torch

from deltacontrol.theory import (
    MSA,
    Claim,
    ControlProblem,
    Evidence,
    LinearDynamics,
    LowRankDynamics,
    QuadraticCost,
    ResidualNetwork,
    Shooting,
    SquaredErrorCost,
    Status,
    Threshold,
    judge,
    solve,
)

generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def flat(controls):
    return torch.cat([c.detach().flatten() for c in controls])


def random_linear_quadratic(horizon=4, width=3, size=2):
    dynamics = LinearDynamics(
        A=normal(horizon, width, width) / 2, B=normal(horizon, width, size) / 2
    )
    cost = QuadraticCost.constant(
        horizon,
        Q=torch.eye(width, dtype=torch.float64),
        R=torch.eye(size, dtype=torch.float64),
        Qf=torch.eye(width, dtype=torch.float64),
        N=0.2 * normal(width, size),
    )
    return ControlProblem(dynamics, cost, normal(width))


lora = LowRankDynamics([normal(4, 4) / 2 for _ in range(3)], rank=2)
problems = {
    "residual": ControlProblem(
        ResidualNetwork.random(6, width=4, hidden=8, control_size=3, seed=1),
        SquaredErrorCost(normal(5, 4), 0.1),
        normal(5, 4),
    ),
    "low rank": ControlProblem(lora, SquaredErrorCost(normal(5, 4), 0.3), normal(5, 4)),
    "linear-quadratic": random_linear_quadratic(),
}


def descent_iterates(problem, start, step, steps):
    leaves = [c.clone().requires_grad_() for c in start]
    optimiser = torch.optim.SGD(leaves, lr=step)
    for _ in range(steps + 1):
        yield flat(leaves)
        optimiser.zero_grad()
        problem.objective(tuple(leaves)).backward()
        optimiser.step()


def compare(problem, step=0.02, steps=50):
    start = tuple(0.5 * normal(m) for m in problem.dynamics.control_sizes)
    iterates = []
    solve(problem, MSA(step), start, max_steps=steps, tol=0.0, callback=iterates.append)
    references = descent_iterates(problem, start, step, steps)
    return max(
        float((flat(it.controls) - reference).norm() / reference.norm())
        for it, reference in zip(iterates, references, strict=True)
    )


measured = {name: compare(problem) for name, problem in problems.items()}
print(measured)
assert max(measured.values()) <= 1e-12

# %% [markdown]
# **B.** Exact-argmin MSA on random linear-quadratic problems, its cost of control scaled so that
# the spectral radius of $R^{-1} M$ is just below and just above 1. The observed factor per step
# must be that radius.


# %%
def exact_msa(problem, controls, steps):
    """Yield the iterates of MSA with the exact minimiser of the quadratic Hamiltonian."""
    for _ in range(steps):
        yield controls
        gradient = problem.gradient(controls)
        controls = tuple(
            c - torch.linalg.solve(problem.cost.R[t], g)
            for t, (c, g) in enumerate(zip(controls, gradient, strict=True))
        )


def hessian(problem, like):
    def objective(z):
        return problem.objective(tuple(z.split([c.numel() for c in like])))

    return torch.func.hessian(objective)(flat(like))


def with_factor(problem, factor):
    """The same problem, its R scaled so that the spectral radius of R^{-1} M is `factor`."""
    zeros = problem.zero_controls()
    R = torch.block_diag(*problem.cost.R)
    M = hessian(problem, zeros) - R
    radius = float(torch.linalg.eigvals(torch.linalg.solve(R, M)).abs().max())
    cost = problem.cost
    scaled = QuadraticCost(
        Q=cost.Q, R=[Rt * radius / factor for Rt in cost.R], N=cost.N, Qf=cost.Qf
    )
    return ControlProblem(problem.dynamics, scaled, problem.x0)


paths = {}
for factor in (0.9, 1.1):
    problem = with_factor(random_linear_quadratic(), factor)
    zeros = problem.zero_controls()
    H = hessian(problem, zeros)
    assert torch.linalg.eigvalsh(H)[0] > 0, "the objective is strictly convex"
    optimum = -torch.linalg.solve(H, flat(problem.gradient(zeros)))
    errors = [float((flat(c) - optimum).norm()) for c in exact_msa(problem, zeros, 120)]
    paths[factor] = errors
    observed = (errors[-1] / errors[-11]) ** 0.1
    print(f"predicted factor {factor}, observed {observed:.4f}, final error {errors[-1]:.1e}")
    assert abs(observed - factor) < 1e-3 * factor
    assert (errors[-1] < errors[0]) == (factor < 1)

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for factor, errors in paths.items():
    ax.semilogy(errors, label=f"predicted factor {factor}")
ax.set_xlabel("iteration of MSA")
ax.set_ylabel("distance to the optimum")
ax.legend()

# %% [markdown]
# The scalar example at $q = r = b = 1$: with one layer exact MSA oscillates for ever, with more it
# diverges; MSA with a gradient step solves each.

# %%
one = torch.ones(1, 1, dtype=torch.float64)
for horizon in (1, 2, 5):
    problem = ControlProblem(
        LinearDynamics.constant(horizon, one, one),
        QuadraticCost.constant(horizon, Q=0 * one, R=one, Qf=one),
        one[0],
    )
    exact = torch.full((horizon,), -1 / (1 + horizon), dtype=torch.float64)
    errors = [
        float((flat(c) - exact).norm()) for c in exact_msa(problem, problem.zero_controls(), 20)
    ]
    factors = [after / before for before, after in itertools.pairwise(errors)]
    assert max(abs(f - horizon) for f in factors) < 1e-9
    step = 1 / (1 + horizon)
    solution = solve(problem, MSA(step), problem.zero_controls(), max_steps=500, tol=1e-10)
    assert solution.status is Status.CONVERGED
    print(f"{horizon} layers: exact MSA x{factors[-1]:.1f} per step; {solution.message}")

# %% [markdown]
# **C.** The Hamiltonian along the singular direction, without and with weight decay.

# %%
problem = problems["low rank"]
controls = tuple(normal(m) for m in problem.dynamics.control_sizes)
now = problem.evaluate(controls)


def bare_hamiltonian(t, control):
    """H_t without its running cost."""
    return float((now.costates[t + 1] * problem.dynamics.step(t, now.states[t], control)).sum())


for t in range(problem.dynamics.horizon):
    G = now.states[t].mT @ now.costates[t + 1]
    left, singular_values, right = torch.linalg.svd(G)
    sigma = float(singular_values[0])
    A, B = torch.zeros(4, 2, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    A[:, 0], B[0] = left[:, 0], -right[0]
    direction = torch.cat([A.flatten(), B.flatten()])
    zero = torch.zeros_like(direction)
    for s in (1.0, 10.0, 1000.0):
        drop = bare_hamiltonian(t, s * direction) - bare_hamiltonian(t, zero)
        assert abs(drop + s**2 * sigma) <= 1e-10 * s**2 * sigma
    # With weight decay lambda the same line has slope (lambda - sigma) s^2: its sign decides, and
    # no direction does better than the singular one.
    trials = normal(2000, len(direction))
    trials = trials / trials.norm(dim=1, keepdim=True)
    lowest = min(bare_hamiltonian(t, c) - bare_hamiltonian(t, zero) for c in trials)
    assert -sigma / 2 <= lowest

solution = solve(problem, Shooting(), controls, max_steps=500, tol=1e-7)
assert solution.status is Status.CONVERGED
decay = problem.cost.weight_decay
for t, control in enumerate(solution.controls):
    G = solution.states[t].mT @ solution.costates[t + 1]
    nearest = float((torch.linalg.svdvals(G) - decay).abs().min())
    size = float(control.norm())
    print(f"layer {t}: |u| = {size:.2f}, distance of the decay from a singular value {nearest:.1e}")
    assert size < 1e-5 or nearest < 1e-5

# %% [markdown]
# **D.** The same with a solver: shooting finds the global minimum of $J$, where $H$ has its
# maximum.

# %%
problem = ControlProblem(
    LinearDynamics.constant(1, one, one),
    QuadraticCost.constant(1, Q=0 * one, R=-one, Qf=2 * one),
    one[0],
)
solution = solve(problem, Shooting(), problem.zero_controls(), max_steps=50, tol=1e-9)
assert solution.status is Status.CONVERGED
assert abs(float(solution.controls[0]) + 2) < 1e-8
grid = torch.linspace(-10, 10, 401, dtype=torch.float64).reshape(-1, 1)
values = torch.stack([problem.hamiltonian(0, problem.x0, c, solution.costates[1]) for c in grid])
at_optimum = problem.hamiltonian(0, problem.x0, solution.controls[0], solution.costates[1])
assert float(at_optimum) >= float(values.max()) - 1e-12
print(f"H at the optimum {float(at_optimum):.3f}; elsewhere as low as {float(values.min()):.1f}")

# %% [markdown]
# ## What breaks it (negative control)
#
# A needs all controls to move at once. When the layers move one after the other, each seeing the
# states and costates of those already moved (a Gauss-Seidel sweep), the iterates leave gradient
# descent, by $O(\eta^2)$ in a step. The check must notice.


# %%
def gauss_seidel_step(problem, controls, step):
    for t in reversed(range(len(controls))):
        gradient = problem.gradient(controls)
        controls = (*controls[:t], controls[t] - step * gradient[t], *controls[t + 1 :])
    return controls


def departure(problem, controls, step):
    swept = flat(gauss_seidel_step(problem, controls, step))
    descended = flat(controls) - step * flat(problem.gradient(controls))
    return float((swept - descended).norm() / descended.norm())


problem = problems["residual"]
controls = tuple(normal(m) for m in problem.dynamics.control_sizes)
order = float(
    torch.tensor(departure(problem, controls, 2e-3) / departure(problem, controls, 1e-3)).log2()
)
broken = {
    name: departure(p, tuple(0.5 * normal(m) for m in p.dynamics.control_sizes), 0.02)
    for name, p in problems.items()
}
print(f"order {order:.2f}", broken)
assert abs(order - 2) < 0.05
assert min(broken.values()) > 1e-6

# With one layer there is nothing to wait for, and the same sweep is gradient descent.
alone = ControlProblem(
    ResidualNetwork.random(1, width=4, hidden=6, control_size=3, seed=1),
    SquaredErrorCost(normal(5, 4)),
    normal(5, 4),
)
harmless = departure(alone, (normal(3),), 0.02)
print(f"one layer: {harmless:.1e}")
assert harmless <= 1e-12

# %%
claim = Claim(
    id=2,
    name="msa-gradient-descent",
    title="MSA is gradient descent",
    statement="MSA with an H-gradient step has the iterates of gradient descent on J",
    source="Li, Chen, Tai & E, JMLR 18(165), 2018",
    notebook="proofs_notebooks/02_msa_gradient_descent.py",
    threshold=Threshold("<=", 1e-12, "relative difference of the iterates"),
    predict=lambda: {"relative_difference": 0.0},
    measure=lambda prediction: Evidence.worst(measured),
    negative_control=lambda prediction: Evidence.worst(broken, least=True),
    passing_control=lambda prediction: Evidence(harmless),
)
outcome = judge(claim)
print(outcome.text, "-", outcome.part().reason)
assert outcome.holds
