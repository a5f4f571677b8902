"""What the linearisation of a network leaves out, as far as it was looked for.

*What is proved.* Let ``J(v) = Phi(z(v)) + w/2 ||v||^2`` with convex ``Phi`` and outputs ``z(u + d)
= z + G d + rho(d)``. At any ``z'`` with ``a = grad Phi(z')``, and so at the linearised outputs of
the point that the bound is made from, for all ``d`` of the ball,

    J(u + d) >= Phi(z') + <a, z + G d - z'> + w/2 ||u + d||^2 + <a, rho(d)>,

whose first three terms are not below ``J(u) - upper``, the bound of the linearised problem. Hence

    J(u) - min J  <=  upper + R,      R = max over the ball of -<a, rho(d)>.

*What is not.* ``R`` is the maximum of a function that is not concave, and only looked for: by
projected gradient steps from both ends of the direction in which the second derivative of ``<a,
z(u + d)>`` at ``u`` is lowest, from the point of the bound, and from random points of the sphere;
and by that second derivative itself, ``1/2 kappa r^2``. Both are from below: a larger remainder may
lie elsewhere. So what is added to the bound is an estimate.

Source: Rockafellar, *Convex Analysis*, 1970, theorem 25.1 (the inequality of subgradients).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltacontrol.theory.certificates.certificate import Remainder
from deltacontrol.theory.certificates.tangent import Ball
from deltacontrol.theory.control.problem import ControlProblem, Controls, Cost
from deltacontrol.theory.linear.curvature import HessianCurvature
from deltacontrol.theory.linear.krylov import lanczos
from deltacontrol.theory.linear.operator import flatten, unflatten

__all__ = ["DualRemainder"]

PRODUCTS = 16
"""Lanczos steps."""


@dataclass(frozen=True, eq=False)
class _Weighted(Cost):
    """``Phi(x) = <a, x>``."""

    weights: Tensor

    def terminal(self, x: Tensor) -> Tensor:
        return (self.weights * x).sum()


class DualRemainder:
    """``-<a, rho(d)>`` as a function of the step ``d`` from ``u``.

    Args:
        problem: its dynamics give the outputs.
        u: where it is linearised.
        weights: ``a``, of the shape of the outputs.
    """

    def __init__(self, problem: ControlProblem, u: Controls, weights: Tensor) -> None:
        self._problem, self._u = replace(problem, cost=_Weighted(weights)), u
        self._now = self._problem.evaluate(u)
        self._slope = flatten(self._now.gradient)
        self.points = 0

    def __call__(self, d: Tensor) -> tuple[float, Tensor]:
        """The remainder and its gradient."""
        self.points += 1
        moved = tuple(u + e for u, e in zip(self._u, unflatten(d, self._u), strict=True))
        there = self._problem.evaluate(moved)
        change = float(there.objective - self._now.objective)
        return float(self._slope @ d) - change, self._slope - flatten(there.gradient)

    def estimate(
        self, ball: Ball, witness: Tensor, *, starts: int, steps: int, seed: int
    ) -> Remainder:
        """Look for the largest remainder on the ball.

        Args:
            ball: of steps; it holds zero.
            witness: one start.
            starts: random ones.
            steps: of each search.
            seed: of the random starts.
        """
        draw = torch.Generator().manual_seed(seed)
        rays = torch.randn(starts + 1, len(witness), generator=draw, dtype=torch.float64)
        rays = rays.to(witness.device) / rays.norm(dim=1, keepdim=True)
        lowest, direction = self._lowest(rays[0])
        directions = [direction, -direction, *rays[1:]]
        points = [witness, *(ball.centre + ball.radius * ray for ray in directions)]
        found = max(self._climbed(point, ball, steps) for point in points)
        kappa = max(0.0, -lowest)
        reach = ball.radius + float(ball.centre.norm())
        return Remainder(max(found, 0.0), 0.5 * kappa * reach**2, kappa, self.points)

    def _lowest(self, start: Tensor) -> tuple[float, Tensor]:
        """The lowest curvature of ``<a, z>`` at ``u``, less the residual, and its direction."""
        curvature = HessianCurvature(self._problem, self._u, self._now)
        eps = torch.finfo(curvature.dtype).eps
        found = lanczos(
            lambda rows: rows @ curvature,
            start[None],
            min(PRODUCTS, len(start)),
            rounding=eps**0.5,
            one_operator=True,
        )
        values, vectors = torch.linalg.eigh(found.matrix[0])
        residual = float(found.rest[0] * vectors[-1, 0].abs())
        direction = vectors[:, 0] @ found.basis[:, 0]
        return float(values[0]) - residual, direction / direction.norm()

    def _climbed(self, d: Tensor, ball: Ball, steps: int) -> float:
        """The largest remainder that projected gradient steps meet."""
        value, slope = self(d)
        size = ball.radius / max(float(slope.norm()), torch.finfo(slope.dtype).tiny)
        for _ in range(steps):
            ahead = ball.project(d + size * slope)
            there, slope_there = self(ahead)
            if there > value:
                d, value, slope, size = ahead, there, slope_there, 2 * size
            else:
                size *= 0.25
        return value
