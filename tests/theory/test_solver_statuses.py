"""How a solve ends, and what it leaves alone, for every solver."""

from __future__ import annotations

import pytest
import torch

from deltacontrol.theory.control.costs import QuadraticCost, SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.solvers import Status, solve
from tests.theory.dense import kkt
from tests.theory.problems import residual_network, scalar, varying
from tests.theory.solver_suite import F64, GENERAL, SOLVERS, Entry, slow_marked


@pytest.mark.parametrize("entry", GENERAL, ids=lambda entry: entry.name)
def test_status_is_honest_when_the_steps_run_out(entry: Entry) -> None:
    problem = residual_network()
    start = problem.zero_controls()
    solution = solve(problem, entry.make(problem, start), start, max_steps=2, tol=1e-12)
    assert solution.status is Status.MAX_STEPS
    assert solution.iterations == 2
    assert solution.residual.norm > 1e-12
    assert "after all 2 iterations" in solution.message and "more steps" in solution.message


@pytest.mark.parametrize("entry", SOLVERS, ids=lambda entry: entry.name)
def test_no_steps_only_evaluates_the_start(entry: Entry) -> None:
    problem = scalar()
    start = problem.zero_controls()
    solution = solve(problem, entry.make(problem, start), start, max_steps=0, tol=0.0)
    assert solution.status is Status.MAX_STEPS and solution.iterations == 0
    assert all(torch.equal(a, b) for a, b in zip(solution.controls, start, strict=True))


@pytest.mark.parametrize("entry", SOLVERS, ids=lambda entry: entry.name)
def test_a_solved_start_converges_without_a_step(entry: Entry) -> None:
    problem = varying(None)
    start, _ = kkt(problem, per_example=False)
    solution = solve(problem, entry.make(problem, start), start, max_steps=9, tol=1e-10)
    assert solution.status is Status.CONVERGED and solution.iterations == 0


@pytest.mark.parametrize("entry", GENERAL, ids=lambda entry: entry.name)
def test_nan_is_divergence(entry: Entry) -> None:
    network = residual_network()
    target = torch.full((7, 4), float("nan"), dtype=F64)
    problem = ControlProblem(network.dynamics, SquaredErrorCost(target), network.x0)
    start = network.zero_controls()
    solution = solve(problem, entry.make(network, start), start, max_steps=9, tol=1e-9)
    assert solution.status is Status.DIVERGED
    assert "initial controls" in solution.message


def float32_network() -> ControlProblem:
    network = residual_network()
    dynamics = type(network.dynamics).random(5, 4, 6, 3, seed=1, dtype=torch.float32)
    cost = SquaredErrorCost(network.cost.target.float(), weight_decay=1.0)
    return ControlProblem(dynamics, cost, network.x0.float())


@pytest.mark.parametrize("entry", slow_marked(GENERAL))
def test_controls_keep_their_dtype_and_the_start_is_left_alone(entry: Entry) -> None:
    problem = float32_network()
    start = problem.zero_controls()
    solution = solve(problem, entry.make(problem, start), start, max_steps=200, tol=entry.tol32)
    assert solution.status is Status.CONVERGED, solution.message
    assert all(u.dtype == torch.float32 and u.shape == (3,) for u in solution.controls)
    assert not any(u.any() for u in start)


FALLING = [entry for entry in GENERAL if entry.kind.descends]


@pytest.mark.parametrize("entry", FALLING, ids=lambda entry: entry.name)
def test_a_concave_problem_is_unbounded_for_the_right_reason(entry: Entry) -> None:
    one, zero = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    cost = QuadraticCost(Q=[zero] * 3, R=[-one] * 3, Qf=zero, qf=one[0])
    problem = ControlProblem(LinearDynamics.constant(3, one, one), cost, one[0])
    start = problem.zero_controls()
    solution = solve(problem, entry.make(problem, start), start, max_steps=500, tol=1e-8)
    assert solution.status is Status.UNBOUNDED, solution.message
    assert "raise the running cost" in solution.message
    assert "callback" not in solution.message


@pytest.mark.parametrize("entry", slow_marked(FALLING))
@pytest.mark.one_in(4)
def test_rounding_errors_end_a_solve_in_float32(entry: Entry) -> None:
    """No solver claims more than float32 resolves, or asks for more steps there.

    Plain MSA and optimisers of a fixed rate have no line search that could tell, and take the steps
    that they are given.
    """
    problem = float32_network()
    start = problem.zero_controls()
    solution = solve(problem, entry.make(problem, start), start, max_steps=400, tol=1e-12)
    assert solution.residual.norm < entry.tol32
    assert solution.status is Status.LINE_SEARCH_FAILED, solution.message
    assert solution.iterations < 300 and "float64" in solution.message
