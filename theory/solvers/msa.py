"""The method of successive approximations (MSA).

States come from a forward rollout under the present controls and costates from a backward sweep
along them; then each control is improved for its own Hamiltonian,

    u_t <- argmin_v H_t(x_t, v, p_{t+1}),    at all steps at once.

With a gradient step instead of the minimiser, the iterates are those of gradient descent on ``J``,
as ``grad_u H_t = dJ/du_t``. With the minimiser it is not a descent method. On a linear-quadratic
problem it is ``u <- u - R^{-1} grad J(u)``, ``R`` the blocks of the Hessian of ``H`` in ``u``, and
with ``hess J = R + M`` it converges from every start if and only if the spectral radius of
``R^{-1} M`` is below one; `deltacontrol.theory.solvers.emsa` mends that.

Source: Li, Chen, Tai & E, *Maximum principle based algorithms for deep learning*, JMLR 18(165),
2018, algorithm 1; Krylov & Chernous'ko, USSR Comput. Math. Math. Phys. 2(6), 1963.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.problem import ControlProblem, Controls, Evaluation
from deltacontrol.theory.solvers.minimisers import GradientStep, Minimiser, NoMinimum, Stage
from deltacontrol.theory.solvers.solving import Ending, Memory, Report, Solver, Status

__all__ = ["MSA"]


@typed
@dataclass(frozen=True)
class MSA(Solver):
    """Improve each control for its Hamiltonian, all along one trajectory and its costates.

    For a convex quadratic ``J`` and a gradient step, the iterates converge if ``step_size <
    2/lambda_max`` of its Hessian. Where a step's Hamiltonian has no minimiser, the solve ends with
    the status ``unbounded`` and names the step: the Hamiltonian of a control without running cost
    is linear or bilinear in it.

    Attributes:
        minimiser: how; a number is the step size of a `GradientStep`.

    Raises:
        InputError: if the step size is not positive.

    Example:
        ``J(u) = 1/2 (1 + u)^2 + u^2``: exact minimisation multiplies the error by -1/2 each time.

        >>> import torch
        >>> from deltacontrol.theory import ControlProblem, LinearDynamics, QuadraticCost, solve
        >>> from deltacontrol.theory.solvers.minimisers import ExactArgmin
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> cost = QuadraticCost.constant(1, Q=0 * one, R=2 * one, Qf=one)
        >>> problem = ControlProblem(LinearDynamics.constant(1, one, one), cost, x0=one[0])
        >>> start = problem.zero_controls()
        >>> solution = solve(problem, MSA(ExactArgmin()), start, max_steps=3, tol=0.0)
        >>> solution.history["residual"].tolist()
        [1.0, 0.5, 0.25, 0.125]
    """

    minimiser: Minimiser | float

    takes_box: ClassVar[bool] = True
    default_steps: ClassVar[int] = 2000
    descends: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Turn a number into a gradient step."""
        if not isinstance(self.minimiser, Minimiser):
            object.__setattr__(self, "minimiser", GradientStep(self.minimiser))

    def run(
        self, problem: ControlProblem, u0: Controls, report: Report, memory: Memory
    ) -> Ending | None:
        """Sweep forward, backward, improve; until `report` says stop."""
        assert isinstance(self.minimiser, Minimiser)
        u = u0
        while True:
            now = problem.evaluate(u)
            if report(u, now):
                return None
            try:
                u = tuple(self.minimiser.minimise(stage) for stage in _stages(problem, u, now))
            except NoMinimum as reason:
                return Ending(Status.UNBOUNDED, str(reason))


def _stages(problem: ControlProblem, u: Controls, now: Evaluation) -> Iterator[Stage]:
    """The Hamiltonian of each step as a function of its control."""
    for t, u_t in enumerate(u):
        x, p = now.states[t], now.costates[t + 1]
        yield Stage(
            step=t,
            name="H",
            objective=lambda v, t=t, x=x, p=p: problem.hamiltonian(t, x, v, p),
            control=u_t,
            gradient=now.gradient[t],
            bounds=None if problem.box is None else problem.box.bounds(t, u_t),
        )
