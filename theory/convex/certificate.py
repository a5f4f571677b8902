"""Pairs of a primal and a dual point of linearised tuning, and what their gap proves.

With ``P`` and ``D`` as in `deltacontrol.theory.convex.tuning`, a solver's ``u`` gives ``a = grad
l(z + G u)``, which is in the domain of ``l*``; its multipliers of the equation that defines the
logits are another estimate of ``a``, moved by rounding into that domain. For both, ``R*(v)`` may
still be infinite, because some ``||v_g||_o`` exceeds ``lambda w_g`` a little. For every ``0 <= s <=
1`` the multiple ``s a`` is in the domain of ``l*`` too (`deltacontrol.theory.convex.losses`), so
``s = min(1, lambda / max_g ||v_g||_o / w_g)`` makes feasible points. ``D`` is evaluated at both and
``P(u) - D`` of the
better one is reported: whatever the solver returns, it is a proof, and never the solver's word.

*What is certainly zero.* ``D`` is ``1/(N S)``-strongly concave for a loss of smoothness ``S``, so
the dual optimum is within ``(2 N S gap)^(1/2)`` of ``a``. Its ``v_g`` is within ``||G_g||/N`` times
this of ours, and a group, or a singular direction, whose ``v_g`` cannot reach ``lambda w_g`` is
zero in every optimum.

Source: Ndiaye, Fercoq, Gramfort & Salmon, JMLR 18(128), 2017, theorem 2 (the safe sphere) and
proposition 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deltacontrol.theory.convex.blocks import Block
from deltacontrol.theory.convex.losses import Loss
from deltacontrol.theory.convex.penalties import Penalty

__all__ = ["Certificate", "CertifiedPoint"]

# Relative rounding error of the objective and of its bound.
_ROUNDING = 1e-14


@dataclass(frozen=True, eq=False)
class CertifiedPoint:
    """Controls, and the feasible dual point ``a`` that they give; ``v`` belongs to it.

    Attributes:
        u: the controls, block by block.
        z: the logits, ``(N, K)``.
        loss: the mean loss.
        objective: ``P(u)``.
        a: the dual point, ``(N, K)``.
        pulled: ``-1/N sum_i G_i'a_i`` before ``a`` was shrunk.
        v: the same of ``a``.
        bound: ``D(a)``.
    """

    u: list[np.ndarray]
    z: np.ndarray
    loss: float
    objective: float
    a: np.ndarray
    pulled: list[np.ndarray]
    v: list[np.ndarray]
    bound: float

    @property
    def gap(self) -> float:
        """``P(u) - D(a)``."""
        return self.objective - self.bound


@dataclass(frozen=True, eq=False)
class Certificate:
    """The primal and the dual objective of one problem, at any points.

    Attributes:
        blocks: the features, in reduced coordinates.
        contrasts: ``C``: the loss sees ``z = offset + C y`` of the logits ``y`` of the blocks.
        loss: ``l``.
        penalty: ``R``.
        offset: the logits at zero, ``(N, K)``.
        targets: as the loss has them, ``(N, K)``.
    """

    blocks: Sequence[Block]
    contrasts: np.ndarray
    loss: Loss
    penalty: Penalty
    offset: np.ndarray
    targets: np.ndarray

    def logits(self, u: Sequence[np.ndarray]) -> np.ndarray:
        """``z + G u``, ``(N, K)``."""
        maps = zip(self.blocks, u, strict=True)
        y = sum((b.features @ torch.from_numpy(c.reshape(-1))).numpy() for b, c in maps)
        return self.offset + np.reshape(y, (len(self.offset), -1)) @ self.contrasts.T

    def pulled(self, a: np.ndarray) -> list[np.ndarray]:
        """``v = -1/N sum_i G_i'a_i``, block by block."""
        contrasted = torch.from_numpy(-(a @ self.contrasts) / len(a)).reshape(-1)
        maps = [block.features for block in self.blocks]
        return [(f.T @ contrasted).numpy().reshape(f.control_shape) for f in maps]

    def bound(self, a: np.ndarray, v: Sequence[np.ndarray], weight: float) -> float:
        """``D(a)``, where ``v`` is `pulled` of it."""
        conjugates = self.loss.conjugate(a, self.targets) + self.penalty.conjugate(v, weight)
        return float((a * self.offset).sum() / len(a) - conjugates)

    def point(
        self, u: list[np.ndarray], weight: float, suggested: np.ndarray | None
    ) -> CertifiedPoint:
        """The objective of ``u`` and the better of two bounds.

        They come from the gradient at ``u`` and from the solver's multipliers, which satisfy the
        constraints on ``v`` more closely where the solver is of limited accuracy.
        """
        z = self.logits(u)
        loss = self.loss.value(z, self.targets)
        objective = loss + self.penalty.value(u, weight)
        gradient = self.loss.gradient(z, self.targets)
        points = []
        for a in (gradient, suggested):
            if a is None or not np.isfinite(a).all():
                continue
            a = self.loss.nearest(a, self.targets)
            pulled = self.pulled(a)
            gauge = self.penalty.gauge(pulled)
            shrink = 1.0 if gauge <= weight else weight / gauge
            a, v = shrink * a, [shrink * block for block in pulled]
            bound = self.bound(a, v, weight)
            points.append(CertifiedPoint(u, z, loss, objective, a, pulled, v, bound))
        return max(points, key=lambda point: point.bound)

    def rank_bounds(self, point: CertifiedPoint, weight: float) -> list[int]:
        """For each block the rank that none of its optima exceeds, by the safe sphere."""
        gap = max(point.gap, 0.0) + _ROUNDING * max(1.0, abs(point.objective))
        radius = math.sqrt(2 * len(point.z) * self.loss.smoothness * gap)
        slack = [radius * block.operator_norm / len(point.z) for block in self.blocks]
        return self.penalty.rank_bounds(point.v, slack, weight)
