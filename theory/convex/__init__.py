"""Linearised delta-tuning and linear-quadratic control as convex programs with certificates."""

from deltacontrol.theory.convex.features import DenseFeatures, Features, OuterProducts, rotation
from deltacontrol.theory.convex.linearised import linearised_tuning, logit_jacobians
from deltacontrol.theory.convex.penalties import NormBall, Penalty, Ridge
from deltacontrol.theory.convex.quadratic import QuadraticSolution, solve_convex
from deltacontrol.theory.convex.selection import GroupLasso, NuclearNorm
from deltacontrol.theory.convex.solution import ConvexSolution, ConvexStatus
from deltacontrol.theory.convex.tuning import ConvexTuning

__all__ = [
    "ConvexSolution",
    "ConvexStatus",
    "ConvexTuning",
    "DenseFeatures",
    "Features",
    "GroupLasso",
    "NormBall",
    "NuclearNorm",
    "OuterProducts",
    "Penalty",
    "QuadraticSolution",
    "Ridge",
    "linearised_tuning",
    "logit_jacobians",
    "rotation",
    "solve_convex",
]
