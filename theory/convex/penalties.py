"""Regularisers of the linearised problem, their conjugates, and the Euclidean ones.

A regulariser ``R`` of weight ``lambda`` acts on blocks of controls ``u_g``. Its conjugate
``R*(v) = sup_u <u, v> - R(u)`` closes the dual problem of `deltacontrol.theory.convex.tuning`:

==============  ================================  ================================================
penalty         ``R(u)``                          ``R*(v)``
==============  ================================  ================================================
`Ridge`         ``lambda/2 ||u||^2``              ``||v||^2 / (2 lambda)``
`Ridge`, box    same, on ``low <= u <= high``     ``sum_j max_w v_j w - lambda/2 w^2`` in the box
`NormBall`      0 where ``||u|| <= lambda``       ``lambda ||v||``
`GroupLasso`    ``lambda sum_g w_g ||u_g||_2``    0 where ``||v_g||_2 <= lambda w_g`` for all g
`NuclearNorm`   ``lambda sum_g w_g ||U_g||_*``    0 where ``||V_g||_2 <= lambda w_g`` for all g
==============  ================================  ================================================

The last two are in `deltacontrol.theory.convex.selection`.

Source: Boyd & Vandenberghe, *Convex Optimization*, 2004, section 3.3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

__all__ = ["BoxedRidge", "NormBall", "Penalty", "Ridge", "Working"]

Blocks = Sequence[np.ndarray]

# A working set: for each block that may be nonzero, None for all of it, or orthonormal (U, V) for
# the matrices U A V'.
Working = dict[int, "tuple[np.ndarray, np.ndarray] | None"]

# A dual norm above the weight by less than this (relative) is rounding, not a violation.
ROUNDING = 1e-12


class Penalty(ABC):
    """A regulariser on the blocks ``u_g``.

    Attributes:
        joint: whether all groups are one block.
        selects: whether it sets groups, or singular values, exactly to zero.
        weighs: whether a larger weight means smaller controls.
        spectral: whether it acts on the singular values of matrices.
    """

    joint: ClassVar[bool] = True
    selects: ClassVar[bool] = False
    weighs: ClassVar[bool] = True
    spectral: ClassVar[bool] = False

    def fitted(self, shapes: Sequence[tuple[int, ...]]) -> Penalty:
        """The penalty for groups of these shapes.

        Raises:
            InputError: if it cannot act on them.
        """
        return self

    @abstractmethod
    def value(self, u: Blocks, weight: float) -> float:
        """``R(u)``."""

    @abstractmethod
    def conjugate(self, v: Blocks, weight: float) -> float:
        """``R*(v)``."""

    @abstractmethod
    def expression(
        self, variables: dict[int, Any], weight: Any, num_examples: int
    ) -> tuple[Any, list[Any]]:
        """``N R(u)`` and the constraints for cvxpy variables, a parameter ``weight`` in both."""

    def gauge(self, v: Blocks) -> float:
        """The least weight with ``R*(v)`` finite."""
        return 0.0

    def feasible(self, u: Blocks, weight: float) -> list[np.ndarray]:
        """Controls moved by rounding into the domain of ``R``."""
        return list(u)

    def grow(self, v: Blocks, u: Blocks, weight: float, working: Working) -> bool:
        """Add to the working set what ``v`` says may be nonzero; False if that is nothing.

        Args:
            v: of the dual point, before it is made feasible.
            u: the present controls, which stay in the working set.
            weight: ``lambda``.
            working: changed in place.
        """
        missing = [g for g in range(len(v)) if g not in working]
        working.update(dict.fromkeys(missing))
        return bool(missing)

    def ranks(self, u: Blocks, threshold: float) -> list[int]:
        """How many singular values of each block count as nonzero."""
        return [int(np.linalg.norm(block) > threshold) for block in u]

    def rank_bounds(self, v: Blocks, slack: Sequence[float], weight: float) -> list[int]:
        """How many singular values an optimum can have if its ``v`` is within ``slack``."""
        return [min(block.shape) if block.ndim == 2 else 1 for block in v]

    def truncated(self, u: Blocks, ranks: Sequence[int]) -> list[np.ndarray]:
        """The nearest blocks of at most these ranks."""
        return list(u)


@dataclass(frozen=True)
class Ridge(Penalty):
    """``lambda/2 ||u||^2``: weight decay."""

    def value(self, u: Blocks, weight: float) -> float:
        """``lambda/2 ||u||^2``."""
        return float(0.5 * weight * sum(np.square(block).sum() for block in u))

    def conjugate(self, v: Blocks, weight: float) -> float:
        """``||v||^2 / (2 lambda)``."""
        return float(sum(np.square(block).sum() for block in v) / (2 * weight))

    def expression(
        self, variables: dict[int, Any], weight: Any, num_examples: int
    ) -> tuple[Any, list[Any]]:
        """``lambda/2 ||u||^2``."""
        import cvxpy as cp

        return 0.5 * num_examples * weight * sum(map(cp.sum_squares, variables.values())), []


@dataclass(frozen=True)
class BoxedRidge(Ridge):
    """`Ridge` on ``low <= u <= high``; the weight may be 0 where both bounds are finite."""

    low: np.ndarray
    high: np.ndarray

    @property
    def bounded(self) -> bool:
        """Whether every control has two finite bounds."""
        return bool(np.isfinite(self.low).all() and np.isfinite(self.high).all())

    def conjugate(self, v: Blocks, weight: float) -> float:
        """``sum_j max_{low<=w<=high} v_j w - lambda/2 w^2``, at ``w = clip(v_j/lambda)``."""
        (block,) = v
        # Without weight decay the maximum is at a bound, that is at clip(+-infinity).
        free = block / weight if weight > 0 else np.where(block > 0, np.inf, -np.inf)
        best = np.clip(free, self.low, self.high)
        terms = np.where(block == 0, 0.0, block * best) - 0.5 * weight * np.square(best)
        return float(terms.sum())

    def expression(
        self, variables: dict[int, Any], weight: Any, num_examples: int
    ) -> tuple[Any, list[Any]]:
        """Ridge and the bounds that are finite."""
        cost, _ = super().expression(variables, weight, num_examples)
        (u,) = variables.values()
        below, above = np.flatnonzero(np.isfinite(self.low)), np.flatnonzero(np.isfinite(self.high))
        bounds = [u[below] >= self.low[below]] if below.size else []
        bounds += [u[above] <= self.high[above]] if above.size else []
        return cost, bounds

    def feasible(self, u: Blocks, weight: float) -> list[np.ndarray]:
        """The projection on the box."""
        return [np.clip(block, self.low, self.high) for block in u]


@dataclass(frozen=True)
class NormBall(Penalty):
    """``||u|| <= lambda`` for all groups together; the weight is the radius."""

    weighs: ClassVar[bool] = False

    def value(self, u: Blocks, weight: float) -> float:
        """0 in the ball, else infinity."""
        return 0.0 if _length(u) <= weight * (1 + ROUNDING) else np.inf

    def conjugate(self, v: Blocks, weight: float) -> float:
        """``lambda ||v||``."""
        return weight * _length(v)

    def expression(
        self, variables: dict[int, Any], weight: Any, num_examples: int
    ) -> tuple[Any, list[Any]]:
        """The ball as one second-order cone."""
        import cvxpy as cp

        (u,) = variables.values()
        return cp.Constant(0.0), [cp.norm(u, 2) <= weight]

    def feasible(self, u: Blocks, weight: float) -> list[np.ndarray]:
        """Shrunk to the radius."""
        shrink = min(1.0, weight / max(_length(u), np.finfo(float).tiny))
        return [shrink * block for block in u]


def _length(blocks: Blocks) -> float:
    return float(np.sqrt(sum(np.square(block).sum() for block in blocks)))
