"""The method of successive approximations with a gradient step on the Hamiltonian.

Source: Li, Chen, Tai & E, *Maximum principle based algorithms for deep learning*, JMLR 18(165),
2018, algorithm 1, whose exact minimisation of ``H`` is replaced by a gradient step.
"""

from __future__ import annotations

from dataclasses import dataclass

from theory.errors import InputError
from theory.problem import ControlProblem, Controls
from theory.solvers.base import Memory, Report, Solver

__all__ = ["MSA"]


@dataclass(frozen=True)
class MSA(Solver):
    """``u_t <- u_t - step_size grad_u H_t(x_t, u_t, p_{t+1})`` at all steps at once.

    States come from a forward rollout under the present controls and costates from a backward
    sweep along them. As ``grad_u H_t = dJ/du_t``, the iterates are those of gradient descent on
    ``J``; for a convex quadratic ``J`` they converge if ``step_size < 2/lambda_max`` of its
    Hessian.


    Attributes:
        step_size: the length of the step, in units of the gradient.

    Raises:
        InputError: if the step size is not positive.
    """

    step_size: float

    def __post_init__(self) -> None:
        """Check the step size."""
        if not self.step_size > 0:
            raise InputError(f"step_size = {self.step_size} must be positive")

    def run(self, problem: ControlProblem, u0: Controls, report: Report, memory: Memory) -> None:
        """Sweep forward, backward, step; until `report` says stop."""
        u = u0
        while True:
            now = problem.evaluate(u)
            if report(u, now):
                return
            u = tuple(u_t - self.step_size * g_t for u_t, g_t in zip(u, now.gradient, strict=True))
