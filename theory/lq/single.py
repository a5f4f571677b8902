"""The quick form of the Riccati recursion for one problem on the CPU, by BLAS and LAPACK.

The routines that know a triangle (``trmm``, ``syrk``, ``potrf``) do half the work of general
products, and a call costs less than one of torch; `deltacontrol.theory.lq.recursion` is the batched
form. What
numpy sees in rows LAPACK sees in columns: ``X.T`` is the matrix as it reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.linalg import get_blas_funcs, get_lapack_funcs
from torch import Tensor

from deltacontrol.theory.lq.terms import QuadraticTerms, QuickSteps, Steps, each, frobenius, gain

__all__ = ["simulate", "sweep"]

MEDIUM, LARGE = 64, 256


@np.errstate(over="ignore", invalid="ignore")  # the pivots tell
def sweep(terms: QuadraticTerms, stop: int, root: Tensor) -> QuickSteps:
    """The steps from ``stop - 1`` down to the last one at which the factorisation succeeds.

    Args:
        terms: one problem.
        stop: the step after the first one to do.
        root: ``S`` of that step, ``(1, n, n)``.
    """
    small = terms.uniform and terms.Qf.shape[-1] < MEDIUM
    return (_small_steps if small else _steps)(terms, stop, root)


def _small_steps(terms: QuadraticTerms, stop: int, root: Tensor) -> QuickSteps:
    """Small steps of equal sizes: what need not wait for the step after it is done for all."""
    A, B, Q, R = (_matrices(part, stop) for part in (terms.A, terms.B, terms.Q, terms.R))
    n, m = B.shape[-2:]
    G, H = B.new_empty(stop, n, m + n), B.new_empty(stop, m + n, m + n)
    H_uu, H_ux, H_xx = H[:, :m, :m], H[:, :m, m:], H[:, m:, m:]
    torch.cat([B, A], -1, out=G)
    torch.add(R, R.mT, out=H_uu)
    torch.add(Q, Q.mT, out=H_xx)
    if terms.N is None:
        H_ux.zero_()
    else:
        torch.mul(_matrices(terms.N, stop).mT, 2, out=H_ux)
    S = np.ascontiguousarray(root[0].numpy().T)
    trmm, syrk = get_blas_funcs(("trmm", "syrk"), dtype=S.dtype)
    (potrf,) = get_lapack_funcs(("potrf",), dtype=S.dtype)
    rooms, first = [list(X.numpy()) for X in (G.mT, H.mT, H_xx)], 0
    backward = zip(reversed(range(stop)), *map(reversed, rooms), strict=True)
    for t, G_T, H_T, S_T in backward:
        # G' <- [B A]' S,  H <- H/2 + G'G,  H = L L', each in place; by position, which is quicker.
        trmm(1.0, S.T, G_T, 1, 1, 0, 0, 1)  # side, lower, trans_a, diag, overwrite_b
        syrk(1.0, G_T, 0.5, H_T, 0, 1, 1)  # trans, lower, overwrite_c
        if potrf(H_T, 1, 0, 1)[1]:  # lower, clean, overwrite_a
            first = t + 1
            break
        S = S_T.copy()
    # Beyond the triangles is what was in H.
    C_T, S_T = (X[first:] * X.new_ones(X.shape[1:]).triu() for X in (H_uu, H_xx))
    W = H_ux[first:].contiguous()
    norms = torch.cat([frobenius(S_T), frobenius(root)])[1:]
    bounds = (norms * frobenius(B[first:])).square()
    C, S = C_T[:, None].mT, S_T[:, None].mT
    return QuickSteps(first, C, gain(C, W[:, None]), S, bounds[:, None])


def _matrices(terms: Steps, stop: int) -> Tensor:
    """The matrices of the one problem, ``(stop, ., .)``."""
    assert isinstance(terms, Tensor)
    return terms[:stop, 0]


def _steps(terms: QuadraticTerms, stop: int, root: Tensor) -> QuickSteps:
    """Steps of any sizes, one after another."""
    A, B, Q, R = (_arrays(part) for part in (terms.A, terms.B, terms.Q, terms.R))
    N = None if terms.N is None else _arrays(terms.N)
    S = np.ascontiguousarray(root[0].numpy().T)
    trmm, trsm, syrk = get_blas_funcs(("trmm", "trsm", "syrk"), dtype=S.dtype)
    (potrf,) = get_lapack_funcs(("potrf",), dtype=S.dtype)

    def room(shapes: list[tuple[int, int]]) -> np.ndarray | list[np.ndarray]:
        if terms.uniform:
            return np.empty((stop, *shapes[0]), S.dtype)
        return [np.empty(shape, S.dtype) for shape in shapes]

    sizes = terms.sizes[:stop]
    # Each root has memory of its own: what went back to the system costs time to get again.
    roots = [np.empty((n, n), S.dtype) for _, _, n in sizes]
    lower = room([(m, m) for _, m, _ in sizes])
    gains = room([(m, n) for _, m, n in sizes])
    bounds = np.empty((stop, 1), S.dtype)
    rooms, first = {}, 0
    for t in reversed(range(stop)):
        size = after, m, n = sizes[t]
        if size not in rooms:
            G, H = np.empty((after, m + n), S.dtype), np.zeros((m + n, m + n), S.dtype)
            blocks = G, G.T, G[:, :m], G[:, m:], H.T, H[:m, :m], H[:m, m:], H[m:, m:]
            rooms[size] = *blocks, _triangle(m, S.dtype), _triangle(n, S.dtype)
        G, G_T, G_u, G_x, H_T, H_uu, H_ux, H_xx, of_u, of_x = rooms[size]
        G_u[...], G_x[...] = B[t], A[t]
        np.add(R[t], R[t].T, out=H_uu)
        np.add(Q[t], _transposed(Q[t]), out=H_xx)
        H_ux[...] = 0.0 if N is None else 2 * N[t].T
        bounds[t] = np.vdot(S, S) * np.vdot(B[t], B[t])
        trmm(1.0, S.T, G_T, side=1, lower=1, overwrite_b=1)
        syrk(1.0, G_T, beta=0.5, c=H_T, lower=1, overwrite_c=1)
        if potrf(H_T, lower=1, clean=0, overwrite_a=1)[1]:
            first = t + 1
            break
        # Beyond the triangle is what was in H; zeroing it here is quicker than by potrf.
        np.multiply(H_xx, of_x, out=roots[t])
        np.multiply(H_uu, of_u, out=lower[t])
        gains[t][...] = H_ux
        if m:
            trsm(-1.0, lower[t].T, gains[t].T, side=1, lower=1, overwrite_b=1)
        S = roots[t]
    return QuickSteps(
        first=first,
        lower=each(lambda C: C.mT, _tensors(lower, first)),
        gains=_tensors(gains, first),
        roots=each(lambda S: S.mT, _tensors(roots, first)),
        bounds=torch.from_numpy(bounds[first:]),
    )


def simulate(
    A: Steps,
    B: Steps,
    K: Steps,
    c: Sequence[Tensor] | None,
    k: Sequence[Tensor] | None,
    x0: Tensor,
) -> tuple[Steps, Steps]:
    """``u_t = K_t x_t + k_t``, ``x_{t+1} = A_t x_t + B_t u_t + c_t`` from ``x0``, ``(1, n, 1)``."""
    A_, B_, K_ = _arrays(A), _arrays(B), _arrays(K)
    offsets, feedforward = (None if v is None else [z[0, :, 0].numpy() for z in v] for v in (c, k))
    x = x0[0, :, 0].numpy()
    if isinstance(A, Tensor) and isinstance(K, Tensor):
        states = np.empty((len(A_) + 1, len(x)), x.dtype)
        controls = np.empty((len(A_), K.shape[-2]), x.dtype)
    else:
        states = [np.empty(n, x.dtype) for n in (len(x), *(len(step) for step in A_))]
        controls = [np.empty(len(gain), x.dtype) for gain in K_]
    states[0][...] = x
    dot, ahead = np.dot, iter(states)
    x = next(ahead)
    for t, (A_t, B_t, K_t, u, x_next) in enumerate(zip(A_, B_, K_, controls, ahead, strict=True)):
        dot(K_t, x, out=u)
        if feedforward is not None:
            u += feedforward[t]
        dot(A_t, x, out=x_next)
        x_next += dot(B_t, u)
        if offsets is not None:
            x_next += offsets[t]
        x = x_next

    def shaped(found: np.ndarray | list[np.ndarray]) -> Steps:
        if isinstance(found, np.ndarray):
            return torch.from_numpy(found)[:, None, :, None]
        return [torch.from_numpy(vector)[None, :, None] for vector in found]

    return shaped(states), shaped(controls)


def _triangle(size: int, dtype: np.dtype) -> np.ndarray:
    """Ones where numpy sees the triangle that LAPACK calls the lower one, zeros elsewhere."""
    return np.triu(np.ones((size, size), dtype))


def _tensors(arrays: np.ndarray | list[np.ndarray], first: int) -> Steps:
    if isinstance(arrays, np.ndarray):
        return torch.from_numpy(arrays[first:]).unsqueeze(1)
    return [torch.from_numpy(array).unsqueeze(0) for array in arrays[first:]]


def _arrays(terms: Steps) -> np.ndarray | list[np.ndarray]:
    """The matrices of the one problem as numpy sees them."""
    if isinstance(terms, Tensor):
        return terms[:, 0].numpy()
    return [term[0].numpy() for term in terms]


def _transposed(Q: np.ndarray) -> np.ndarray:
    """``Q'``; of a large matrix a copy by torch, which goes block by block."""
    return torch.from_numpy(Q).t().contiguous().numpy() if len(Q) >= LARGE else Q.T
