"""The steady optimum and its predicted rate, against closed forms and solves."""

from __future__ import annotations

import math

import pytest
import torch

from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.depth.turnpike import SteadyState, two_sided_rate
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers import solve
from deltacontrol.theory.solvers.ilqr import DDP

F64 = torch.float64


def tracking(a: float, b: float, q: float, r: float, horizon: int = 60) -> ControlProblem:
    """``x' = a x + b u``, ``l = q/2 (x - 1)^2 + r/2 u^2`` up to a constant, ``Phi = 1/2 x^2``."""
    one = torch.ones(1, 1, dtype=F64)
    cost = QuadraticCost(
        Q=[q * one] * horizon, R=[r * one] * horizon, q=[-q * one[0]] * horizon, Qf=one
    )
    return ControlProblem(LinearDynamics.constant(horizon, a * one, b * one), cost, -one[0])


@pytest.mark.parametrize(("b", "q", "r"), [(1.0, 1.0, 1.0), (0.3, 2.0, 0.7), (2.0, 0.01, 1.0)])
def test_the_scalar_rate_has_a_closed_form(b: float, q: float, r: float) -> None:
    steady = SteadyState.of(tracking(1.0, b, q, r))
    assert steady.rate == pytest.approx(2 * math.asinh(b / 2 * math.sqrt(q / r)), rel=1e-10)
    assert float(steady.x) == pytest.approx(1.0) and float(steady.u) == pytest.approx(
        0.0, abs=1e-12
    )
    assert steady.residual <= 1e-10


@pytest.mark.slow
def test_the_solved_controls_decay_at_the_predicted_rate() -> None:
    problem = tracking(1.1, 0.4, 1.0, 1.0)
    steady = SteadyState.of(problem)
    solution = solve(problem, DDP(), problem.zero_controls(), max_steps=5, tol=1e-9)
    gaps = (torch.cat(solution.controls) - steady.u).abs()
    # Away from the middle, where one entry passes through zero.
    for part in (gaps[:20], gaps[40:]):
        assert two_sided_rate(part) == pytest.approx(steady.rate, rel=1e-3)


def test_the_stationary_law_reaches_the_steady_state_where_constant_controls_do_not() -> None:
    problem = tracking(1.1, 0.4, 1.0, 1.0)
    steady = SteadyState.of(problem)
    assert (problem.rollout(steady.law(problem))[-1] - steady.x).abs() < 1e-6
    constant = (steady.u,) * problem.dynamics.horizon
    assert (problem.rollout(constant)[-1] - steady.x).abs() > 100


def test_what_has_no_turnpike_is_refused() -> None:
    with pytest.raises(InputError, match="no stabilising law"):
        SteadyState.of(tracking(1.0, 1.0, 0.0, 1.0))
    problem = tracking(1.0, 1.0, 1.0, 1.0)
    batch = ControlProblem(problem.dynamics, problem.cost, torch.zeros(3, 1, dtype=F64))
    with pytest.raises(InputError, match="expected one example"):
        SteadyState.of(batch)
    with pytest.raises(InputError, match="positive and finite"):
        two_sided_rate(torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize("rate", [0.02, 0.3, 1.0])
def test_a_two_sided_exponential_is_recovered(rate: float) -> None:
    t = torch.arange(30, dtype=F64)
    values = 3 * torch.exp(-rate * t) + 0.1 * torch.exp(-rate * (29 - t))
    assert two_sided_rate(values) == pytest.approx(rate, rel=1e-6)
