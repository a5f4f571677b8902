"""A convex loss of outputs that are affine in the controls, on a ball.

    f(d) = Phi(z + G d) + w/2 ||u + d||^2,      ``G`` of shape (outputs, controls),

is a head on frozen features, linear dynamics with a convex terminal cost, or any network linearised
at ``u``. Its curvature is at least the weight decay ``w``, and ``Phi`` may be any convex function,
as are the mean cross-entropy, its binary form and the squared error.

*Few unknowns.* The loss sees ``d`` through ``G d``. The orthogonal projection on the span of the
rows of ``G``, of ``u`` and of the ball's centre changes no ``G d``, and lengthens neither ``u + d``
nor the way to the centre; so a minimiser lies there, and has at most as many unknowns as there are
outputs, plus two.

*Inner solver.* For a multiplier ``lambda`` Newton's method minimises ``f(d) + lambda/2 ||d -
c||^2``, and ``lambda`` is sought with which that point is on the sphere. It need not succeed: the
bound is that of the point that it found, evaluated with all controls
(`deltacontrol.theory.certificates.tangent`).

Source: Boyd & Vandenberghe, *Convex Optimization*, 2004, section 9.5 (Newton's method).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from deltacontrol.theory.certificates.tangent import Ball, Model, to_boundary
from deltacontrol.theory.quadratic.derivatives import hessian

__all__ = ["AffineLoss"]

_STEPS, _HALVINGS = 100, 40
_LEAST = 1e-13


class AffineLoss(Model):
    """``f(d) - f(0)`` of the loss above.

    Args:
        loss: ``Phi``, convex, a scalar of outputs of the shape of ``outputs``.
        outputs: ``z``, those at ``d = 0``.
        features: ``G``, ``(R, n)`` with ``R`` the number of outputs.
        controls: ``u``, ``(n,)``.
        weight_decay: ``w``.
    """

    def __init__(
        self,
        loss: Callable[[Tensor], Tensor],
        outputs: Tensor,
        features: Tensor,
        controls: Tensor,
        weight_decay: float,
    ) -> None:
        self.loss, self.outputs, self.features = loss, outputs, features
        self.controls, self.curvature = controls, weight_decay
        self._start = float(loss(outputs))
        self.scale = abs(self._start)

    def outputs_at(self, d: Tensor) -> Tensor:
        """``z + G d``."""
        return self.outputs + (self.features @ d).reshape(self.outputs.shape)

    def dual(self, d: Tensor) -> Tensor:
        """``a = grad Phi(z + G d)``, of the shape of the outputs."""
        with torch.enable_grad():
            z = self.outputs_at(d).detach().requires_grad_()
            return torch.autograd.grad(self.loss(z), z)[0]

    def change(self, d: Tensor) -> float:
        """``f(d) - f(0)``."""
        decay = self.curvature * float(self.controls @ d + 0.5 * d @ d)
        return float(self.loss(self.outputs_at(d))) - self._start + decay

    def slope(self, d: Tensor) -> Tensor:
        """``G'a + w (u + d)``."""
        pulled = self.features.mT @ self.dual(d).reshape(-1)
        return pulled + self.curvature * (self.controls + d)

    def minimiser(self, ball: Ball) -> Tensor:
        """Newton's point on the ball, sought in few unknowns."""
        rows = torch.cat([self.features, self.controls[None], ball.centre[None]])
        if len(rows) >= rows.shape[1]:
            return self._on_ball(ball)
        basis = torch.linalg.qr(rows.mT)[0]
        small = AffineLoss(
            self.loss,
            self.outputs,
            self.features @ basis,
            basis.mT @ self.controls,
            self.curvature,
        )
        return basis @ small._on_ball(Ball(basis.mT @ ball.centre, ball.radius))

    def _on_ball(self, ball: Ball) -> Tensor:
        c = ball.centre
        steepest = float(self.slope(c).norm())
        if steepest == 0:
            return c
        if self.curvature > 0:
            free = self._newton(0.0, c, c)
            if float((free - c).norm()) <= ball.radius:
                return free
        if math.isinf(ball.radius):
            return c
        # lambda ||d - c|| <= ||grad f(c)||, since the slope of a convex function is monotone.
        top, last = steepest / ball.radius, c

        def step(multiplier: float) -> Tensor:
            nonlocal last
            last = self._newton(multiplier, c, last)
            return last - c

        return c + to_boundary(step, _LEAST * top, top, ball.radius, xtol=1e-11)

    def _newton(self, multiplier: float, c: Tensor, start: Tensor) -> Tensor:
        """The minimiser of ``f(d) + multiplier/2 ||d - c||^2``, from a start."""
        d = start
        value, slope = self._pulled(d, c, multiplier)
        enough = 1e-13 * float(self.slope(c).norm())
        for _ in range(_STEPS):
            if float(slope.norm()) <= enough:
                break
            step = -torch.cholesky_solve(slope[:, None], self._factor(d, multiplier))[:, 0]
            fall = -float(slope @ step)
            share = 1.0
            for _ in range(_HALVINGS):
                ahead = d + share * step
                there, slope_there = self._pulled(ahead, c, multiplier)
                # Near the minimum the value drowns in rounding, the slope does not.
                falls = there <= value - 1e-4 * share * fall
                if falls or (share == 1.0 and slope_there.norm() < 0.5 * slope.norm()):
                    break
                share *= 0.5
            else:
                break
            d, value, slope = ahead, there, slope_there
        return d

    def _pulled(self, d: Tensor, c: Tensor, multiplier: float) -> tuple[float, Tensor]:
        """Value and slope of ``f - f(0)`` with the pull to the centre."""
        away = d - c
        value = self.change(d) + 0.5 * multiplier * float(away @ away)
        return value, self.slope(d) + multiplier * away

    def _factor(self, d: Tensor, multiplier: float) -> Tensor:
        """Cholesky's factor of the Hessian, lifted by its rounding error."""
        z = self.outputs_at(d)
        bent = hessian(lambda x, _: self.loss(x), z, z.new_zeros(1, 0), 1)[0]
        H = self.features.mT @ (bent @ self.features)
        size = float(H.diagonal().max().clamp_min(0)) + self.curvature + multiplier
        lift = self.curvature + multiplier + 10 * len(H) * torch.finfo(H.dtype).eps * size
        return torch.linalg.cholesky(H + lift * torch.eye(len(H), dtype=H.dtype, device=H.device))
