"""The Riccati recursion for one problem in one call of a compiled kernel, where numba is installed.

A small problem consists of calls: each step has three of LAPACK, and Python's part in them costs
more than their arithmetic. The kernel (`deltacontrol.theory.lq.kernels`) has the loop over the
steps inside, and serves all sizes, so that it is compiled once; numba keeps it beside its file, or
in the user's cache.

Importing numba and loading the kernel takes half a second to one second of the first solve in a
process, compiling it some seconds, once a machine. It serves from the first problem on, so that a
problem has the same bits whenever it is solved. Without numba, where the kernel cannot be compiled,
and for other problems `deltacontrol.theory.lq.single` computes the same up to rounding.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import torch
from scipy.linalg import get_lapack_funcs
from torch import Tensor

from deltacontrol.theory.lq.terms import QuadraticTerms, QuickSteps, Steps, Terms, frobenius

__all__ = ["Solved", "kernels", "serves", "simulate", "solve", "sweep"]

(_potrf,) = get_lapack_funcs(("potrf",), dtype=np.float64)

LARGEST = 96  # m + n, beyond which the matrices leave the cache, and LAPACK is as quick


@dataclass(frozen=True, eq=False)
class Solved:
    """One problem that the kernel solved, in arrays of NumPy.

    Attributes:
        A: ``(L, n, n)``.
        B: ``(L, n, m)``.
        K: the gains, ``(L, m, n)``.
        C_T: ``C_t'`` with ``H_uu = C_t C_t'``, ``(L, m, m)``.
        S_T: ``S_t'`` with ``P_t = S_t S_t'``, ``(L, n, n)``.
        final: ``P_L``.
    """

    A: np.ndarray
    B: np.ndarray
    K: np.ndarray
    C_T: np.ndarray
    S_T: np.ndarray
    final: np.ndarray

    @property
    def quick(self) -> QuickSteps:
        """The same as tensors, with a batch of one."""
        C_T, K, S_T = (torch.from_numpy(part).unsqueeze(1) for part in (self.C_T, self.K, self.S_T))
        return QuickSteps(0, C_T.mT, K, S_T.mT, None)


def solve(
    A: Terms, B: Terms, Q: Terms, R: Terms, Qf: Tensor, N: Terms | None = None
) -> Solved | None:
    """The whole recursion of one well-posed problem, or None: then the other forms are to answer.

    They do so where terms do not fit, are not finite or no plain tensors, where a factorisation
    fails or a pivot of ``H_uu`` is within the rough bound of its rounding errors, and for the
    problems that `serves` refuses. So every refusal and every status is theirs.
    """
    given = (A, B, Q, R, Qf) if N is None else (A, B, Q, R, Qf, N)
    try:
        arrays = [part.numpy() for part in given]  # pyright: ignore[reportAttributeAccessIssue]
    except (AttributeError, RuntimeError, TypeError):  # of a list, a GPU, autograd, ...
        return None
    if arrays[1].ndim != 3 or any(x.dtype != np.float64 for x in arrays):
        return None
    horizon, n, m = arrays[1].shape
    steps = [(horizon, n, n), (horizon, n, m), (horizon, n, n), (horizon, m, m), (n, n)]
    steps.append((horizon, n, m))
    small = horizon and n and m and n + m <= LARGEST
    if not small or [x.shape for x in arrays] != steps[: len(arrays)]:
        return None
    module = kernels()
    if module is None:
        return None
    final = 0.5 * (arrays[4] + arrays[4].T)
    root, code = _potrf(final.T, lower=0)  # C' as LAPACK reads it is C as NumPy does
    if code:
        return None
    A_, B_, Q_, R_ = (np.ascontiguousarray(part) for part in arrays[:4])
    cross = np.empty((0, n, m)) if N is None else np.ascontiguousarray(arrays[5])
    C_T, K, S_T = np.zeros((horizon, m, m)), np.empty((horizon, m, n)), np.zeros((horizon, n, n))
    first, trusted = module.sweep(A_, B_, Q_, R_, cross, root.T, C_T, K, S_T)
    return None if first or not trusted else Solved(A_, B_, K, C_T, S_T, final)


def serves(terms: QuadraticTerms) -> bool:
    """Whether this is one problem in float64 on the CPU, small and of equal steps."""
    _, m, n = terms.sizes[0]
    small = terms.uniform and terms.lead.numel() == 1 and 0 < m and 0 < n and m + n <= LARGEST
    if not small or terms.Qf.dtype != torch.float64 or terms.Qf.device.type != "cpu":
        return False
    return kernels() is not None


def sweep(terms: QuadraticTerms, stop: int, root: Tensor) -> QuickSteps:
    """The steps from ``stop - 1`` down to the last one at which the factorisation succeeds.

    Args:
        terms: one problem of equal steps.
        stop: the step after the first one to do.
        root: ``S`` of that step, ``(1, n, n)``.
    """
    _, m, n = terms.sizes[0]
    arrays = [_array(part, stop) for part in (terms.A, terms.B, terms.Q, terms.R)]
    cross = np.empty((0, n, m)) if terms.N is None else _array(terms.N, stop)
    C_T, K, S_T = (np.zeros((stop, 1, *shape)) for shape in ((m, m), (m, n), (n, n)))
    module = kernels()
    assert module is not None
    first, trusted = module.sweep(
        *arrays, cross, np.ascontiguousarray(root.numpy()[0]), C_T[:, 0], K[:, 0], S_T[:, 0]
    )
    C, gains, S = (torch.from_numpy(part[first:]) for part in (C_T, K, S_T))
    bounds = None
    if not trusted:
        norms_S = torch.cat([frobenius(S), frobenius(root.unsqueeze(0))])[1:]
        bounds = (norms_S * frobenius(torch.from_numpy(arrays[1][first:, None]))).square()
    return QuickSteps(first, C.mT, gains, S.mT, bounds)


def simulate(solved: Solved, x0: Tensor) -> tuple[Tensor, Tensor] | None:
    """States ``(L + 1, n)`` and controls ``(L, m)`` under the optimal law; None for other states.

    Args:
        solved: the problem.
        x0: one state of its dtype, ``(n,)``.
    """
    horizon, m, n = solved.K.shape
    try:
        start = np.ascontiguousarray(x0.numpy())
    except (AttributeError, RuntimeError, TypeError):
        return None
    if start.shape != (n,) or start.dtype != np.float64:
        return None
    states, controls = np.empty((horizon + 1, n)), np.empty((horizon, m))
    module = kernels()
    assert module is not None
    module.simulate(solved.A, solved.B, solved.K, start, states, controls)
    return torch.from_numpy(states), torch.from_numpy(controls)


@cache
def kernels() -> ModuleType | None:
    """The compiled kernels, or None where numba is missing or cannot compile them."""
    try:
        import numba
    except ImportError:  # or a numba that does not fit the NumPy
        return None
    try:
        from deltacontrol.theory.lq import kernels as module
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"numba {numba.__version__} could not compile the Riccati recursion of one problem, so "
            f"that LAPACK computes it: {reason}",
            stacklevel=2,
        )
        return None
    return module


def _array(steps: Steps, stop: int) -> np.ndarray:
    """The matrices of the one problem, ``(stop, ., .)``."""
    assert isinstance(steps, Tensor)
    return np.ascontiguousarray(steps.numpy()[:stop, 0])
