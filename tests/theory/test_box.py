"""Boxes on the controls: projection, residual, and the solvers that keep them."""

from __future__ import annotations

import math

import pytest
import torch

from deltacontrol.theory.control.problem import Box, ControlProblem, Controls
from deltacontrol.theory.convex.quadratic import solve_convex
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers import MSA, Shooting, Solver, Status, solve
from tests.theory.dense import flat, hessian
from tests.theory.problems import residual_network, scalar, varying

F64 = torch.float64


def boxed(problem: ControlProblem, box: Box) -> ControlProblem:
    return ControlProblem(problem.dynamics, problem.cost, problem.x0, box)


def test_projection_is_the_nearest_point_and_broadcasts() -> None:
    u = (torch.tensor([-3.0, 0.2], dtype=F64), torch.zeros(0, dtype=F64))
    low = (torch.tensor([-1.0, 0.5], dtype=F64), torch.tensor(-1.0))
    projected = Box(low, 2.0).project(u)
    assert projected[0].tolist() == [-1.0, 0.5] and projected[1].shape == (0,)
    assert Box().project(u)[0].equal(u[0])


@pytest.mark.parametrize(
    "bounds", [(1.0, 0.0), (math.nan, 1.0), (math.inf, 1e308), (-math.inf, -math.inf)]
)
def test_an_empty_box_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="box is empty at step 0|low is nan"):
        Box(*bounds)


def test_bounds_beyond_float32_are_told_apart() -> None:
    assert Box(1e300, 1e308).low == 1e300
    with pytest.raises(InputError, match="box is empty"):
        Box(1e308, 1e300)


def test_a_box_of_another_shape_is_refused_when_the_solve_begins() -> None:
    problem = scalar()  # five controls of shape (1,)
    bound = torch.full((3,), -1.0, dtype=F64)
    for box, words in (
        (Box(low=[bound] * 5), r"low of shape \(3,\) at step 0.*control has shape \(1,\)"),
        (Box(high=[-bound[None, :1]] * 5), r"high of shape \(1, 1\) at step 0"),
        (Box(low=[bound[:1]] * 4), "4 bounds low for 5 controls"),
    ):
        for solver in (MSA(0.1), Shooting()):
            with pytest.raises(InputError, match=words):
                solve(boxed(problem, box), solver)
        with pytest.raises(InputError, match=words):
            solve_convex(boxed(problem, box))
    with pytest.raises(InputError, match="low has 4 bounds and high 5"):
        Box([bound] * 4, [-bound] * 5)


def test_the_residual_ignores_a_gradient_that_points_out_of_the_box() -> None:
    """``J = 1/2 sum u^2 + 1/2 (3 + sum u)^2`` on ``u >= -0.1``: every control at its bound."""
    problem = boxed(scalar(), Box(-0.1, 1.0))
    at_bound = tuple(torch.full_like(u, -0.1) for u in problem.zero_controls())
    assert problem.residual(at_bound).norm == 0.0
    assert min(float(g) for g in problem.gradient(at_bound)) > 1.0
    inside = tuple(torch.zeros_like(u) for u in at_bound)
    # The gradient 3 moves each of five controls to the bound, 0.1 away.
    assert problem.residual(inside).norm == pytest.approx(0.1 * 5**0.5)


def projected_gradient(problem: ControlProblem, steps: int = 3000) -> Controls:
    """A slow method without a line search, for convex problems."""
    u = problem.zero_controls()
    step = 1.0 / float(torch.linalg.eigvalsh(hessian(problem, u))[-1])
    for _ in range(steps):
        gradient = problem.gradient(u)
        moved = problem.box.project(tuple(a - step * g for a, g in zip(u, gradient, strict=True)))
        if (
            max(float((a - b).abs().max()) for a, b in zip(u, moved, strict=True) if a.numel())
            < 1e-13
        ):
            break
        u = moved
    return u


@pytest.mark.parametrize("make", [scalar, residual_network, lambda: varying(6)])
def test_shooting_finds_the_optimum_of_an_independent_method(make) -> None:
    problem = boxed(make(), Box(-0.15, 0.1))
    start = problem.zero_controls()
    solution = solve(problem, Shooting(), start, max_steps=2000, tol=1e-8)
    assert solution.status is Status.CONVERGED, solution.message
    reference = projected_gradient(problem)
    assert solution.objective == pytest.approx(float(problem.objective(reference)), abs=1e-12)
    assert float((flat(solution.controls) - flat(reference)).norm()) <= 1e-7
    u = flat(solution.controls)
    assert u.min() >= -0.15 and u.max() <= 0.1
    assert ((u == -0.15) | (u == 0.1)).any(), "a box that does not bind tests nothing"


def test_a_start_outside_the_box_is_projected() -> None:
    problem = boxed(scalar(), Box(-0.2, 0.2))
    far = tuple(torch.full_like(u, 7.0) for u in problem.zero_controls())
    solution = solve(problem, Shooting(), far, max_steps=0, tol=0.0)
    assert flat(solution.controls).tolist() == [0.2] * 5


class Boxless(Solver):
    """A method that knows no box."""

    def run(self, problem, u0, report, memory) -> None:
        report(u0, problem.evaluate(u0))


def test_a_solver_without_boxes_says_so() -> None:
    problem = boxed(scalar(), Box(-0.2, 0.2))
    with pytest.raises(InputError, match="Boxless cannot keep the controls in a box"):
        solve(problem, Boxless(), problem.zero_controls(), max_steps=1, tol=0.0)
    step = 1.0 / float(torch.linalg.eigvalsh(hessian(problem, problem.zero_controls()))[-1])
    if MSA.takes_box:
        solution = solve(problem, MSA(step), problem.zero_controls(), max_steps=999, tol=1e-10)
        assert solution.status is Status.CONVERGED
