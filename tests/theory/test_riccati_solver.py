"""The Riccati recursion as a solver of control problems."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.lq import riccati
from deltacontrol.theory.solvers import Status, solve
from deltacontrol.theory.solvers.riccati import Riccati
from tests.theory.dense import kkt, stacked
from tests.theory.lq_problems import (
    ONE,
    parts,
    policy_of,
    random_problem,
    relative,
    with_terms,
)
from tests.theory.problems import residual_network

F64 = torch.float64


def run(problem: ControlProblem, tol: float = 1e-10, per_example: bool = False, steps: int = 5):
    start = problem.zero_controls(per_example=per_example)
    return solve(problem, Riccati(), start, max_steps=steps, tol=tol)


@pytest.mark.parametrize("per_example", [False, True])
def test_one_iteration_solves_a_batch(per_example: bool) -> None:
    problem = random_problem([3, 4, 4, 2], [2, 0, 3], seed=90, batch=5)
    solution = run(problem, per_example=per_example)
    assert solution.status is Status.CONVERGED and solution.iterations == 1
    expected, costates = kkt(problem, per_example)
    assert relative(solution.controls, expected) <= 1e-12
    for p, q in zip(solution.costates, costates, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_gains_on_a_batch_are_those_of_the_stacked_system() -> None:
    problem = random_problem([3, 4, 2], [2, 3], seed=91, batch=4)
    m = {k: [torch.as_tensor(v) for v in vs] for k, vs in stacked(problem, False).items()}
    whole = riccati(m["A"], m["B"], m["Q"][:-1], m["R"], m["Q"][-1], m["N"])
    solution = run(problem)
    assert solution.gains is not None
    for K, expected in zip(solution.gains, whole.gains, strict=True):
        torch.testing.assert_close(K, expected, rtol=1e-11, atol=1e-11)
    separate = run(problem, per_example=True)
    assert separate.gains is not None
    for K, expected in zip(separate.gains, policy_of(problem).gains, strict=True):
        torch.testing.assert_close(K, expected, rtol=0, atol=0)


def test_refinement_removes_the_rounding_errors_of_a_stiff_problem() -> None:
    problem = random_problem([4] * 30, [2] * 29, seed=92, scale=0.6)
    problem = with_terms(problem, N=None, Qf=1e10 * torch.eye(4, dtype=F64))
    residuals = run(problem, tol=0.0, steps=3).history["residual"].tolist()
    assert min(residuals[2:]) < residuals[1]


def test_the_solve_ends_when_rounding_errors_remain() -> None:
    solution = run(random_problem([4] * 6, [2] * 5, seed=93), tol=0.0, steps=50)
    assert solution.status is Status.LINE_SEARCH_FAILED and solution.iterations < 10
    assert "rounding" in solution.message and solution.gains is not None
    assert solution.residual.norm <= 1e-12


def with_cost(R: float, N: float = 0.0, r: float = 0.0, x0: float = 1.0) -> ControlProblem:
    """One state, two steps, the second with the given cost; its control moves nothing."""
    dynamics = LinearDynamics([ONE] * 2, [ONE, 0 * ONE])
    cost = QuadraticCost(
        Q=[ONE] * 2,
        R=[ONE, R * ONE],
        N=[0 * ONE, N * ONE],
        r=[0 * ONE[0], r * ONE[0]],
        Qf=ONE,
    )
    return ControlProblem(dynamics, cost, x0=torch.tensor([x0], dtype=F64))


@pytest.mark.parametrize("problem", [with_cost(-1.0), with_cost(0.0, N=1.0), with_cost(0.0, r=1.0)])
def test_an_unbounded_problem_is_reported_with_its_step(problem: ControlProblem) -> None:
    solution = run(problem)
    assert solution.status is Status.UNBOUNDED
    assert "step 1" in solution.message and solution.gains is None


def test_a_conflict_that_no_control_reaches_is_not_unbounded() -> None:
    """``x'Nu`` with ``R = 0`` falls without end from every state but zero, where ``x`` stays."""
    nothing = LinearDynamics([ONE] * 2, [0 * ONE] * 2)
    problem = dataclasses.replace(with_cost(0.0, N=1.0, x0=0.0), dynamics=nothing)
    solution = solve(problem, Riccati(), (ONE[0], ONE[0]), max_steps=3, tol=1e-12)
    assert solution.status is Status.CONVERGED
    problem = dataclasses.replace(problem, x0=ONE[0])
    assert run(problem).status is Status.UNBOUNDED


def test_other_problems_are_refused() -> None:
    with pytest.raises(InputError, match="ResidualNetwork and SquaredErrorCost; take ILQR"):
        run(residual_network())
    problem = random_problem([3, 4, 2], [2, 3], seed=91, batch=4)
    mixed = problem.zero_controls()[0], problem.zero_controls(per_example=True)[1]
    with pytest.raises(InputError, match=r"all are shared.*\(4, 3\)"):
        solve(problem, Riccati(), mixed, max_steps=1, tol=0.0)


def test_nan_in_the_problem_is_divergence() -> None:
    problem = dataclasses.replace(with_cost(1.0), x0=torch.tensor([float("nan")], dtype=F64))
    solution = run(problem)
    assert solution.status is Status.DIVERGED and solution.gains is None


def test_an_interrupted_solve_goes_on_as_if_it_had_not_been(tmp_path) -> None:
    problem = random_problem([4] * 6, [2] * 5, seed=94)
    start, path = problem.zero_controls(), tmp_path / "solve.safetensors"
    whole = solve(problem, Riccati(), start, max_steps=50, tol=0.0)
    solve(problem, Riccati(), start, max_steps=1, tol=0.0, checkpoint=path)
    resumed = solve(problem, Riccati(), start, max_steps=50, tol=0.0, checkpoint=path)
    assert resumed.history.equals(whole.history) and resumed.status is whole.status
    assert all(torch.equal(a, b) for a, b in zip(whole.controls, resumed.controls, strict=True))


def test_float32_problems_keep_their_dtype() -> None:
    problem = random_problem([4] * 6, [2] * 5, seed=95)
    dynamics, cost = parts(problem)
    terms = {name: getattr(cost, name) for name in ("Q", "R", "N", "q", "r")}
    single: dict[str, Any] = {k: [v.float() for v in vs] for k, vs in terms.items()}
    assert cost.qf is not None and dynamics.c is not None
    single |= {"Qf": cost.Qf.float(), "qf": cost.qf.float()}
    matrices = ([v.float() for v in vs] for vs in (dynamics.A, dynamics.B, dynamics.c))
    small = ControlProblem(LinearDynamics(*matrices), QuadraticCost(**single), problem.x0.float())
    solution = run(small, tol=1e-4)
    assert solution.status is Status.CONVERGED
    assert all(u.dtype == torch.float32 for u in solution.controls)
    expected, _ = kkt(problem, per_example=False)
    assert relative(tuple(u.double() for u in solution.controls), expected) <= 1e-5
