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
    from theory.affine_subspace import AffineSubspace
    from theory.claims import Claim, Evidence, Outcome, Threshold, Verdict, judge
    from theory.closed_loop import PIDCorrection, PIDGains, ProjectionCorrection
    from theory.continuous import ContinuousDepth
    from theory.convex import ConvexTuning, GroupLasso, NormBall, NuclearNorm, Ridge, solve_convex
    from theory.costs import CrossEntropyCost, QuadraticCost, SquaredErrorCost
    from theory.curvature import GaussNewtonCurvature, HessianCurvature
    from theory.errors import InputError, unknown
    from theory.feedback import AffineFeedback, FeedbackLaw, closed_loop
    from theory.linearisation import Linearisation
    from theory.lq import LQPolicy, riccati
    from theory.problem import Box, ControlProblem, Controls, Cost, Dynamics, Evaluation, Residual
    from theory.projections import DenseProjection, FastfoodProjection, Projection
    from theory.reachability import Reachability
    from theory.solvers import (
        DDP,
        ILQR,
        MSA,
        ExactArgmin,
        ExtendedMSA,
        GaussNewton,
        GradientStep,
        InnerLBFGS,
        Iterate,
        NewtonCG,
        Riccati,
        Shooting,
        Solution,
        Solver,
        Status,
        solve,
    )
    from theory.steering import OutputSteering, steer_output
    from theory.systems import LinearDynamics, LowRankDynamics, ResidualNetwork, Segment

_HOME = {
    "theory.affine_subspace": ("AffineSubspace",),
    "theory.claims": (
        "Claim",
        "Evidence",
        "Outcome",
        "Threshold",
        "Verdict",
        "judge",
    ),
    "theory.closed_loop": (
        "PIDCorrection",
        "PIDGains",
        "ProjectionCorrection",
    ),
    "theory.continuous": ("ContinuousDepth",),
    "theory.convex": (
        "ConvexTuning",
        "GroupLasso",
        "NormBall",
        "NuclearNorm",
        "Ridge",
        "solve_convex",
    ),
    "theory.costs": (
        "CrossEntropyCost",
        "QuadraticCost",
        "SquaredErrorCost",
    ),
    "theory.curvature": (
        "GaussNewtonCurvature",
        "HessianCurvature",
    ),
    "theory.errors": (
        "InputError",
        "unknown",
    ),
    "theory.feedback": (
        "AffineFeedback",
        "FeedbackLaw",
        "closed_loop",
    ),
    "theory.linearisation": ("Linearisation",),
    "theory.lq": (
        "LQPolicy",
        "riccati",
    ),
    "theory.problem": (
        "Box",
        "ControlProblem",
        "Controls",
        "Cost",
        "Dynamics",
        "Evaluation",
        "Residual",
    ),
    "theory.projections": (
        "DenseProjection",
        "FastfoodProjection",
        "Projection",
    ),
    "theory.reachability": ("Reachability",),
    "theory.solvers": (
        "DDP",
        "ILQR",
        "MSA",
        "ExactArgmin",
        "ExtendedMSA",
        "GaussNewton",
        "GradientStep",
        "InnerLBFGS",
        "Iterate",
        "NewtonCG",
        "Riccati",
        "Shooting",
        "Solution",
        "Solver",
        "Status",
        "solve",
    ),
    "theory.steering": (
        "OutputSteering",
        "steer_output",
    ),
    "theory.systems": (
        "LinearDynamics",
        "LowRankDynamics",
        "ResidualNetwork",
        "Segment",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AffineFeedback",
    "AffineSubspace",
    "Box",
    "Claim",
    "ContinuousDepth",
    "ControlProblem",
    "Controls",
    "ConvexTuning",
    "Cost",
    "CrossEntropyCost",
    "DDP",
    "DenseProjection",
    "Dynamics",
    "Evaluation",
    "Evidence",
    "ExactArgmin",
    "ExtendedMSA",
    "FastfoodProjection",
    "FeedbackLaw",
    "GaussNewton",
    "GaussNewtonCurvature",
    "GradientStep",
    "GroupLasso",
    "HessianCurvature",
    "ILQR",
    "InnerLBFGS",
    "InputError",
    "Iterate",
    "LQPolicy",
    "LinearDynamics",
    "Linearisation",
    "LowRankDynamics",
    "MSA",
    "NewtonCG",
    "NormBall",
    "NuclearNorm",
    "Outcome",
    "OutputSteering",
    "PIDCorrection",
    "PIDGains",
    "Projection",
    "ProjectionCorrection",
    "QuadraticCost",
    "Reachability",
    "Residual",
    "ResidualNetwork",
    "Riccati",
    "Ridge",
    "Segment",
    "Shooting",
    "Solution",
    "Solver",
    "SquaredErrorCost",
    "Status",
    "Threshold",
    "Verdict",
    "closed_loop",
    "judge",
    "riccati",
    "solve",
    "solve_convex",
    "steer_output",
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
