"""The Riccati recursion for one problem, in code that numba compiles: one kernel for all sizes.

Only `deltacontrol.theory.lq.fused` imports this module, since it needs numba.

Blocks of 4 x 4 entries are summed in registers by `_add_product`, which numba's own loops do not
come to: it is written in the compiler's intermediate language. A matrix lies in panels of four
columns, ``M[i, j]`` at ``X[j // 4, i, j % 4]``, so that a block reads memory in order. Sizes are
filled up to multiples of four.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

__all__ = ["simulate", "sweep"]

_VECTOR = types.float64[::1]
_MATRIX = types.float64[:, ::1]
_STEPS = types.float64[:, :, ::1]


def _compiled(signature: Any, freedoms: set[str]) -> Callable[[Callable], Callable]:
    """`numba.njit` for this signature, kept in numba's cache where that can be written.

    ``freedoms`` are those of "fastmath"; what is not finite must stay so, for the pivots to see it.
    """

    def compiled(function: Callable) -> Callable:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": freedoms}
        try:
            return numba.njit(signature, cache=True, **options)(function)
        except Exception:  # no folder that can be written, a full disk, a damaged file
            return numba.njit(signature, **options)(function)

    return compiled


def _product(typingctx, Y, y, X, x, c, count):  # pragma: no cover - compiled
    """``C += Y'X`` of ``count`` rows of four, an even number; all are places in ``Y`` and ``X``.

    ``Y`` starts at entry ``y`` of its array, ``X`` at ``x`` and the 4 x 4 block ``C`` at ``c`` of
    the array of ``X``. Even and odd rows have sums of their own, so that none waits for the other.
    """

    def code(context, builder, signature, values):
        vector, whole = ir.VectorType(ir.DoubleType(), 4), ir.IntType(64)
        undefined = ir.Constant(vector, ir.Undefined)
        spread = ir.Constant(ir.VectorType(ir.IntType(32), 4), [0] * 4)
        data = [make_array(signature.args[i])(context, builder, values[i]).data for i in (0, 2)]
        Y_rows = builder.gep(data[0], [values[1]])
        X_rows, C_rows = (
            builder.bitcast(builder.gep(data[1], [values[i]]), vector.as_pointer()) for i in (3, 4)
        )

        def row(pointer, at):
            found = builder.load(builder.gep(pointer, [at]))
            found.align = 8
            return found

        zero = ir.Constant(vector, [0.0] * 4)
        four = [ir.Constant(whole, i) for i in range(4)]
        even = [cgutils.alloca_once_value(builder, row(C_rows, i)) for i in four]
        odd = [cgutils.alloca_once_value(builder, zero) for _ in four]
        with cgutils.for_range(builder, builder.sdiv(values[5], four[2])) as loop:
            for parity, sums in zip(four, (even, odd), strict=False):
                h = builder.add(builder.mul(loop.index, four[2]), parity)
                X_row = row(X_rows, h)
                first = builder.mul(h, ir.Constant(whole, 4))
                for i, total in zip(four, sums, strict=True):
                    entry = builder.load(builder.gep(Y_rows, [builder.add(first, i)]))
                    entry = builder.insert_element(undefined, entry, ir.Constant(ir.IntType(32), 0))
                    entry = builder.shuffle_vector(entry, undefined, spread)
                    # A processor that fuses both does so; others multiply and add.
                    part = builder.fmul(entry, X_row, flags=["contract"])
                    part = builder.fadd(builder.load(total), part, flags=["contract"])
                    builder.store(part, total)
        for i, *sums in zip(four, even, odd, strict=True):
            total = builder.fadd(*(builder.load(part) for part in sums))
            builder.store(total, builder.gep(C_rows, [i]), align=8)
        return context.get_dummy_value()

    place = types.int64
    return types.void(Y, place, X, place, place, place), code


_add_product: Any = intrinsic(_product)


@_compiled(
    types.Tuple((types.int64, types.boolean))(*(_STEPS,) * 5, _MATRIX, *(_STEPS,) * 3),
    {"contract", "nsz"},  # with "reassoc" numba would turn sums over rows into gathers
)
def sweep(A, B, Q, R, N, root, C, K, S):  # pragma: no cover - compiled
    """The backward sweep, in the quick form of `deltacontrol.theory.lq.recursion`.

    Args:
        A: ``(L, n, n)``.
        B: ``(L, n, m)``.
        Q: ``(L, n, n)``.
        R: ``(L, m, m)``.
        N: ``(L, n, m)``, or of no steps for zero.
        root: ``S`` of the last state, ``(n, n)``, lower triangular.
        C: takes ``C_t'``, ``(L, m, m)``; zeros.
        K: takes ``K_t``, ``(L, m, n)``.
        S: takes ``S_t'``, ``(L, n, n)``; zeros.

    Returns:
        The last step, backward, at which the factorisation succeeds; and whether all pivots of
        ``H_uu`` exceed the rough bound of their rounding errors, and all numbers are finite.
    """
    stop, n, m = B.shape
    k, eps = n + m, np.finfo(np.float64).eps
    n_panels, k_panels = (n + 3) // 4, (k + 3) // 4
    # Below each other: F = [B A], G = S'F, and U with U'U = H; in Y what multiplies them: S, G, -U.
    g_row, u_row, k_filled = 4 * n_panels, 8 * n_panels, 4 * k_panels
    rows = u_row + k_filled
    X = np.zeros((k_panels, rows, 4))
    Y = np.zeros((k_panels, rows, 4))
    for i in range(n):
        for j in range(i + 1):
            Y[j >> 2, i, j & 3] = root[i, j]
    row = np.zeros(k_filled)
    trusted = True
    for t in range(stop - 1, -1, -1):
        A_t, B_t, Q_t, R_t = A[t], B[t], Q[t], R[t]
        squares_S, squares_B = 0.0, 0.0
        for panel in range(n_panels):
            for i in range(4 * panel, n):
                for q in range(4):
                    squares_S += Y[panel, i, q] * Y[panel, i, q]
        for i in range(n):
            for j in range(m):
                row[j] = B_t[i, j]
                squares_B += row[j] * row[j]
            for j in range(n):
                row[m + j] = A_t[i, j]
            for panel in range(k_panels):
                for q in range(4):
                    X[panel, i, q] = row[4 * panel + q]
                    X[panel, g_row + i, q] = 0.0
        for i in range(n, g_row):
            for panel in range(k_panels):
                for q in range(4):
                    X[panel, g_row + i, q] = 0.0
        trusted &= squares_S < np.inf
        bound = squares_S * squares_B
        for i in range(k):  # H where U will be
            if i < m:
                for j in range(i, m):
                    row[j] = 0.5 * (R_t[i, j] + R_t[j, i])
                for j in range(n):
                    row[m + j] = N[t, j, i] if len(N) else 0.0
            else:
                r = i - m
                for j in range(r, n):
                    row[m + j] = 0.5 * (Q_t[r, j] + Q_t[j, r])
            for panel in range(i >> 2, k_panels):
                for q in range(4):
                    X[panel, u_row + i, q] = row[4 * panel + q]
        for i in range(k, k_filled):
            for q in range(4):
                X[k_panels - 1, u_row + i, q] = 1.0 if i == 4 * (k_panels - 1) + q else 0.0
        for panel in range(n_panels):  # four rows of G = S'F
            low, out = 4 * panel, g_row + 4 * panel
            for j in range(k_panels):
                x = j * rows * 4
                _add_product(Y, (panel * rows + low) * 4, X, x + low * 4, x + out * 4, g_row - low)
                for i in range(out, out + 4):
                    for q in range(4):
                        Y[j, i, q] = X[j, i, q]
        for panel in range(k_panels):  # four rows of U, from H + G'G less the rows before
            out = u_row + 4 * panel
            for j in range(panel, k_panels):
                x = j * rows * 4
                y = (panel * rows + g_row) * 4
                _add_product(Y, y, X, x + g_row * 4, x + out * 4, out - g_row)
            for r in range(4):
                for h in range(r):
                    entry = X[panel, out + h, r]
                    for j in range(panel, k_panels):
                        for q in range(4):
                            X[j, out + r, q] -= entry * X[j, out + h, q]
                pivot, i = X[panel, out + r, r], 4 * panel + r
                if not pivot > 0.0:
                    return t + 1, trusted
                if i < m:
                    trusted &= pivot > (4 + m) * eps * (abs(R_t[i, i]) + bound)
                scale = 1.0 / math.sqrt(pivot)
                for j in range(panel, k_panels):
                    for q in range(4):
                        X[j, out + r, q] *= scale
                        Y[j, out + r, q] = -X[j, out + r, q]
        C_t, K_t, S_t = C[t], K[t], S[t]
        for i in range(k - 1, -1, -1):
            for panel in range(i >> 2, k_panels):
                for q in range(4):
                    row[4 * panel + q] = X[panel, u_row + i, q]
            if i >= m:
                r = i - m
                for j in range(r, n):
                    S_t[r, j] = row[m + j]
                for j in range(r, n):
                    Y[r >> 2, j, r & 3] = row[m + j]
                continue
            for j in range(i, m):
                C_t[i, j] = row[j]
            for j in range(n):  # U_uu K = -U_ux
                K_t[i, j] = row[m + j]
            for h in range(i + 1, m):
                for j in range(n):
                    K_t[i, j] += row[h] * K_t[h, j]
            scale = -1.0 / row[i]
            for j in range(n):
                K_t[i, j] *= scale
        for j in range(k, k_filled):
            row[j] = 0.0
    squares_S = 0.0
    for i in range(n):
        for j in range(i, n):
            squares_S += S[0, i, j] * S[0, i, j]
    return 0, trusted and squares_S < np.inf


@_compiled(
    types.void(*(_STEPS,) * 3, _VECTOR, *(_MATRIX,) * 2),
    {"contract", "reassoc", "nsz"},
)
def simulate(A, B, K, x0, states, controls):  # pragma: no cover - compiled
    """``u_t = K_t x_t``, ``x_{t+1} = A_t x_t + B_t u_t`` from ``x0``; fills the last two."""
    horizon, n, m = B.shape
    for i in range(n):
        states[0, i] = x0[i]
    for t in range(horizon):
        for i in range(m):
            total = 0.0
            for j in range(n):
                total += K[t, i, j] * states[t, j]
            controls[t, i] = total
        for i in range(n):
            total = 0.0
            for j in range(n):
                total += A[t, i, j] * states[t, j]
            for j in range(m):
                total += B[t, i, j] * controls[t, j]
            states[t + 1, i] = total
