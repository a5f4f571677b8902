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
# # 13. Fine-tuning follows the tangent kernel of its start; LoRA keeps the kernel
#
# ## Statement
#
# Controls $u$ of a model with outputs $z(u) \in \mathbb{R}^n$, Jacobian $J(u)$, kernel
# $K(u) = J J^\top$, $K = K(u_0)$. Gradient descent on $\ell(z(u))$ with rate $\eta$, beside
#
# $$\hat z_{k+1} = \hat z_k - \eta\, K\, \nabla\ell(\hat z_k).$$
#
# 1. If $z$ is linear in $u$ then $z(u_k) = \hat z_k$ for all $k$, on unseen examples too.
# 2. If $\|J(u) - J(u')\| \le \beta\|u-u'\|$ on the path, of length $\rho$ at most, then one step
#    differs from the linear one by $\eta\,O(\beta\rho)$ and $\|K(u) - K\| \le 2\|J\|\beta\rho +
#    \beta^2\rho^2$: what decides is $\beta\rho/\|J\|$, the distance times the bend.
# 3. LoRA at its start, $W + sBA$ with $B = 0$ and $A \in \mathbb{R}^{r\times n}$ of independent
#    entries of variance $\sigma^2$, has
#    $$\mathbb{E}\,K^{\mathrm{LoRA}} = s^2 r\sigma^2\, K^{W},\qquad
#      \frac{\operatorname{Var} K^{\mathrm{LoRA}}_{ij}}{(s^2 r\sigma^2)^2} =
#      \frac{\operatorname{tr} MM^\top + \operatorname{tr} M^2}{r}, \quad M = X_i^\top X_j,$$
#
#    for Gaussian entries, $X_i = \partial z_i/\partial W$ and $K^W_{ij} = \operatorname{tr} M$:
#    it is the kernel of full fine-tuning of $W$, up to a factor and $O(1/\sqrt r)$.
#
# 4. Away from its start LoRA has a second part: $K^{\mathrm{LoRA}}_{ij} = s^2\langle X_iA^\top,
#    X_jA^\top\rangle + s^2\langle B^\top X_i, B^\top X_j\rangle$, and $\|B\|$ has to grow as
#    $1/s$ for a given change of the outputs. LoRA of a small scale leaves its kernel although $W$
#    hardly moves.
#
# Malladi et al. argue that a prompt makes the second case small: the task is then near to what was
# trained before, and $\rho$ is small. A head that is drawn anew has to grow first.

# %% [markdown]
# ## Assumptions
#
# - gradient descent with one rate for all controls (Adam has another kernel);
# - small $\beta\rho/\|J\|$: this is what the claim measures;
# - for 3.: the start of LoRA, where only $B$ acts.

# %% [markdown]
# ## Derivation
#
# 1. $z(u_{k+1}) = z(u_k) + J(u_{k+1} - u_k) = z(u_k) - \eta J J^\top \nabla\ell(z(u_k))$. An unseen
#    example has its own row of $J$ and follows with the rectangular kernel.
#
# 2. $z(u_{k+1}) - z(u_k) + \eta K\nabla\ell = -\eta\,(\bar J J(u_k)^\top - JJ^\top)\nabla\ell$ with
#    the mean $\bar J$ of the Jacobian between the two, and $\|\bar J J_k^\top - JJ^\top\| \le
#    2\|J\|\beta\rho + \beta^2\rho^2$. The same inequality bounds the drift.
#
# 3. $\partial z_i/\partial B = s X_i A^\top$, so $K^{\mathrm{LoRA}}_{ij} = s^2 \langle X_i A^\top,
#    X_j A^\top\rangle = s^2 \sum_{k \le r} a_k^\top X_i^\top X_j a_k$, a sum over the rows of $A$.
#    For one Gaussian row, $\mathbb{E}\,a^\top M a = \sigma^2\operatorname{tr} M$ and
#    $\operatorname{Var} = \sigma^4(\operatorname{tr} MM^\top + \operatorname{tr} M^2)$ with
#    $M = X_i^\top X_j$; the $r$ rows are independent.
#
# 4. $\partial z_i/\partial A = s B^\top X_i$, which vanishes at the start. To first order
#    $\Delta z = s\langle X, BA\rangle$: the scale divides $B$ by $s$, and the second part is free
#    of $s$ while the first has $s^2$. $\blacksquare$

# %%
import torch

F64 = torch.float64
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=F64)


