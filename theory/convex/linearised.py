"""From a control problem to its linearised tuning: the features are rows of ``d x_L / d u_t``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltacontrol.theory.control.costs import CrossEntropyCost, SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.convex.tuning import ConvexTuning
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.linearisation import Linearisation

__all__ = ["linearised_tuning", "logit_jacobians"]


def logit_jacobians(problem: ControlProblem, u: Controls, *, chunk: int = 32) -> list[Tensor]:
    """``d x_L[i, k] / d u_t``, ``(N, K, m_t)`` for each step, by ``N K`` adjoint sweeps.

    Args:
        problem: its last state is ``(N, K)``, or ``(K,)`` for one example.
        u: controls shared by the batch.
        chunk: how many sweeps run at once.

    Raises:
        InputError: for per-example controls and for another last state.
    """
    problem.check_controls(u)
    if any(control.ndim != 1 for control in u):
        raise InputError(
            "the controls are per example; linearised tuning takes shared ones, (m_t,)"
        )
    linear = Linearisation.of(problem, u, keep=True)
    z = linear.states[-1]
    if z.ndim not in (1, 2):
        raise InputError(
            f"the last state has shape {tuple(z.shape)}; expected logits (examples, classes)"
        )
    rows = z.numel()
    basis = torch.eye(rows, dtype=z.dtype, device=z.device)
    found = torch.cat([basis[start : start + chunk] @ linear for start in range(0, rows, chunk)])
    lead = tuple(z.shape) if z.ndim == 2 else (1, rows)
    parts = found.split([control.numel() for control in u], 1)
    return [part.reshape(*lead, part.shape[1]) for part in parts]


def linearised_tuning(problem: ControlProblem, u: Controls, **options: Any) -> ConvexTuning:
    """`ConvexTuning` around ``u``, one group for each step that has controls.

    The running cost does not enter: the penalty is on the change of the controls, and `Ridge` of
    weight ``lambda`` around ``u = 0`` is a weight decay of ``lambda``. Linear dynamics make it the
    control problem itself.

    Args:
        problem: with a `CrossEntropyCost` or a `SquaredErrorCost`.
        u: the controls to linearise at.
        **options: of `ConvexTuning`.

    Raises:
        InputError: for another cost, and as `logit_jacobians` and `ConvexTuning`.
    """
    cost = problem.cost
    if not isinstance(cost, CrossEntropyCost | SquaredErrorCost):
        raise InputError(
            f"linearised tuning takes a CrossEntropyCost or a SquaredErrorCost, not "
            f"{type(cost).__name__}"
        )
    with torch.no_grad():
        z = problem.rollout(u)[-1]
    jacobians = logit_jacobians(problem, u)
    z = z if z.ndim == 2 else z[None]
    if isinstance(cost, CrossEntropyCost):
        labels = cost.labels.reshape(-1)
        counts = labels != cost.ignore_index
        labels, z, loss = labels[counts], z[counts], "cross-entropy"
        jacobians = [jacobian[counts] for jacobian in jacobians]
    else:
        labels, loss = cost.target.reshape(z.shape), "squared-error"
    features = {str(t): jacobian for t, jacobian in enumerate(jacobians) if jacobian.shape[-1]}
    return ConvexTuning(features, labels, offset=z, loss=loss, **options)
