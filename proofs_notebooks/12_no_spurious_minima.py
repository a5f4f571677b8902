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
# # 12. LoRA of a rank r with r(r + 1)/2 > KN has no spurious minima in the kernel regime
#
# ## Statement
#
# $N$ examples with $K$ outputs that are linear in the change $X = BA$ of a matrix,
# $z_j(X) = z_j + \langle G_j, X\rangle$ for $j = 1, \dots, KN$, a convex loss $\ell$ of them, and
#
# $$\Phi(A, B) = \ell(z(BA)) + \tfrac{\lambda}{2}(\|A\|_F^2 + \|B\|_F^2), \qquad
#   B \in \mathbb{R}^{p\times r},\; A \in \mathbb{R}^{r\times q},\; \lambda > 0.$$
#
# $$\boxed{\; \tfrac{r(r+1)}{2} > KN \;\Rightarrow\; \text{for generic } G_j \text{ every local
#   minimum of } \Phi \text{ is global. } \;}$$

# %% [markdown]
# ## Assumptions
#
# - the outputs are linear in $X$: the kernel regime;
# - $\lambda > 0$; $\ell$ is convex and smooth;
# - $G_j$ are generic: an exceptional set of measure zero is excluded. Jang et al. perturb $\Phi$ by
#   a random linear term to the same end.

# %% [markdown]
# ## Derivation
#
# *The convex program.* $\min \tfrac12(\|A\|^2+\|B\|^2)$ over $BA = X$ is $\|X\|_*$, if $r \ge
# \operatorname{rank} X$. So $\min \Phi \ge \min_X \ell(z(X)) + \lambda\|X\|_*$, with equality for
# large $r$. With $M = \sum_j \partial_j\ell\, G_j$ the optimality of $X = BA$ is
#
# $$\|M\|_2 \le \lambda, \qquad M^\top B = -\lambda A^\top,\quad M A^\top = -\lambda B.$$
#
# *Stationary points.* $\nabla\Phi = 0$ is the second pair of equations: with $Q = [B; A^\top]$ and
#
# $$S = \begin{pmatrix} \lambda I & M\\ M^\top & \lambda I\end{pmatrix}, \qquad S Q = 0.$$
#
# Only $\|M\|_2 \le \lambda$, that is $S \succeq 0$, may be missing.
#
# *A local minimum whose $Q$ has a null vector is global.* If $Qv = 0$, $\|v\| = 1$, move along
# $Q + \epsilon w v^\top$. Then $QQ^\top$ changes by $\epsilon^2 ww^\top$ and $\Phi$ by
# $\tfrac12\epsilon^2 w^\top S w + O(\epsilon^4)$: a local minimum needs $S \succeq 0$.
#
# *Otherwise $Q$ has rank $r$, hence $S$ a null space of dimension at least $r$*: $M$ has the
# singular value $\lambda$ at least $r$ times. Such matrices have the codimension $r +
# \tfrac{r(r-1)}{2} = \tfrac{r(r+1)}{2}$: $r$ singular values are given, and rotations within their
# space, $r(r-1)/2$ of them, change nothing. But $M$ lies in the span of the $G_j$, which has $KN$
# dimensions, and a generic subspace of dimension below the codimension misses the set (away from
# $0$, which is not in it). $\blacksquare$
#
# *What it does not say.* Below this rank nothing is claimed: whether there are spurious minima,
# and whether a start finds them, is a matter of the data.

# %%
import sympy as sp

r = sp.symbols("r", positive=True)
assert sp.simplify(r + r * (r - 1) / 2 - r * (r + 1) / 2) == 0

# %% [markdown]
# The codimension, counted by the rank of a parametrisation's derivative: $M = U \Sigma V^\top$
# with $\Sigma$ containing $\lambda$ twice.

# %%
import torch

F64 = torch.float64
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=F64)


def with_multiplicity(parameters, p, q, multiplicity):
    """U diag(1, ..., 1, others) V' through two exponentials of skew matrices."""
    left, right, others = parameters.split([p * p, q * q, min(p, q) - multiplicity])
    U = torch.linalg.matrix_exp(left.view(p, p) - left.view(p, p).T)
    V = torch.linalg.matrix_exp(right.view(q, q) - right.view(q, q).T)
    values = torch.cat([torch.ones(multiplicity, dtype=F64), others])
    k = min(p, q)
    return U[:, :k] @ torch.diag(values) @ V[:, :k].T


p, q = 5, 4
for multiplicity in (1, 2, 3, 4):
    at = normal(p * p + q * q + min(p, q) - multiplicity)
    jacobian = torch.func.jacrev(lambda x, m=multiplicity: with_multiplicity(x, p, q, m))(at)
    rank = int(torch.linalg.matrix_rank(jacobian.reshape(p * q, -1), rtol=1e-9))
    print(f"the singular value 1 taken {multiplicity} times: codimension {p * q - rank}")
    assert p * q - rank == multiplicity * (multiplicity + 1) // 2

# %% [markdown]
# ## Numerical check
#
# Small random problems, many starts, and the dual of the convex program as a certificate: the
# distance to the global minimum is computed, not guessed from the best run.

# %%
from deltacontrol.experiments.measures.low_rank_minima import LinearLoRA, needed_rank

N, starts = 5, 6
needed = needed_rank(N)
assert needed == 3 and needed * (needed + 1) // 2 > N >= (needed - 1) * needed // 2
problem_gaps = {}
for trial in range(3):
    G, z = normal(N, 4, 4), normal(N)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=F64)
    problem = LinearLoRA.of(G, z, signs, "squared", share=0.1)
    ends = {rank: [problem.minimise(rank, s, 1.0) for s in range(starts)] for rank in (1, needed)}
    bound = max(end.bound for runs in ends.values() for end in runs)
    for rank, runs in ends.items():
        gaps = [(end.objective - bound) / (problem.start - bound) for end in runs]
        problem_gaps.setdefault(rank, []).extend(gaps)
        print(f"problem {trial}, rank {rank}: gaps {min(gaps):.1e} to {max(gaps):.1e}")
assert max(problem_gaps[needed]) < 1e-9

# %% [markdown]
# ## What breaks it (negative control)
#
# Rank one: some starts end above the bound, at stationary points with $\|M\|_2 > \lambda$. The rank
# just below the theorem's need not do so, for the theorem's rank is sufficient and may be far from
# necessary: how many starts end above the bound at one rank less is printed. The claim takes that
# rank as its control, and is inconclusive where it succeeds as well.

# %%
assert max(problem_gaps[1]) > 1e-3

just_below = []
for _ in range(3):
    G, z = normal(N, 4, 4), normal(N)
    problem = LinearLoRA.of(G, z, signs, "squared", share=0.1)
    runs = [problem.minimise(needed - 1, s, 10.0) for s in range(starts)]
    bound = max(problem.minimise(needed, s, 1.0).bound for s in range(2))
    just_below += [(end.objective - bound) / (problem.start - bound) for end in runs]
print(f"rank {needed - 1}: {sum(gap > 1e-6 for gap in just_below)} of {len(just_below)} above")
assert min(just_below) > -1e-9

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for rank, gaps in {**problem_gaps, needed - 1: just_below}.items():
    ax.semilogy([rank] * len(gaps), [max(gap, 1e-16) for gap in gaps], "o", alpha=0.5)
ax.set_xticks(range(1, needed + 1))
ax.set_xlabel(f"rank; {needed} suffices for {N} examples")
ax.set_ylabel("gap above the convex bound")
