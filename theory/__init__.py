"""Discrete-time optimal control of layered systems.

=========================  ==============================================  =========================
symbol                     meaning                                         shape
=========================  ==============================================  =========================
``t = 0..L-1``             layer, the discrete time; ``L`` is the horizon
``x_t``                    state entering layer ``t``; may change shape    ``(batch, ...)``
``u_t``                    control of layer ``t``, flattened               ``(m_t,)`` for the batch
                                                                           or ``(batch, m_t)``
``f_t(x, u)``              dynamics, ``x_{t+1} = f_t(x_t, u_t)``           state to state
``l_t(x, u)``              running cost                                    scalar
``Phi(x_L)``               terminal cost, averaged over the batch          scalar
``J(u)``                   ``Phi(x_L) + sum_t l_t(x_t, u_t)``              scalar
``p_t``                    costate                                         shape of ``x_t``
``H_t(x, u, p)``           ``l_t(x, u) + <p, f_t(x, u)>``                  scalar
``theta = theta_0 + P z``  full parameters in a subspace                   ``(D,)``; ``z``: ``(d,)``
=========================  ==============================================  =========================

The sign is that of minimisation (``p_L = +grad Phi``, the control minimises ``H``);
`theory.problem` says how the literature's maximum principle follows from it. This package knows
tensors, never Transformers, and imports none of the packages above it.

The names below are imported on first use, so that `theory.errors` and `theory.claims` cost no
import of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from theory.claims import Claim, Evidence, Outcome, Threshold, Verdict, judge
    from theory.costs import CrossEntropyCost, QuadraticCost, SquaredErrorCost
    from theory.errors import InputError, unknown
    from theory.linearisation import Linearisation
    from theory.problem import Box, ControlProblem, Controls, Cost, Dynamics, Evaluation, Residual
    from theory.projections import DenseProjection, FastfoodProjection, Projection
    from theory.solvers import MSA, Iterate, Shooting, Solution, Solver, Status, solve
    from theory.systems import LinearDynamics, LowRankDynamics, ResidualNetwork

_HOME = {
    "theory.claims": ("Claim", "Evidence", "Outcome", "Threshold", "Verdict", "judge"),
    "theory.costs": ("CrossEntropyCost", "QuadraticCost", "SquaredErrorCost"),
    "theory.errors": ("InputError", "unknown"),
    "theory.linearisation": ("Linearisation",),
    "theory.problem": (
        "Box",
        "ControlProblem",
        "Controls",
        "Cost",
        "Dynamics",
        "Evaluation",
        "Residual",
    ),
    "theory.projections": ("DenseProjection", "FastfoodProjection", "Projection"),
    "theory.solvers": ("MSA", "Iterate", "Shooting", "Solution", "Solver", "Status", "solve"),
    "theory.systems": ("LinearDynamics", "LowRankDynamics", "ResidualNetwork"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "MSA",
    "Box",
    "Claim",
    "ControlProblem",
    "Controls",
    "Cost",
    "CrossEntropyCost",
    "DenseProjection",
    "Dynamics",
    "Evaluation",
    "Evidence",
    "FastfoodProjection",
    "InputError",
    "Iterate",
    "LinearDynamics",
    "Linearisation",
    "LowRankDynamics",
    "Outcome",
    "Projection",
    "QuadraticCost",
    "Residual",
    "ResidualNetwork",
    "Shooting",
    "Solution",
    "Solver",
    "SquaredErrorCost",
    "Status",
    "Threshold",
    "Verdict",
    "judge",
    "solve",
    "unknown",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'theory' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
