"""The quick form of the Riccati recursion for many small problems on the CPU, by numba.

Matrices of a few rows are too small for a call each: some problems at a time are laid side by side,
so that every operation is one on vectors over problems. A kernel takes seconds to compile, once for
each size: numba keeps it beside this file, or in the user's cache. Without numba, where it fails,
and for other problems, the batched form of `deltacontrol.theory.lq.recursion` computes the same.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltacontrol.theory.lq.terms import QuadraticTerms, QuickSteps

__all__ = ["serves", "sweep"]

LANES = 16
PANEL = 4  # columns that are factorised before the rest is updated
LARGEST = 16  # m + n, beyond which compiling takes long and torch's operations are quick
MANY = 4000  # steps of all problems, below which torch takes some milliseconds


def serves(terms: QuadraticTerms) -> bool:
    """Whether there are many small problems in float64 on the CPU, and a kernel for them."""
    if not terms.uniform or terms.Qf.dtype != torch.float64 or terms.Qf.device.type != "cpu":
        return False
    (_, m, n), batch = terms.sizes[0], terms.lead.numel()
    if batch < LANES or batch * len(terms.sizes) < MANY or m == 0 or m + n > LARGEST:
        return False
    return _kernel(n, m, terms.N is not None) is not None


def sweep(terms: QuadraticTerms, stop: int, root: Tensor) -> QuickSteps:
    """The steps from ``stop - 1`` down to the last one at which all factorisations succeed.

    Args:
        terms: of equal sizes.
        stop: the step after the first one to do.
        root: ``S`` of that step, ``(batch, n, n)``.
    """
    _, m, n = terms.sizes[0]
    cross = terms.B if terms.N is None else terms.N  # which is not read without N
    arrays = []
    for part in (terms.A, terms.B, terms.Q, terms.R, cross):
        assert isinstance(part, Tensor)
        arrays.append(part[:stop].numpy())
    batch = len(root)
    lower, gains, roots = (
        root.new_empty((stop, batch, *shape)) for shape in ((m, m), (m, n), (n, n))
    )
    bounds = root.new_empty((stop, batch))
    good = torch.empty((stop, batch), dtype=torch.bool)
    outputs = [part.numpy() for part in (lower, gains, roots, bounds, good)]
    _kernel(n, m, terms.N is not None)(*arrays, root.numpy(), *outputs)
    failed = (~good).any(-1).nonzero()
    first = int(failed[-1, 0]) + 1 if len(failed) else 0
    return QuickSteps(first, lower[first:], gains[first:], roots[first:], bounds[first:])


@cache
def _kernel(n: int, m: int, crossed: bool) -> Any:
    """The sweep for ``n`` states and ``m`` controls, or None; known sizes unroll the loops."""
    try:
        import numba
    except ImportError:  # or a numba that does not fit the NumPy
        return None

    k, lanes, panel = m + n, LANES, PANEL
    padded = -(-k // panel) * panel

    # Any strides, so that there is one kernel for all.
    given = (numba.float64[:, :, :, :],) * 5 + (numba.float64[:, :, :],)
    found = (numba.float64[:, :, :, ::1],) * 3 + (numba.float64[:, ::1], numba.boolean[:, ::1])

    def kernel(A, B, Q, R, N, root, lower, gains, roots, bounds, good):  # pragma: no cover
        F = np.empty((n, k, lanes))
        G = np.empty((n, k, lanes))
        H = np.zeros((padded, padded, lanes))
        S = np.empty((n, n, lanes))
        K = np.empty((m, n, lanes))
        scale = np.empty(lanes)
        norm_S = np.empty(lanes)
        norm_B = np.empty(lanes)
        fine = np.empty(lanes, np.bool_)
        for start in range(0, root.shape[0], lanes):
            count = min(lanes, root.shape[0] - start)
            for w in range(lanes):
                p = start + min(w, count - 1)
                for i in range(n):
                    for j in range(n):
                        S[i, j, w] = root[p, i, j]
            for t in range(A.shape[0] - 1, -1, -1):
                for w in range(lanes):
                    p = start + min(w, count - 1)
                    for i in range(n):
                        for j in range(m):
                            F[i, j, w] = B[t, p, i, j]
                        for j in range(n):
                            F[i, m + j, w] = A[t, p, i, j]
                    for i in range(m):
                        for j in range(i + 1):
                            H[i, j, w] = 0.5 * (R[t, p, i, j] + R[t, p, j, i])
                    for i in range(n):
                        for j in range(m):
                            H[m + i, j, w] = N[t, p, i, j] if crossed else 0.0
                        for j in range(i + 1):
                            H[m + i, m + j, w] = 0.5 * (Q[t, p, i, j] + Q[t, p, j, i])
                for i in range(k, padded):
                    H[i, :i] = 0.0  # a problem that failed left NaN
                    H[i, i] = 1.0
                # bounds = ||S||^2 ||B||^2
                norm_S[:] = 0.0
                norm_B[:] = 0.0
                for i in range(n):
                    for j in range(i + 1):
                        for w in range(lanes):
                            norm_S[w] += S[i, j, w] * S[i, j, w]
                    for j in range(m):
                        for w in range(lanes):
                            norm_B[w] += F[i, j, w] * F[i, j, w]
                for w in range(count):
                    bounds[t, start + w] = norm_S[w] * norm_B[w]
                # G = S'F, H += G'G
                for i in range(n):
                    for j in range(k):
                        for w in range(lanes):
                            total = 0.0
                            for h in range(n):
                                total += S[h, i, w] * F[h, j, w]
                            G[i, j, w] = total
                for i in range(k):
                    for j in range(i + 1):
                        for w in range(lanes):
                            total = H[i, j, w]
                            for h in range(n):
                                total += G[h, i, w] * G[h, j, w]
                            H[i, j, w] = total
                # H = L L', a panel of columns after another
                fine[:] = True
                for left in range(0, padded, panel):
                    right = left + panel
                    for c in range(left, right):
                        for w in range(lanes):
                            pivot = H[c, c, w]
                            fine[w] &= pivot > 0.0
                            H[c, c, w] = np.sqrt(pivot)
                            scale[w] = 1.0 / H[c, c, w]
                        for i in range(c + 1, padded):
                            for w in range(lanes):
                                H[i, c, w] *= scale[w]
                            for j in range(c + 1, min(i + 1, right)):
                                for w in range(lanes):
                                    H[i, j, w] -= H[i, c, w] * H[j, c, w]
                    for i in range(right, padded):
                        for j in range(right, i + 1):
                            for w in range(lanes):
                                total = H[i, j, w]
                                for h in range(panel):
                                    total -= H[i, left + h, w] * H[j, left + h, w]
                                H[i, j, w] = total
                for w in range(count):
                    good[t, start + w] = fine[w]
                # K = -C^-T W
                for i in range(m - 1, -1, -1):
                    for w in range(lanes):
                        scale[w] = -1.0 / H[i, i, w]
                    for j in range(n):
                        for w in range(lanes):
                            total = H[m + j, i, w]
                            for h in range(i + 1, m):
                                total += H[h, i, w] * K[h, j, w]
                            K[i, j, w] = total * scale[w]
                for i in range(n):
                    for j in range(n):
                        for w in range(lanes):
                            S[i, j, w] = H[m + i, m + j, w] if j <= i else 0.0
                for w in range(count):
                    for i in range(n):
                        for j in range(n):
                            roots[t, start + w, i, j] = S[i, j, w]
                    for i in range(m):
                        for j in range(m):
                            lower[t, start + w, i, j] = H[i, j, w] if j <= i else 0.0
                        for j in range(n):
                            gains[t, start + w, i, j] = K[i, j, w]

    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        # Not all of it: what is not finite must be seen by the pivots.
        "fastmath": {"contract", "reassoc", "nsz"},
    }
    signature = numba.void(*given, *found)
    try:
        return numba.njit(signature, cache=True, **options)(kernel)
    except Exception:  # the cache: no folder that can be written, a full disk, a damaged file
        pass
    try:
        return numba.njit(signature, **options)(kernel)
    except Exception as error:
        warnings.warn(
            f"numba {numba.__version__} could not compile the Riccati recursion, so that torch "
            f"computes it: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            stacklevel=2,
        )
        return None
