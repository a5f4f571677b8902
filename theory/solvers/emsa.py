"""Extended MSA: the method of successive approximations, made to descend.

Along the states ``x`` and costates ``p`` of the present controls ``u`` let

    D_t(v) = |f_t(x_t, v) - x_{t+1}|^2 + |grad_x H_t(x_t, v, p_{t+1}) - p_t|^2,
    K_t(v) = H_t(x_t, v, p_{t+1}) + rho/2 D_t(v),

the augmented Hamiltonian, with ``D_t(u_t) = 0``: a control ``v`` that would move the next state or
the costate away from the trajectory on which ``H_t`` was formed pays for it. One iteration lowers
each ``K_t`` on its own. There is a constant ``C`` (of the Lipschitz constants of ``f``, ``grad f``
and ``grad Phi`` on the region in use) with

    J(v) - J(u) <= sum_t [H_t(x_t, v_t, p_{t+1}) - H_t(x_t, u_t, p_{t+1})] + C sum_t D_t(v_t),

so that for ``rho >= 2 C`` the sum of the ``K_t`` is a majorant of ``J`` that touches it at ``u``:
lowering the ``K_t``, by however little, lowers ``J`` by at least as much. And as ``grad K_t = grad
H_t`` at ``u_t``, only a stationary ``u`` is left unchanged. The notebooks
`proofs_notebooks/03_emsa_descent.py` and `proofs_notebooks/04_hamiltonian_bound.py` prove both.

Norms. In a batch each example has its own trajectory and ``J`` is the mean: ``|.|^2`` is the mean
over the examples of squared Euclidean norms, of the states and of the *example's* costate, which is
``N`` times the one that `ControlProblem` keeps, ``N`` the number of examples. So ``rho`` does not
depend on the batch size. A state ``(n,)`` is one example.

Source: Li, Chen, Tai & E, *Maximum principle based algorithms for deep learning*, JMLR 18(165),
2018, lemma 2 and algorithm 2, there with the signs of a maximisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.problem import ControlProblem, Controls, Evaluation
from deltacontrol.theory.control.work import count
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.linearisation import differentiable_attention
from deltacontrol.theory.solvers.minimisers import InnerLBFGS, Minimiser, NoMinimum, Stage
from deltacontrol.theory.solvers.solving import Ending, Memory, Report, Solver, Status

__all__ = ["ExtendedMSA", "StepChange", "step_change"]

_GROWTH, _SHRINKAGE = 4.0, 0.5
_DESCENT = 0.1
_TRIALS = 50


@dataclass(frozen=True, eq=False)
class StepChange:
    """What another control at one step changes there, states and costates of the others held.

    Attributes:
        hamiltonian: ``H_t(x_t, v, p_{t+1}) - H_t(x_t, u_t, p_{t+1})``.
        state: ``|f_t(x_t, v) - f_t(x_t, u_t)|^2``, the mean over the examples.
        costate: ``|grad_x H_t(x_t, v, p_{t+1}) - grad_x H_t(x_t, u_t, p_{t+1})|^2``, the mean over
            the examples, with the costate of the example; zero where the state holds integers.
    """

    hamiltonian: Tensor
    state: Tensor
    costate: Tensor

    @property
    def squares(self) -> Tensor:
        """``D_t(v)``, the sum of the two squares."""
        return self.state + self.costate


def step_change(
    problem: ControlProblem, t: int, x: Tensor, p_next: Tensor, u: Tensor, v: Tensor
) -> StepChange:
    """Put ``v`` in the place of ``u`` at one step.

    Args:
        problem: the problem.
        t: the step.
        x: the state ``x_t``.
        p_next: the costate ``p_{t+1}``, as `ControlProblem` gives it.
        u: the present control.
        v: the other one; the result is differentiable in it, twice.
    """
    with differentiable_attention():
        old, new = (_parts(problem, t, x, p_next, control) for control in (u, v))
        return _difference(problem, old, new, p_next)


@typed
@dataclass(frozen=True)
class ExtendedMSA(Solver):
    """MSA on the augmented Hamiltonian, all steps at once, with an automatic ``rho``.

    The schedule. An iterate ``v`` is accepted if ``J(v) - J(u) <= 0.1 sum_t [K_t(v_t) -
    K_t(u_t)]``, which is certain for ``rho >= 2 C``; otherwise ``rho`` is multiplied by 4 and the
    same trajectory minimised again. After an accepted iterate ``rho`` is halved. Where differences
    of values would be lost in rounding, they are taken from the gradients at both ends. (The values
    that `InnerLBFGS` compares round too: as with `Shooting`, it gives up at a
    residual of about ``(eps |J| lambda)^(1/2)``, ``lambda`` the curvature of ``J``.)

    Attributes:
        rho: the weight of the penalty; with a schedule, its first value.
        minimiser: how ``K_t`` is lowered. `InnerLBFGS` serves any smooth problem; `ExactArgmin`
            where ``K_t`` is quadratic, as on linear-quadratic problems.
        adaptive: whether ``rho`` follows the schedule. If not, each minimiser of the ``K_t`` is
            taken, whatever it does to ``J``.

    Raises:
        InputError: if ``rho`` is not positive.
    """

    rho: float = 1.0
    minimiser: Minimiser = InnerLBFGS()
    adaptive: bool = True

    takes_box: ClassVar[bool] = True
    default_steps: ClassVar[int] = 2000

    def __post_init__(self) -> None:
        """Check rho."""
        if not 0 < self.rho < math.inf:
            raise InputError(f"rho = {self.rho} must be positive; rho = 0 is MSA")

    def run(
        self, problem: ControlProblem, u0: Controls, report: Report, memory: Memory
    ) -> Ending | None:
        """Sweep forward, backward, minimise; until `report` says stop."""
        rho = float(memory["rho"]) if "rho" in memory else self.rho
        u, now = u0, _evaluate(problem, u0)
        while not report(u, now, {"rho": torch.tensor(rho, dtype=torch.float64)}):
            for trial in range(_TRIALS):
                try:
                    v, predicted = self._minimise(problem, now, u, rho)
                except NoMinimum as reason:
                    if not self.adaptive or trial + 1 == _TRIALS:
                        return Ending(Status.UNBOUNDED, str(reason))
                    rho *= _GROWTH
                    continue
                if all(torch.equal(a, b) for a, b in zip(u, v, strict=True)):
                    return Ending(
                        Status.LINE_SEARCH_FAILED,
                        f"with rho = {rho:.3g} no inner step lowers the augmented Hamiltonian",
                    )
                new = _evaluate(problem, v)
                if not self.adaptive or _accepted((u, now), (v, new), predicted):
                    break
                rho *= _GROWTH
            else:
                return Ending(
                    Status.LINE_SEARCH_FAILED, f"even rho = {rho:.3g} does not make J decrease"
                )
            u, now = v, new
            if self.adaptive:
                rho *= _SHRINKAGE
        return None

    def _minimise(
        self, problem: ControlProblem, now: Evaluation, u: Controls, rho: float
    ) -> tuple[Controls, float]:
        """Lower every ``K_t``; the new controls and the sum of ``K_t(v_t) - K_t(u_t)``."""
        controls, total = [], 0.0
        with differentiable_attention():
            for t, u_t in enumerate(u):
                x, p_next = now.states[t], now.costates[t + 1]
                running = problem.cost.running(t, x, u_t)
                old = _Parts(running, now.states[t + 1], now.costates[t])

                def augmented(
                    v: Tensor, t: int = t, x: Tensor = x, p: Tensor = p_next, old: _Parts = old
                ) -> Tensor:
                    change = _difference(problem, old, _parts(problem, t, x, p, v), p)
                    return change.hamiltonian + rho / 2 * change.squares

                stage = Stage(
                    step=t,
                    name="the augmented H",
                    objective=augmented,
                    control=u_t,
                    gradient=now.gradient[t],
                    bounds=None if problem.box is None else problem.box.bounds(t, u_t),
                    work=2,
                )
                v_t = self.minimiser.minimise(stage)
                controls.append(v_t)
                count(stage.work)
                total += float(augmented(v_t))
        return tuple(controls), total


@dataclass(frozen=True, eq=False)
class _Parts:
    """``l_t``, ``f_t`` and ``grad_x H_t`` at one control."""

    running: Tensor
    state: Tensor
    costate: Tensor


def _parts(problem: ControlProblem, t: int, x: Tensor, p_next: Tensor, v: Tensor) -> _Parts:
    x = x.detach()

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        return problem.cost.running(t, x, v), problem.dynamics.step(t, x, v)

    if not x.is_floating_point():
        running, state = step(x)
        return _Parts(running, state, torch.zeros_like(x, dtype=state.dtype))
    (running, state), pull = torch.func.vjp(step, x)[:2]
    (costate,) = pull((torch.ones_like(running), p_next))
    return _Parts(running, state, costate)


def _difference(problem: ControlProblem, old: _Parts, new: _Parts, p_next: Tensor) -> StepChange:
    examples = problem.x0.shape[0] if problem.x0.ndim > 1 else 1
    moved = new.state - old.state.detach()
    # The difference of the states first: of two large inner products little would be left.
    return StepChange(
        hamiltonian=new.running - old.running.detach() + (p_next * moved).sum(),
        state=moved.square().sum() / examples,
        costate=(new.costate - old.costate.detach()).square().sum() * examples,
    )


def _evaluate(problem: ControlProblem, u: Controls) -> Evaluation:
    """With the attention of `_parts`, so that the changes at ``u`` itself are exactly zero."""
    with differentiable_attention():
        return problem.evaluate(u)


def _accepted(
    old: tuple[Controls, Evaluation],
    new: tuple[Controls, Evaluation],
    predicted: float,
) -> bool:
    """Whether ``J`` decreased by a fair part of what was predicted."""
    (u, at_u), (v, at_v) = old, new
    before, after = float(at_u.objective), float(at_v.objective)
    if -predicted > math.sqrt(torch.finfo(at_u.objective.dtype).eps) * abs(before):
        return after - before <= _DESCENT * predicted
    # Differences of values would be rounding. The trapezoidal rule along the step is exact to third
    # order; and at the minimum of a quadratic the decrease is half the slope.
    slope = change = 0.0
    for a, b, g, h in zip(u, v, at_u.gradient, at_v.gradient, strict=True):
        slope += float((g * (b - a)).sum())
        change += 0.5 * float(((g + h) * (b - a)).sum())
    return change <= _DESCENT * slope / 2
