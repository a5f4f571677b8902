"""MSA and extended MSA with bounds on the controls."""

from __future__ import annotations

import pytest
import torch

from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.problem import Box, ControlProblem
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers.emsa import ExtendedMSA
from deltacontrol.theory.solvers.minimisers import ExactArgmin
from deltacontrol.theory.solvers.msa import MSA
from deltacontrol.theory.solvers.shooting import Shooting
from deltacontrol.theory.solvers.solving import Status, solve
from tests.theory.dense import flat, hessian
from tests.theory.msa_terms import ones
from tests.theory.problems import (
    normal,
    residual_network,
    scalar,
    varying,
)

F64 = torch.float64


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("gradient", scalar),
        ("gradient", residual_network),
        ("gradient", lambda: varying(6)),
        ("extended", scalar),
        pytest.param("extended", residual_network, marks=pytest.mark.slow),
        pytest.param("extended", lambda: varying(6), marks=pytest.mark.slow),
    ],
)
def test_boxes_are_kept_and_the_optimum_is_that_of_shooting(make, kind: str) -> None:
    problem = make()
    boxed = ControlProblem(problem.dynamics, problem.cost, problem.x0, Box(-0.15, 0.1))
    top = float(torch.linalg.eigvalsh(hessian(problem, problem.zero_controls()))[-1])
    solver = MSA(1.0 / top) if kind == "gradient" else ExtendedMSA()
    seen = []
    solution = solve(
        boxed, solver, ones(problem, 3.0), max_steps=2000, tol=1e-7, callback=seen.append
    )
    assert solution.status is Status.CONVERGED, solution.message
    assert all(flat(it.controls).abs().max() <= 0.15 for it in seen)
    assert all(flat(it.controls).max() <= 0.1 for it in seen)
    reference = solve(boxed, Shooting(), boxed.zero_controls(), max_steps=2000, tol=1e-8)
    assert reference.status is Status.CONVERGED
    assert float((flat(solution.controls) - flat(reference.controls)).norm()) <= 1e-6
    u = flat(solution.controls)
    assert ((u == -0.15) | (u == 0.1)).any(), "a box that does not bind tests nothing"


@pytest.mark.parametrize("weight", [1.0, 0.0, -1.0])
def test_exact_clipping_finds_the_best_point_of_the_box(weight: float) -> None:
    """One step, ``H = weight/2 v^2 + p v`` entry by entry, convex, linear or concave."""
    eye = torch.eye(4, dtype=F64)
    cost = QuadraticCost(Q=[0 * eye], R=[weight * eye], Qf=0 * eye, qf=normal(4, seed=3))
    box = Box(-1.0, 0.5)
    problem = ControlProblem(LinearDynamics([eye], [eye]), cost, torch.zeros(4, dtype=F64), box)
    start = (torch.full((4,), 0.25, dtype=F64),)
    solution = solve(problem, MSA(ExactArgmin()), start, max_steps=1, tol=0.0)
    grid = torch.linspace(-1.0, 0.5, 3001, dtype=F64)
    values = weight / 2 * grid.square() + cost.qf.unsqueeze(1) * grid
    best = grid[values.argmin(1)]
    assert float((solution.controls[0] - best).abs().max()) <= 5.1e-4


def test_a_linear_hamiltonian_needs_a_bound_on_the_side_to_which_it_falls_only() -> None:
    one = torch.ones(1, 1, dtype=F64)
    cost = QuadraticCost([0 * one], [0 * one], Qf=0 * one, qf=one[0])
    dynamics, x0 = LinearDynamics([one], [one]), torch.zeros(1, dtype=F64)
    bounded = ControlProblem(dynamics, cost, x0, Box(low=-2.0))
    solution = solve(bounded, MSA(ExactArgmin()), bounded.zero_controls(), max_steps=5, tol=1e-9)
    assert solution.status is Status.CONVERGED and solution.controls[0].tolist() == [-2.0]
    unbounded = ControlProblem(dynamics, cost, x0, Box(high=2.0))
    solution = solve(
        unbounded, MSA(ExactArgmin()), unbounded.zero_controls(), max_steps=5, tol=1e-9
    )
    assert solution.status is Status.UNBOUNDED


def test_a_concave_entry_without_a_bound_has_no_minimum() -> None:
    one = torch.ones(1, 1, dtype=F64)
    problem = ControlProblem(
        LinearDynamics([one], [one]),
        QuadraticCost([0 * one], [-one], Qf=one),
        torch.ones(1, dtype=F64),
        Box(low=-1.0),
    )
    solution = solve(problem, MSA(ExactArgmin()), problem.zero_controls(), max_steps=5, tol=1e-9)
    assert solution.status is Status.UNBOUNDED
    assert "entry 0 has curvature -1" in solution.message


def test_clipping_is_refused_where_it_is_not_exact() -> None:
    problem = varying(None)
    boxed = ControlProblem(problem.dynamics, problem.cost, problem.x0, Box(-1.0, 1.0))
    with pytest.raises(InputError, match=r"H_0 has a Hessian in u_0 that is not diagonal"):
        solve(boxed, MSA(ExactArgmin()), boxed.zero_controls(), max_steps=5, tol=1e-9)
