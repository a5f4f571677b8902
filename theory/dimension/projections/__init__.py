"""Linear maps ``P`` from a small space into a large one, ``theta = theta_0 + P z``.

``z`` is ``(d,)`` and ``P z`` is ``(D,)``, ``d <= D``. A projection is a linear operator
(`deltacontrol.theory.linear.operator`): ``P @ z`` lifts, ``P.T @ v`` is the adjoint, and ``Z @
P.T`` lifts rows. Each of the two products is the other's backward pass; they work under
`torch.func` (vmap, jvp, vjp) and to any order.

Random projections are normalised such that

    E ||P z||^2 = ||z||^2,

and all their numbers follow from a seed: the same map on every device and, up to rounding, in every
dtype. Learned ones have orthonormal columns.

===============  ==================================================  ===========  ================
name             map                                                 cost         stored
===============  ==================================================  ===========  ================
``dense``        Gaussian frame with orthonormal columns             D d          D d numbers
``gaussian``     independent Gaussians from a counter                D d drawn    nothing
``sparse-sign``  a few signs in each row, from a hash                s D          nothing
``fastfood``     ``S H G Pi H B`` by blocks                          D log d      1 to 3 bytes a row
``srht``         columns of a Hadamard matrix, with random signs     D log D      1 byte a row
``kronecker``    product of two frames                               D sqrt(d)    2 sqrt(D d)
===============  ==================================================  ===========  ================
"""

from __future__ import annotations

from typing import Literal

from deltacontrol.theory.dimension.projections.base import Projection
from deltacontrol.theory.dimension.projections.fastfood import FastfoodProjection
from deltacontrol.theory.dimension.projections.gaussian import DenseProjection, GaussianProjection
from deltacontrol.theory.dimension.projections.kronecker import KroneckerProjection
from deltacontrol.theory.dimension.projections.layered import (
    BlockDiagonalProjection,
    LayerScaledProjection,
)
from deltacontrol.theory.dimension.projections.learned import LearnedProjection
from deltacontrol.theory.dimension.projections.sparse import SparseSignProjection
from deltacontrol.theory.dimension.projections.srht import HadamardProjection

__all__ = [
    "RANDOM_PROJECTIONS",
    "BlockDiagonalProjection",
    "DenseProjection",
    "FastfoodProjection",
    "GaussianProjection",
    "HadamardProjection",
    "KroneckerProjection",
    "LayerScaledProjection",
    "LearnedProjection",
    "Projection",
    "ProjectionName",
    "SparseSignProjection",
]

ProjectionName = Literal["fastfood", "dense", "gaussian", "sparse-sign", "srht", "kronecker"]

# Each is made from (full_dim, sub_dim, seed, dtype, device).
RANDOM_PROJECTIONS = {
    "fastfood": FastfoodProjection,
    "dense": DenseProjection,
    "gaussian": GaussianProjection,
    "sparse-sign": SparseSignProjection,
    "srht": HadamardProjection,
    "kronecker": KroneckerProjection,
}
