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
# # 24. What a low-rank update leaves of the loss
#
# ## Statement
#
# Full fine-tuning moves a weight from $W_0$ to $W_0 + D$, with singular values
# $s_1 \ge s_2 \ge \dots$ of $D \in \mathbb{R}^{m \times n}$.
#
# 1. (Eckart & Young) $\min_{\mathrm{rank}\, M \le r} \|D - M\|_F^2 = \sum_{i > r} s_i^2
#    = \mathrm{tail}(r)$.
# 2. If $W_0 + D$ minimises a loss whose Hessian there is $h I$, then the least loss that a change
#    of rank $r$ reaches exceeds the minimum by exactly $\frac h2 \mathrm{tail}(r)$, hence
#    $$\boxed{\; \frac{L_r - L_{\text{full}}}{L_0 - L_{\text{full}}}
#      = \frac{\mathrm{tail}(r)}{\mathrm{tail}(0)} \;}$$
#
#    with $L_0$ the loss without the change. There is no constant to be fitted.
# 3. If the Hessian lies between $h_- I$ and $h_+ I$, both sides agree to a factor of $h_+ / h_-$.
# 4. The stable rank $\|D\|_F^2 / s_1^2$ of a Gaussian matrix tends to
#    $mn / (\sqrt m + \sqrt n)^2$, so that "low" has a yardstick.
#
# ## Assumptions
#
# - $W_0 + D$ minimises the loss, and so does LoRA among the changes of its rank;
# - the loss is quadratic with a multiple of the identity as its Hessian.
#
# The claim measures the boxed relation where neither is guaranteed: a Transformer, trained for
# finitely many steps. It checks one consequence, that LoRA's loss does not rise with the rank; and
# $D$ is known after training only, so that its tail foretells nothing.

# %% [markdown]
# ## Derivation
#
# *1.* By Weyl, $s_{i+r}(D) \le s_i(D - M) + s_{r+1}(M) = s_i(D - M)$ for $\mathrm{rank}\, M \le r$.
# Squares summed over $i$ give $\|D - M\|_F^2 \ge \sum_{i>r} s_i^2$, and the truncated SVD attains
# it.
#
# *2.* A quadratic loss with Hessian $hI$ is
# $L(W_0 + M) = L_{\text{full}} + \frac h2 \|M - D\|_F^2$; minimise over $\mathrm{rank}\, M \le r$.
#
# *3.* $\frac{h_-}2 \|M - D\|^2 \le L(W_0 + M) - L_{\text{full}} \le \frac{h_+}2 \|M - D\|^2$; take
# the minimum over $M$ of all three, at rank $r$ and at rank $0$, and divide.
#
# *4.* $\|G\|_F^2 \to mn$ and $\|G\|_2 \to \sqrt m + \sqrt n$ (Geman, Ann. Probab. 1980).
# $\blacksquare$

# %%
import torch

from deltacontrol.theory.rank.low_rank import singular_values, stable_rank, tail_energy, truncated

F64 = torch.float64
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=F64)


D = normal(12, 5) @ torch.diag(torch.tensor([4.0, 2, 1, 0.5, 0.25], dtype=F64)) @ normal(5, 9)
tails = tail_energy(singular_values(D))
for r in range(6):
    M = truncated(D, r)
    assert abs(float((D - M).square().sum()) - float(tails[r])) <= 1e-12 * float(tails[0])
    for _ in range(50):  # no other matrix of that rank is nearer
        other = M + 0.3 * normal(12, 1) @ normal(1, 9) if r else torch.zeros(12, 9, dtype=F64)
        assert (D - truncated(other, r)).square().sum() >= tails[r] - 1e-9

# %% [markdown]
# ## Numerical check of the boxed relation
#
# Least squares with white inputs, $L(W) = \frac12 \|(W - W_*) X\|_F^2 / N$, $X X^\top = N I$: the
# Hessian is the identity. LoRA is solved by alternating least squares from a random start, without
# looking at the SVD.


# %%
def alternating(target, rank, metric, rounds=4000):
    """The best B A of a rank for tr (B A - D) C (B A - D)': each factor in closed form."""
    A = normal(rank, target.shape[1])
    for _ in range(rounds):
        B = target @ metric @ A.T @ torch.linalg.inv(A @ metric @ A.T)
        A = torch.linalg.solve(B.T @ B, B.T @ target)
    return B @ A


white = torch.eye(9, dtype=F64)
for r in (1, 2, 3, 4):
    change = alternating(D, r, white)
    share = float((change - D).square().sum() / D.square().sum())
    print(f"rank {r}: share missing {share:.6f}, tail share {float(tails[r] / tails[0]):.6f}")
    assert abs(share - float(tails[r] / tails[0])) <= 1e-6

# %% [markdown]
# ## How far off it is when the inputs are not white
#
# With $XX^\top = N C$ the Hessian is $C$, and the best change of rank $r$ truncates $D C^{1/2}$:
# the spectrum of $D$ alone does not decide. The bound of (3), a factor of $\kappa(C)$, holds.

# %%
Q, _ = torch.linalg.qr(normal(9, 9))
C = Q @ torch.diag(torch.logspace(-1, 1, 9, dtype=F64)) @ Q.T
root = torch.linalg.cholesky(C)
weighted = tail_energy(singular_values(D @ root))
for r in (1, 2, 3):
    change = alternating(D, r, C)
    missing = float(((change - D) @ root).square().sum() / (D @ root).square().sum())
    assert abs(missing - float(weighted[r] / weighted[0])) <= 1e-6
    ratio = missing / float(tails[r] / tails[0])
    print(f"rank {r}: missing {missing:.4f}, tail share {float(tails[r] / tails[0]):.4f}")
    assert 1 / 100 <= ratio <= 100 and abs(ratio - 1) > 0.01

# %% [markdown]
# ## What breaks it (negative control)
#
# A Gaussian matrix of the same norm has another spectrum: its tail falls slowly, its stable rank is
# near the yardstick of (4), and its tails do not predict the losses. Its tails are *ordered* as the
# losses are, though, since every tail falls with the rank: a rank correlation over $r$ alone cannot
# tell it from the update. The claim therefore judges stable rank, order and size apart: stable rank
# and size against Gaussian matrices, the order against tails that are dealt out over the ranks.

# %%
G = normal(12, 9)
G *= D.norm() / G.norm()
wrong = tail_energy(singular_values(G)) / G.square().sum()
right = tails / tails[0]
assert all(a > b for a, b in zip(wrong[1:4], right[1:4], strict=True))
error = float((wrong[1:5] - right[1:5]).norm() / right[1:5].norm())
print(f"relative error with a Gaussian's tails: {error:.2f}")
assert error > 0.25 and sorted(wrong.tolist()) == wrong.tolist()[::-1]

large = normal(400, 1600)
yardstick = 400 * 1600 / (400**0.5 + 1600**0.5) ** 2
assert abs(stable_rank(singular_values(large)) / yardstick - 1) < 0.05
assert stable_rank(singular_values(D)) < 0.6 * stable_rank(singular_values(G))

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.semilogy(right[:5], "o-", label="the update")
ax.semilogy(wrong[:9], "o-", label="a Gaussian matrix of its size")
ax.set_xlabel("rank")
ax.set_ylabel("share of the energy in the tail")
ax.legend()
