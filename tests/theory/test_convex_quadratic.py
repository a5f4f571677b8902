"""The dense quadratic program of linear-quadratic control, with and without a box."""

from __future__ import annotations

import math

import pytest
import torch

from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.problem import Box, ControlProblem
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.convex import ConvexStatus, QuadraticSolution, solve_convex
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers import Shooting, solve
from tests.theory.dense import flat, kkt
from tests.theory.problems import CASES, Case, normal, positive, residual_network, scalar, varying

F64 = torch.float64
LINEAR_QUADRATIC = [case for case in CASES if case.linear_quadratic]


@pytest.mark.parametrize("case", LINEAR_QUADRATIC, ids=lambda case: case.name)
@pytest.mark.parametrize("solver", ["auto", "osqp"])
def test_equals_the_dense_kkt_solution(case: Case, solver: str) -> None:
    problem = case.make()
    found = solve_convex(problem, per_example=case.per_example, solver=solver)
    exact, _ = kkt(problem, case.per_example)
    assert found.status is ConvexStatus.OPTIMAL, found.message
    assert found.solver == ("osqp" if solver == "osqp" else "clarabel")
    relative = (flat(found.controls) - flat(exact)).norm() / flat(exact).norm()
    assert relative <= 1e-6
    assert found.objective == pytest.approx(float(problem.objective(exact)), rel=1e-9)
    assert -1e-12 <= found.gap <= 1e-9 * max(1.0, abs(found.objective))
    assert not flat(found.multipliers).any()
    assert problem.residual(found.controls).norm <= 1e-6


def boxed(per_example: bool) -> tuple[ControlProblem, QuadraticSolution]:
    """A box above the free optimum at step 0, below it and open at step 2, wide at step 3."""
    problem = varying(3 if per_example else 6)
    free = kkt(problem, per_example)[0]
    low = [free[0] + 0.1, free[1], torch.full_like(free[2], -math.inf), free[3] - 9.0]
    high = [free[0] + 0.5, free[1], free[2] - 0.4, free[3] + 9.0]
    problem = ControlProblem(problem.dynamics, problem.cost, problem.x0, Box(low, high))
    return problem, solve_convex(problem, per_example=per_example)


@pytest.mark.parametrize("per_example", [False, True])
def test_box_against_projected_residual_and_l_bfgs(per_example: bool) -> None:
    problem, found = boxed(per_example)
    assert found.status is ConvexStatus.OPTIMAL and -1e-12 <= found.gap <= 1e-8
    start = problem.zero_controls(per_example=per_example, dtype=F64)
    other = solve(problem, Shooting(), start, max_steps=2000, tol=1e-9)
    torch.testing.assert_close(flat(found.controls), flat(other.controls), rtol=1e-5, atol=1e-6)
    assert problem.residual(found.controls).norm <= 1e-6
    u, nu = flat(found.controls), flat(found.multipliers)
    assert (nu > 1e-3).any() and (nu < -1e-3).any() and (nu.abs() < 1e-6).any()
    torch.testing.assert_close(nu, flat(problem.gradient(found.controls)), rtol=0, atol=1e-6)
    assert problem.box is not None
    low, high = (
        flat(tuple(b)) for b in zip(*map(problem.box.bounds, range(4), start), strict=True)
    )
    assert float((u - low)[nu > 1e-3].abs().max()) < 1e-7
    assert float((u - high)[nu < -1e-3].abs().max()) < 1e-7


def test_gap_bounds_the_error_of_any_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted early, the solver's controls are bad and the certificate says how bad."""
    from deltacontrol.theory.convex import program

    problem, exact = boxed(False)
    monkeypatch.setitem(program._TIGHT, "OSQP", {"max_iter": 5, "eps_abs": 1e-12})
    rough = solve_convex(problem, solver="osqp")
    assert rough.status is ConvexStatus.INACCURATE and "another solver" in rough.message
    assert rough.bound <= exact.objective <= rough.objective
    assert rough.gap > 1e-6