# %% [markdown]
# ## Numerical check
#
# *LoRA's kernel*: mean and variance over draws of $A$.

# %%
out, width, rank, draws, sigma, s = 6, 8, 4, 20000, 0.5, 2.0
X, Y = normal(out, width), normal(out, width)
A = sigma * torch.randn(draws, rank, width, generator=generator, dtype=F64)
found = s**2 * torch.einsum("ow,drw,ov,drv->d", X, A, Y, A)
M = X.T @ Y
mean = s**2 * rank * sigma**2 * M.trace()
variance = s**4 * rank * sigma**4 * ((M * M).sum() + (M @ M).trace())
print(f"mean {found.mean():.3f}, predicted {mean:.3f}; variance {found.var():.2f}, {variance:.2f}")
assert abs(found.mean() - mean) < 4 * (variance / draws) ** 0.5
assert abs(found.var() / variance - 1) < 0.15

# %% [markdown]
# *The second part*, for one linear output $z = \langle X, W + sBA\rangle$ brought to the same
# change by LoRA of three scales, each trained by gradient descent.

# %%
drifts = {}
for scale in (0.25, 1.0, 4.0):
    A0 = normal(rank, width) / width**0.5
    A, B = A0.clone(), torch.zeros(out, rank, dtype=F64)
    first = scale**2 * (X @ A0.T).square().sum()
    rate = 0.02 / first
    while scale * (X * (B @ A)).sum() < 5.0:
        A, B = A + rate * scale * B.T @ X, B + rate * scale * X @ A.T
    kernel = scale**2 * ((X @ A.T).square().sum() + (B.T @ X).square().sum())
    drifts[scale] = float(kernel / first - 1)
    print(f"scale {scale:g}: the kernel grows by {drifts[scale]:.2f} of itself")
assert drifts[0.25] > 2 * drifts[1.0] > 4 * drifts[4.0]

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.loglog(list(drifts), list(drifts.values()), "o-")
ax.set_xticks(list(drifts), [f"{scale:g}" for scale in drifts])
ax.minorticks_off()
ax.set_xlabel("scale s")
ax.set_ylabel("growth of the kernel")

# %% [markdown]
# *Descent.* Two layers, a network that is linear in its last one and not in its first.

# %%
x, signs = normal(12, 5), torch.sign(normal(12))
inner, outer = normal(16, 5) / 5**0.5, normal(16) / 4.0


def outputs(u):
    W, v = u[:80].view(16, 5), u[80:]
    return torch.tanh(x @ W.T) @ v


def loss(z):
    return torch.nn.functional.softplus(-signs * z).mean()


def follow(moving, steps, rate):
    """Largest difference of real and predicted outputs over the change, for controls that move."""
    u = torch.cat([inner.flatten(), outer])
    mask = torch.cat([torch.full((80,), moving[0]), torch.full((16,), moving[1])]).to(F64)
    J = torch.func.jacrev(outputs)(u) * mask
    z = start = outputs(u)
    for _ in range(steps):
        u = u - rate * mask * torch.func.grad(lambda w: loss(outputs(w)))(u)
        z = z - rate * J @ J.T @ torch.func.grad(loss)(z)
    real = outputs(u)
    after = torch.func.jacrev(outputs)(u) * mask
    drift = (after @ after.T - J @ J.T).norm() / (J @ J.T).norm()
    return float((real - z).norm() / (real - start).norm()), float(drift)


error, drift = follow((0.0, 1.0), 200, 0.5)
print(f"last layer alone: error {error:.1e}, drift {drift:.1e}")
assert max(error, drift) < 1e-12
short, long = (follow((1.0, 1.0), 1, rate) for rate in (1e-3, 1e-2))
print(f"both layers, one step: errors {short[0]:.1e}, {long[0]:.1e}, drifts {short[1]:.1e}")
# Proportional to the distance, which the rate stretches by ten.
assert abs(long[0] / short[0] - 10) < 1 and abs(long[1] / short[1] - 10) < 1

# %% [markdown]
# ## What breaks it (negative control)
#
# A long way: the same network, trained until its features have moved. The claim takes LoRA at a
# small scale in its place, which by 4. leaves its kernel, and as the case that must pass one short
# step of it.

# %%
far = follow((1.0, 1.0), 400, 2.0)
print(f"400 steps: error {far[0]:.2f}, drift {far[1]:.2f}")
assert far[0] > 0.1 and far[1] > 0.25
