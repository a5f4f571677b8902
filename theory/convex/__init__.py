"""Linearised delta-tuning and linear-quadratic control as convex programs with certificates."""

from theory.convex.features import DenseFeatures, Features, OuterProducts, rotation
from theory.convex.linearised import linearised_tuning, logit_jacobians
from theory.convex.penalties import NormBall, Penalty, Ridge
from theory.convex.quadratic import QuadraticSolution, solve_convex
from theory.convex.selection import GroupLasso, NuclearNorm
from theory.convex.solution import ConvexSolution, ConvexStatus
from theory.convex.tuning import ConvexTuning

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
