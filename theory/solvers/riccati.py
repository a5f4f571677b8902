"""Linear-quadratic problems, solved exactly by the Riccati recursion.

Source: Bertsekas, *Dynamic Programming and Optimal Control*, vol. 1, 4th ed., 2017, section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.curvature import Curvature, HessianCurvature
from deltacontrol.theory.lq import LQFactor, LQPolicy, UnboundedError, factorise, riccati
from deltacontrol.theory.lq.recursion import require_precision
from deltacontrol.theory.solvers.solving import Ending, Memory, Report, Solver, Status

__all__ = ["LQPolicy", "Riccati", "riccati"]


@dataclass(frozen=True)
class Riccati(Solver):
    """The minimum of a linear-quadratic problem in one iteration, and its feedback gains.

    The recursion runs once, for the quadratic part. An iteration then solves for the change of the
    controls, with the gradient ``g_t = dJ/du_t`` under the present ones as the linear term:

        min  sum_t g_t'du_t + 1/2 (the quadratic part along dx_{t+1} = A_t dx_t + B_t du_t),

    ``dx_0 = 0``. A second iteration thus removes the rounding errors of the first (iterative
    refinement); where it no longer halves the residual, the solve ends.

    With per-example controls the examples are separate problems with the same matrices. With shared
    ones the deviations ``x_i - mean(x)`` do not feel the control, and the mean is controlled as one
    state; the gain on all examples together is ``K_t`` divided by their number, repeated.

    Where the problem is unbounded the solve says so and names the step. Where ``R + B'PB`` is
    singular but the cost is bounded, the change of least norm is taken.

    Raises:
        InputError: from `run`, if the problem is not `LinearDynamics` with `QuadraticCost`, or if
            some controls are shared and others are not.
    """

    linear_quadratic: ClassVar[bool] = True
    curvature: ClassVar[type[Curvature]] = HessianCurvature

    def run(
        self, problem: ControlProblem, u0: Controls, report: Report, memory: Memory
    ) -> Ending | None:
        """Solve, refine until `report` says stop or the residual no longer halves."""
        exact = _Exact(problem, u0)
        u, before = u0, float(memory.get("before", math.inf))
        while True:
            now = problem.evaluate(u)
            norm = problem.residual_of(u, now.gradient).norm
            if report(u, now, {"before": torch.tensor(before, dtype=torch.float64)}):
                return Ending(gains=exact.gains() if math.isfinite(norm) else None)
            if norm > 0.5 * before:
                reason = "rounding errors fill the residual, which refinement no longer halves"
                return Ending(Status.LINE_SEARCH_FAILED, reason, exact.gains())
            try:
                du = exact.correction(now.gradient)
            except UnboundedError as error:
                try:
                    exact.require_precision()
                except InputError as rounding:
                    return Ending(Status.LINE_SEARCH_FAILED, str(rounding))
                return Ending(Status.UNBOUNDED, str(error))
            u, before = tuple(a + b for a, b in zip(u, du, strict=True)), norm


@dataclass(frozen=True, eq=False)
class _Exact:
    """The quadratic part of a problem, factorised when it is first needed."""

    problem: ControlProblem
    u0: Controls

    def __post_init__(self) -> None:
        """Check that the problem is of the class."""
        dynamics, cost = self.problem.dynamics, self.problem.cost
        if not isinstance(dynamics, LinearDynamics) or not isinstance(cost, QuadraticCost):
            raise InputError(
                "Riccati needs LinearDynamics and QuadraticCost, but the problem has "
                f"{type(dynamics).__name__} and {type(cost).__name__}; take ILQR, which solves one "
                "such problem an iteration"
            )
        if len({u.ndim for u in self.u0}) > 1:
            raise InputError(
                "Riccati needs controls that all are shared, (m_t,), or all are per example, "
                f"(batch, m_t), but their shapes are {[tuple(u.shape) for u in self.u0]}"
            )

    @property
    def num_separate(self) -> int:
        """The number of examples with controls of their own; 1 for shared controls."""
        return self.u0[0].shape[0] if self.u0 and self.u0[0].ndim == 2 else 1

    @cached_property
    def factor(self) -> LQFactor:
        """The recursion.

        Raises:
            UnboundedError: if ``R + B'PB`` is indefinite, or singular such that the cost falls
                along its null space.
        """
        dynamics, cost = self.problem.dynamics, self.problem.cost
        assert isinstance(dynamics, LinearDynamics) and isinstance(cost, QuadraticCost)
        factor = factorise(dynamics.A, dynamics.B, cost.Q, cost.R, cost.Qf, cost.N)
        if factor.conflicts:
            # The slope along the null space is an affine function of the controls before that step.
            # If it is not zero for all of them, it is not at random ones.
            generator = torch.Generator().manual_seed(0)
            moved = tuple(
                u + torch.randn(u.shape, generator=generator, dtype=torch.float64).to(u)
                for u in self.u0
            )
            factor.policy(r=self._scaled(self.problem.gradient(moved)))
        return factor

    def require_precision(self) -> None:
        """Refuse a problem that only the rounding of float32 makes unbounded."""
        dynamics, cost = self.problem.dynamics, self.problem.cost
        assert isinstance(dynamics, LinearDynamics) and isinstance(cost, QuadraticCost)
        require_precision(dynamics.A, dynamics.B, cost.Q, cost.R, cost.Qf, cost.N)

    def correction(self, gradient: Controls) -> Controls:
        """The exact change of the controls."""
        policy = self.factor.policy(r=self._scaled(gradient)) if gradient else None
        if policy is None:
            return ()
        start = gradient[0].new_zeros(self.factor.state_sizes[0])
        return policy.simulate(start).controls

    def gains(self) -> tuple[Tensor, ...] | None:
        """``K_t``; on all examples together if they share the control. None if unbounded."""
        try:
            gains = self.factor.policy().gains
        except UnboundedError:
            return None
        if self.u0 and self.u0[0].ndim == 2:
            return gains
        examples = self.problem.x0.shape[:-1].numel()
        return tuple(K.repeat(1, examples) / examples for K in gains)

    def _scaled(self, gradient: Controls) -> Controls:
        """The gradients of each example's own cost, of which ``J`` is the mean."""
        return tuple(self.num_separate * g for g in gradient)
