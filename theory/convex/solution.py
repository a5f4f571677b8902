"""What a convex solve hands over: a solution and the proof of how good it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from torch import Tensor

__all__ = ["ACTIVE", "ConvexSolution", "ConvexStatus"]

# A group or singular value counts as nonzero if it is larger than this share of the largest.
ACTIVE = 1e-6


class ConvexStatus(StrEnum):
    """What the certificate says."""

    OPTIMAL = "optimal"
    INACCURATE = "inaccurate"
    UNBOUNDED = "unbounded"


@dataclass(frozen=True, eq=False)
class ConvexSolution:
    """A solution, and the proof of how good it is.

    Attributes:
        weight: ``lambda``.
        objective: ``P(u)``, computed from the controls.
        loss: ``L``, its first term.
        bound: ``D(a)``, computed from ``dual``: no controls have a smaller objective.
        gap: ``P(u) - D(a)``.
        status: optimal if the gap is at most the tolerance times ``max(1, |P|)``.
        names: the names of the groups.
        dual: ``a``, ``(N, K)``: for cross-entropy the residual ``p - e_y`` of probabilities ``p``.
        logits: ``z + G u``, ``(N, K)``.
        norms: the Euclidean (Frobenius) norm of each group's control.
        ranks: for each group the number of its singular values (of a vector: its length) above
            `ACTIVE` times the largest of all groups.
        rank_bounds: what that number is at most in every optimum, as the gap proves.
        rounds: how often the program was solved, each time with a larger working set.
        solver: the solver that was used last, or "none" where zero is optimal.
        seconds: the time of all.
    """

    weight: float
    objective: float
    loss: float
    bound: float
    gap: float
    status: ConvexStatus
    names: tuple[str, ...]
    dual: Tensor
    logits: Tensor
    norms: tuple[float, ...]
    ranks: tuple[int, ...]
    rank_bounds: tuple[int, ...]
    rounds: int
    solver: str
    seconds: float
    _lift: Callable[[], tuple[Tensor, ...]]

    @property
    def active(self) -> tuple[str, ...]:
        """The groups of rank 1 or more."""
        return tuple(n for n, rank in zip(self.names, self.ranks, strict=True) if rank)

    @cached_property
    def controls(self) -> tuple[Tensor, ...]:
        """The change of the controls, one tensor of its shape for each group."""
        return self._lift()
