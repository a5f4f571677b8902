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
`deltacontrol.theory.control.problem` says how the literature's maximum principle follows from it.
This package knows tensors, never Transformers, and imports none of the packages above it.

The names below are imported on first use, so that `deltacontrol.theory.errors` and
`deltacontrol.theory.claims` cost no import of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltacontrol.theory.certificates import Certificate, gap_bound, quadratic_gap
    from deltacontrol.theory.claims import Claim, Part, Threshold, Verdict
    from deltacontrol.theory.control.costs import (
        BinaryCrossEntropyCost,
        CrossEntropyCost,
        QuadraticCost,
        SquaredErrorCost,
    )
    from deltacontrol.theory.control.problem import (
        Box,
        ControlProblem,
        Controls,
        Cost,
        Dynamics,
        Evaluation,
        Residual,
    )
    from deltacontrol.theory.control.systems import (
        LinearDynamics,
        LowRankDynamics,
        ResidualNetwork,
        Segment,
    )
    from deltacontrol.theory.convex import (
        ConvexTuning,
        GroupLasso,
        NormBall,
        NuclearNorm,
        Ridge,
        solve_convex,
    )
    from deltacontrol.theory.depth.continuous import ContinuousDepth
    from deltacontrol.theory.dimension.projections import (
        DenseProjection,
        FastfoodProjection,
        Projection,
    )
    from deltacontrol.theory.errors import InputError, unknown
    from deltacontrol.theory.evidence import Evidence, Interval
    from deltacontrol.theory.feedback.affine_subspace import AffineSubspace
    from deltacontrol.theory.feedback.correction import (
        PIDCorrection,
        PIDGains,
        ProjectionCorrection,
    )
    from deltacontrol.theory.feedback.laws import AffineFeedback, FeedbackLaw, closed_loop
    from deltacontrol.theory.feedback.steering import OutputSteering, steer_output
    from deltacontrol.theory.judging import Judgement, Outcome, judge
    from deltacontrol.theory.linear.curvature import GaussNewtonCurvature, HessianCurvature
    from deltacontrol.theory.linear.linearisation import Linearisation
    from deltacontrol.theory.linear.operator import LinearOperator
    from deltacontrol.theory.linear.reachability import Reachability
    from deltacontrol.theory.lq import LQPolicy, riccati
    from deltacontrol.theory.solvers import (
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
        TorchOptimiser,
        differentiable_solve,
        solve,
    )

_HOME = {
    "deltacontrol.theory.feedback.affine_subspace": ("AffineSubspace",),
    "deltacontrol.theory.certificates": ("Certificate", "gap_bound", "quadratic_gap"),
    "deltacontrol.theory.claims": ("Claim", "Part", "Threshold", "Verdict"),
    "deltacontrol.theory.evidence": ("Evidence", "Interval"),
    "deltacontrol.theory.judging": ("Judgement", "Outcome", "judge"),
    "deltacontrol.theory.feedback.correction": (
        "PIDCorrection",
        "PIDGains",
        "ProjectionCorrection",
    ),
    "deltacontrol.theory.depth.continuous": ("ContinuousDepth",),
    "deltacontrol.theory.convex": (
        "ConvexTuning",
        "GroupLasso",
        "NormBall",
        "NuclearNorm",
        "Ridge",
        "solve_convex",
    ),
    "deltacontrol.theory.control.costs": (
        "BinaryCrossEntropyCost",
        "CrossEntropyCost",
        "QuadraticCost",
        "SquaredErrorCost",
    ),
    "deltacontrol.theory.linear.curvature": (
        "GaussNewtonCurvature",
        "HessianCurvature",
    ),
    "deltacontrol.theory.errors": (
        "InputError",
        "unknown",
    ),
    "deltacontrol.theory.feedback.laws": (
        "AffineFeedback",
        "FeedbackLaw",
        "closed_loop",
    ),
    "deltacontrol.theory.linear.linearisation": ("Linearisation",),
    "deltacontrol.theory.lq": (
        "LQPolicy",
        "riccati",
    ),
    "deltacontrol.theory.linear.operator": ("LinearOperator",),
    "deltacontrol.theory.control.problem": (
        "Box",
        "ControlProblem",
        "Controls",
        "Cost",
        "Dynamics",
        "Evaluation",
        "Residual",
    ),
    "deltacontrol.theory.dimension.projections": (
        "DenseProjection",
        "FastfoodProjection",
        "Projection",
    ),
    "deltacontrol.theory.linear.reachability": ("Reachability",),
    "deltacontrol.theory.solvers": (
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
        "TorchOptimiser",
        "differentiable_solve",
        "solve",
    ),
    "deltacontrol.theory.feedback.steering": (
        "OutputSteering",
        "steer_output",
    ),
    "deltacontrol.theory.control.systems": (
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
    "BinaryCrossEntropyCost",
    "Box",
    "Certificate",
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
    "Interval",
    "Iterate",
    "Judgement",
    "LQPolicy",
    "LinearDynamics",
    "LinearOperator",
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
    "Part",
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
    "TorchOptimiser",
    "Verdict",
    "closed_loop",
    "differentiable_solve",
    "gap_bound",
    "judge",
    "quadratic_gap",
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
