"""iLQR and DDP: unusual states, refusals, rounding, interruptions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.control.costs import SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem, Dynamics
from deltacontrol.theory.control.systems import LinearDynamics, ResidualNetwork
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers import Solver, Status, solve
from deltacontrol.theory.solvers.ilqr import DDP, ILQR
from tests.theory.dense import flat
from tests.theory.ilqr_runs import BOTH, run
from tests.theory.problems import (
    TerminalOnly,
    deep_residual_network,
    embedding_problem,
    forgetful_problem,
    normal,
    residual_network,
)

F64 = torch.float64


@BOTH
@pytest.mark.slow
def test_states_of_any_shape_and_of_integers(solver: Solver) -> None:
    for problem in (embedding_problem(), forgetful_problem()):
        start = tuple(0.1 * torch.ones(m, dtype=F64) for m in problem.dynamics.control_sizes)
        solution = solve(problem, solver, start, max_steps=200, tol=1e-8)
        assert solution.residual.norm <= 1e-8 or solution.status is not Status.CONVERGED
        assert solution.objective < float(problem.objective(start))
    solution = solve(
        embedding_problem(),
        solver,
        embedding_problem().zero_controls(per_example=True, dtype=F64),
        max_steps=200,
        tol=1e-8,
    )
    assert solution.status is Status.CONVERGED, solution.message


class Mixed(Dynamics):
    """Examples see each other's mean."""

    horizon = 2
    control_sizes = (2, 2)

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        return x + u + x.mean(0)


def test_examples_that_interact_are_refused() -> None:
    problem = ControlProblem(
        Mixed(), SquaredErrorCost(normal(4, 2, seed=1), 0.1), normal(4, 2, seed=2)
    )
    assert run(problem, ILQR()).status is Status.CONVERGED
    with pytest.raises(InputError, match="let examples interact"):
        solve(problem, ILQR(), problem.zero_controls(per_example=True), max_steps=3, tol=1e-8)


def test_a_state_beyond_dense_matrices_is_refused() -> None:
    x0 = torch.zeros(100, 50, dtype=F64)
    problem = ControlProblem(ResidualNetwork.random(2, 50, 4, 3), SquaredErrorCost(x0 + 1, 0.1), x0)
    with pytest.raises(InputError, match="5000 entries.*GaussNewton"):
        run(problem, ILQR())
    start = problem.zero_controls(per_example=True)
    assert solve(problem, DDP(), start, max_steps=1, tol=1e9).status is Status.CONVERGED


@BOTH
@pytest.mark.one_in(2)
def test_rounding_ends_a_solve_honestly(solver: Solver) -> None:
    problem = residual_network()
    solution = run(problem, solver, tol=0.0, max_steps=200)
    assert solution.status is Status.LINE_SEARCH_FAILED or solution.residual.norm == 0.0
    assert solution.residual.norm <= 1e-14
    assert solution.gains is not None


@BOTH
@pytest.mark.one_in(2)
def test_an_interrupted_solve_goes_on_with_the_same_iterates(
    solver: Solver, tmp_path: Path
) -> None:
    problem = deep_residual_network(6, horizon=5)
    start, whole, parts = problem.zero_controls(), [], []
    solve(problem, solver, start, max_steps=12, tol=1e-9, callback=whole.append)
    for steps in (4, 12):
        solve(
            problem,
            solver,
            start,
            max_steps=steps,
            tol=1e-9,
            callback=parts.append,
            checkpoint=tmp_path / "solve.safetensors",
        )
    assert len(parts) == len(whole)
    for a, b in zip(parts, whole, strict=True):
        assert torch.equal(flat(a.controls), flat(b.controls))


def test_no_control_at_all() -> None:
    problem = ControlProblem(
        LinearDynamics.constant(2, torch.eye(2, dtype=F64), torch.zeros(2, 0, dtype=F64)),
        TerminalOnly(),
        normal(2, seed=1),
    )
    assert run(problem, DDP()).status is Status.CONVERGED


class Kinked(TerminalOnly):
    """``Phi = sum |x|^(3/2)``, whose second derivative is infinite at zero."""

    def terminal(self, x: Tensor) -> Tensor:
        return x.abs().pow(1.5).sum() + (x - 1).square().sum()


def test_an_infinite_curvature_is_named() -> None:
    eye = torch.eye(2, dtype=F64)
    problem = ControlProblem(LinearDynamics.constant(1, eye, eye), Kinked(), 0 * eye[0])
    solution = run(problem, DDP())
    assert solution.status is Status.LINE_SEARCH_FAILED
    assert "second derivatives are not" in solution.message