def test_indefinite_is_unbounded() -> None:
    problem = scalar()
    assert isinstance(problem.cost, QuadraticCost)
    cost = QuadraticCost(problem.cost.Q, [-R for R in problem.cost.R], 0 * problem.cost.Qf)
    found = solve_convex(ControlProblem(problem.dynamics, cost, problem.x0))
    assert found.status is ConvexStatus.UNBOUNDED
    assert found.objective == found.bound == -math.inf and math.isnan(found.gap)
    assert "raise R" in found.message
    with pytest.raises(InputError, match="not convex"):
        solve_convex(ControlProblem(problem.dynamics, cost, problem.x0, Box(-1.0, 1.0)))


def test_indefinite_r_may_still_be_convex() -> None:
    """``J(u) = 1/2 2 (1 + u)^2 - 1/2 u^2``: R < 0, and the terminal cost makes up for it."""
    one = torch.ones(1, 1, dtype=F64)
    cost = QuadraticCost.constant(1, Q=0 * one, R=-one, Qf=2 * one)
    problem = ControlProblem(LinearDynamics.constant(1, one, one), cost, one[0])
    found = solve_convex(problem)
    assert found.status is ConvexStatus.OPTIMAL
    assert float(found.controls[0]) == pytest.approx(-2.0, abs=1e-7)


def flat_problem(slope: float, box: Box | None) -> ControlProblem:
    """A control without curvature, of slope ``slope``, beside one with ``1/2 (w - 1)^2``."""
    dynamics = LinearDynamics.constant(1, torch.eye(1, dtype=F64), torch.zeros(1, 2, dtype=F64))
    cost = QuadraticCost(
        Q=torch.zeros(1, 1, 1, dtype=F64),
        R=[torch.diag(torch.tensor([0.0, 1.0], dtype=F64))],
        Qf=torch.zeros(1, 1, dtype=F64),
        r=[torch.tensor([slope, -1.0], dtype=F64)],
    )
    return ControlProblem(dynamics, cost, torch.zeros(1, dtype=F64), box)


def test_slope_without_curvature() -> None:
    assert solve_convex(flat_problem(0.3, None)).status is ConvexStatus.UNBOUNDED
    assert solve_convex(flat_problem(0.3, Box(high=2.0))).status is ConvexStatus.UNBOUNDED
    bounded = solve_convex(flat_problem(0.3, Box(low=-2.0)))
    assert bounded.status is ConvexStatus.OPTIMAL
    expected = torch.tensor([-2.0, 1.0], dtype=F64)
    torch.testing.assert_close(bounded.controls[0], expected, rtol=0, atol=1e-6)
    level = solve_convex(flat_problem(0.0, None))
    assert level.status is ConvexStatus.OPTIMAL and level.objective == pytest.approx(-0.5)


def test_no_controls_at_all() -> None:
    dynamics = LinearDynamics.constant(2, torch.eye(2, dtype=F64), torch.zeros(2, 0, dtype=F64))
    cost = QuadraticCost.constant(
        2, Q=positive(2, 1, 1.0), R=torch.zeros(0, 0).double(), Qf=torch.eye(2).double()
    )
    found = solve_convex(ControlProblem(dynamics, cost, normal(2, seed=3)))
    assert found.status is ConvexStatus.OPTIMAL and found.gap == 0.0


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="ResidualNetwork"):
        solve_convex(residual_network())
    with pytest.raises(InputError, match="unknown solver"):
        solve_convex(scalar(), solver="gurobi")
    n = 4001
    big = ControlProblem(
        LinearDynamics.constant(1, torch.eye(1, dtype=F64), torch.zeros(1, n, dtype=F64)),
        QuadraticCost.constant(
            1, torch.eye(1).double(), torch.eye(n).double(), torch.eye(1).double()
        ),
        torch.zeros(1, dtype=F64),
    )
    with pytest.raises(InputError, match="4001 controls"):
        solve_convex(big)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, math.nan])
def test_a_tolerance_that_no_gap_meets_is_refused(tolerance: float) -> None:
    with pytest.raises(InputError, match="tolerance is"):
        solve_convex(scalar(), tolerance=tolerance)
