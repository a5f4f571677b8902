"""The escape threshold of a cross-entropy whose logits are linear in the parameters.

Nothing is replaced by a quadratic here. With logits ``f_i + R_i delta`` of ``N`` examples, labels
``y_i`` and the sublevel set ``S`` of ``delta`` with mean cross-entropy at most ``eps``, a random
subspace of dimension ``d`` meets ``S`` with probability one half at

    d* = n - E ||Pi_C h||^2,      h ~ N(0, I_n),

``C`` the cone that ``S`` spans and ``n`` the rank of ``R``, in the coordinates in which ``R`` has
the Gram matrix that it has. The projection is a convex program, with ``delta = w/t``:

    min ||h - w||^2   over   t >= 0,   sum_i s_i <= N eps t,
    t log sum_k exp((t f_ik + R_ik w - t f_iy - R_iy w) / t) <= s_i.

Sources: Amelunxen, Lotz, McCoy & Tropp, Information and Inference 3(3), 2014, theorem I; Larsen et
al., ICLR 2022, section 3.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import cvxpy
import numpy as np
import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError

MOREAU = 1e-5  # of |h|^2; the standard error over draws is a thousand times as large

__all__ = ["ConeThreshold", "cross_entropy_threshold"]


@dataclass(frozen=True)
class ConeThreshold:
    """The dimension at which half of the random subspaces reach a cross-entropy.

    Attributes:
        dimension: ``d*``.
        standard_error: over the draws of ``h``.
        rank: ``n``.
    """

    dimension: float
    standard_error: float
    rank: int


@typed
def cross_entropy_threshold(
    kernel: Tensor, logits: Tensor, labels: Tensor, target: float, *, draws: int = 30, seed: int = 0
) -> ConeThreshold:
    """``d*`` for a mean cross-entropy.

    Args:
        kernel: inner products of the logits' gradients, ``(N K, N K)``, examples first.
        logits: ``f``, ``(N, K)``.
        labels: ``(N,)``.
        target: ``eps``.
        draws: of ``h``, two at least.
        seed: of ``h``.

    Raises:
        InputError: if the shapes do not fit, the kernel is zero, the start reaches the target, the
            target is not positive, or the solver of the projections fails.
    """
    count, classes = logits.shape
    if kernel.shape != (count * classes,) * 2 or labels.shape != (count,):
        raise InputError(
            f"kernel has shape {tuple(kernel.shape)}, labels {tuple(labels.shape)}; expected "
            f"{(count * classes,) * 2} and {(count,)} for logits {tuple(logits.shape)}"
        )
    numbers = not labels.is_floating_point() and labels.dtype != torch.bool
    if not (numbers and bool(((labels >= 0) & (labels < classes)).all())):
        raise InputError(
            f"the labels are {labels.dtype} from {float(labels.min()):g} to "
            f"{float(labels.max()):g}; expected whole numbers from 0 to {classes - 1}"
        )
    kernel, logits, labels = kernel.detach(), logits.detach(), labels.long()
    start = float(torch.nn.functional.cross_entropy(logits.double(), labels))
    if not 0 < target < start:
        raise InputError(f"target is {target}; expected between 0 and {start:.4g}, the start's")
    if draws < 2:
        raise InputError(f"draws is {draws}; a standard error needs 2 or more")
    # What the cross-entropy sees: differences from the label's logit.
    rows = torch.arange(count)
    select = torch.eye(count * classes, dtype=torch.float64).view(count, classes, -1)
    differ = (select - select[rows, labels][:, None]).flatten(0, 1)
    values, vectors = torch.linalg.eigh(differ @ kernel.double() @ differ.mT)
    kept = values > 1e-7 * values[-1]
    frame = (vectors[:, kept] * values[kept].sqrt()).numpy()
    rank = frame.shape[1]
    if not rank:
        raise InputError(
            "kernel is zero: no direction moves the logits, so that no subspace lowers the loss"
        )
    offsets = (differ @ logits.double().flatten()).numpy()

    w, t = cvxpy.Variable(rank), cvxpy.Variable(nonneg=True)
    s, q = cvxpy.Variable(count), cvxpy.Variable(count * classes)
    h = cvxpy.Parameter(rank)
    each = np.kron(np.eye(count), np.ones((classes, 1)))
    # The size of w is that of h; that of t is anything. A unit of t that is 1/|w/t| keeps both near
    # one.
    unit = float(np.sqrt(rank / max(values[-1].item(), 1e-300)))
    size = cvxpy.multiply(t, unit) * np.ones(count * classes)
    exponents = unit * t * offsets + frame @ w - each @ s
    constraints = [
        cvxpy.ExpCone(exponents, size, q),
        each.T @ q <= unit * t * np.ones(count),
        cvxpy.sum(s) <= count * target * unit * t,
    ]
    program = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(w - h)), constraints)
    generator, found = np.random.default_rng(seed), []
    for _ in range(draws):
        h.value = generator.standard_normal(rank)
        with warnings.catch_warnings():  # whether it is accurate is computed below
            warnings.filterwarnings("ignore", message="Solution may be inaccurate")
            try:
                program.solve(solver=cvxpy.CLARABEL)
            except cvxpy.SolverError as error:
                raise InputError(
                    f"the projection on the cone was not found: {error}; take fewer rows, or a "
                    "target nearer to the start's"
                ) from error
        if program.status not in ("optimal", "optimal_inaccurate") or w.value is None:
            raise InputError(
                f"the projection on the cone was not found: the solver ended with "
                f"{program.status}; expected optimal; take fewer rows, or a target nearer to the "
                "start's"
            )
        # Moreau: the projection w on a cone is orthogonal to h - w.
        missed = abs(float(w.value @ (h.value - w.value))) / float(h.value @ h.value)
        if missed > MOREAU:
            raise InputError(
                f"the projection on the cone is inaccurate: <w, h - w> is {missed:.1e} of |h|^2, "
                f"expected at most {MOREAU:g}; take fewer rows, or a target nearer to the start's"
            )
        # |h|^2 = |w|^2 + |h - w|^2, and E |h|^2 = n: the mean of |h - w|^2 varies less.
        found.append(float(np.sum((h.value - w.value) ** 2)))
    return ConeThreshold(
        float(np.mean(found)), float(np.std(found, ddof=1)) / math.sqrt(draws), rank
    )
