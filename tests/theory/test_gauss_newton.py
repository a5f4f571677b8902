"""The damped step, Gauss-Newton and Newton-CG."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.control.costs import CrossEntropyCost, QuadraticCost, SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem, Controls, Cost, Dynamics
from deltacontrol.theory.control.systems import LinearDynamics, LowRankDynamics
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.conjugate_gradients import End
from deltacontrol.theory.linear.curvature import GaussNewtonCurvature
from deltacontrol.theory.linear.linearisation import Linearisation
from deltacontrol.theory.solvers import Iterate, Solver, Status, solve
from deltacontrol.theory.solvers.gauss_newton import GaussNewton, NewtonCG, damped_step
from tests.theory.curvatures import F64, cases, dense_gauss_newton, matrix
from tests.theory.dense import flat, hessian, unflatten
from tests.theory.problems import (
    CASES,
    Case,
    deep_residual_network,
    embedding_problem,
    low_rank,
    normal,
    reachable_residual_network,
    residual_network,
)
from tests.theory.test_curvature import without_decay

solvers = pytest.mark.parametrize("make", [GaussNewton, NewtonCG])


@pytest.fixture(autouse=True)
def _default_float64(float64: None) -> None:
    """Everything here is in float64."""


# Steps


@cases
def test_the_damped_step_equals_the_dense_one(case: Case) -> None:
    problem, damping = case.make(), 0.3
    u = case.start(problem, 0.6)
    curvature = GaussNewtonCurvature(problem, u)
    found = damped_step(curvature, damping, rtol=1e-13).step
    G = dense_gauss_newton(problem, u)
    expected = -torch.linalg.solve(G + damping * torch.eye(len(G)), flat(problem.gradient(u)))
    assert (found - expected).norm() <= 1e-9 * expected.norm()
    with pytest.raises(InputError, match="damping"):
        damped_step(curvature, -1.0)


def test_the_newton_step_near_an_optimum_equals_the_dense_one() -> None:
    problem = residual_network()
    near = solve(problem, NewtonCG(), problem.zero_controls(), max_steps=20, tol=1e-2).controls
    iterates: list[Iterate] = []
    solver = NewtonCG(radius=1e3, forcing=1e-12)
    solve(problem, solver, near, max_steps=1, tol=0.0, callback=iterates.append)
    step = flat(iterates[1].controls) - flat(near)
    expected = -torch.linalg.solve(hessian(problem, near), flat(problem.gradient(near)))
    assert (step - expected).norm() <= 1e-7 * expected.norm()  # rtol is floored at eps^(1/2)


def test_one_undamped_step_solves_a_linear_quadratic_problem() -> None:
    for case in CASES:
        if case.linear_quadratic:
            problem = case.make()
            u = case.start(problem, 1.0)
            step = damped_step(GaussNewtonCurvature(problem, u), 0.0, rtol=1e-14).step
            there = unflatten(flat(u) + step, u)
            assert problem.residual(there).norm <= 1e-11 * problem.residual(u).norm


# LoRA's gauge freedom


def gauge_direction(dynamics: LowRankDynamics, u: Controls) -> Tensor:
    """The tangent of ``(A S, S^-1 B)`` at ``S = I`` along ``X``: ``(A X, -X B)``."""
    parts = []
    for t, control in enumerate(u):
        down, up = dynamics.factors(t, control)
        X = normal(dynamics.rank, dynamics.rank, seed=t)
        parts += [(down @ X).reshape(-1), (-X @ up).reshape(-1)]
    return torch.cat(parts)


def test_the_gauge_freedom_of_lora_is_singular_curvature() -> None:
    bare = without_decay()
    dynamics = bare.dynamics
    assert isinstance(dynamics, LowRankDynamics)
    u = tuple(normal(m, seed=m) for m in dynamics.control_sizes)
    along = gauge_direction(dynamics, u)
    curvature = GaussNewtonCurvature(bare, u)
    assert (curvature @ along).norm() <= 1e-12 * along.norm()
    assert abs(float(curvature.gradient @ along)) <= 1e-12 * float(along.norm())
    eigenvalues = torch.linalg.eigvalsh(matrix(curvature))
    assert int((eigenvalues < 1e-10).sum()) >= dynamics.rank**2 * dynamics.horizon
    # A model with a slope along the gauge has no minimum; damping gives it one.
    curvature.gradient = along
    assert damped_step(curvature, 0.0).end is End.SINGULAR
    assert damped_step(curvature, 0.1).end is End.TOLERANCE


@solvers
def test_lora_without_decay_is_solved_through_the_gauge(make: Callable[[], Solver]) -> None:
    """A target that some factors reach: zero loss, a whole manifold of optima."""
    dynamics = LowRankDynamics([0.5 * normal(3, 4, seed=6), 0.5 * normal(4, 3, seed=7)], rank=2)
    x0 = normal(5, 3, seed=9)
    hidden = tuple(0.5 * normal(m, seed=20 + m) for m in dynamics.control_sizes)
    start = tuple(0.5 * normal(m, seed=40 + m) for m in dynamics.control_sizes)
    there = ControlProblem(dynamics, SquaredErrorCost(x0), x0).rollout(hidden)[-1]
    problem = ControlProblem(dynamics, SquaredErrorCost(there), x0)
    solution = solve(problem, make(), start, max_steps=60, tol=1e-8)
    assert solution.status is Status.CONVERGED, solution.message
    assert solution.objective <= 1e-10
    least = torch.linalg.eigvalsh(matrix(GaussNewtonCurvature(problem, solution.controls)))[0]
    assert abs(float(least)) <= 1e-12


# Solves


LARGE = [(64, None), (64, 8), (128, None), (128, 8), (256, None), (256, 8)]


@pytest.mark.parametrize(
    ("width", "batch"),
    [(16, None), (16, 8), *(pytest.param(*w, marks=pytest.mark.slow) for w in LARGE)],
)
@pytest.mark.one_in(2)
def test_newton_reaches_1e_8_on_twelve_layers_within_30_iterations(
    width: int, batch: int | None
) -> None:
    problem = reachable_residual_network(width, batch)
    solution = solve(problem, NewtonCG(), problem.zero_controls(), max_steps=30, tol=1e-8)
    assert solution.status is Status.CONVERGED, solution.message
    residuals = solution.history["residual"].tolist()
    assert residuals[-1] < 1e-2 * residuals[-2]  # superlinear at the end


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "seed"),
    [(16, 0), (16, 1), *(pytest.param(w, 0, marks=pytest.mark.slow) for w in (64, 128, 256))],
)
def test_newton_reaches_1e_8_where_the_loss_stays_large(width: int, seed: int) -> None:
    problem = deep_residual_network(width, seed=seed)
    solution = solve(problem, NewtonCG(), problem.zero_controls(), max_steps=30, tol=1e-8)
    assert solution.status is Status.CONVERGED, solution.message


@pytest.mark.parametrize("width", [16, pytest.param(256, marks=pytest.mark.slow)])
def test_gauss_newton_reaches_1e_8_where_the_loss_nearly_vanishes(width: int) -> None:
    far = reachable_residual_network(width, None)
    start = far.zero_controls()
    target = far.rollout(start)[-1] + 0.1 * normal(width, seed=2)
    problem = ControlProblem(far.dynamics, SquaredErrorCost(target, weight_decay=1e-2), far.x0)
    solution = solve(problem, GaussNewton(), start, max_steps=30, tol=1e-8)
    assert solution.status is Status.CONVERGED, solution.message


def test_gauss_newton_goes_on_where_values_of_j_no_longer_tell() -> None:
    """The last steps lower ``J`` by less than its rounding; the gradients still decide."""
    problem = residual_network()
    solution = solve(problem, NewtonCG(), problem.zero_controls(), max_steps=30, tol=1e-12)
    assert solution.status is Status.CONVERGED, solution.message
    history = solution.history["objective"].tolist()
    assert abs(history[-1] - history[-2]) <= 1e-14 * abs(history[-1])


class Gate(Dynamics):
    """``x (1 + u)`` on states of 10^5 entries with two controls, one for each half."""

    horizon = 3
    control_sizes = (2, 2, 2)

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        return x * (1 + u).repeat_interleave(x.shape[-1] // 2)


@solvers
def test_states_of_100_000_entries_and_no_jacobian(
    make: Callable[[], Solver], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_more: object) -> None:
        raise AssertionError("a state Jacobian was formed")

    monkeypatch.setattr(Linearisation, "dense", refuse)
    x0 = normal(2, 50_000, seed=1) / 200
    problem = ControlProblem(Gate(), SquaredErrorCost(2 * x0, weight_decay=1e-2), x0)
    solution = solve(problem, make(), problem.zero_controls(), max_steps=30, tol=1e-8)
    assert solution.status is Status.CONVERGED, solution.message


@solvers
@pytest.mark.parametrize("curvature", [0.0, -1.0])
def test_a_problem_without_a_minimum_is_called_unbounded(
    make: Callable[[], Solver], curvature: float
) -> None:
    """``J = x_L + curvature/2 sum u^2``: linear, or concave, in the controls."""
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    cost = QuadraticCost(Q=[zero] * 3, R=[curvature * one] * 3, Qf=zero, qf=torch.ones(1))
    problem = ControlProblem(LinearDynamics.constant(3, one, one), cost, torch.ones(1))
    solution = solve(problem, make(), problem.zero_controls(), max_steps=200, tol=1e-8)
    assert solution.status is Status.UNBOUNDED, solution.message
    assert "running cost" in solution.message


class Cliff(Cost):
    """``u`` down to a wall behind which ``J`` is not a number; no gradient warns of it."""

    def terminal(self, x: Tensor) -> Tensor:
        wall = torch.where(x.detach() < -1.0, torch.nan, 0.0)
        return (x + wall).sum()


@solvers
def test_a_step_into_nothing_is_shortened_until_the_method_gives_up(
    make: Callable[[], Solver],
) -> None:
    one = torch.ones(1, 1)
    problem = ControlProblem(LinearDynamics.constant(1, one, one), Cliff(), torch.zeros(1))
    solution = solve(problem, make(), problem.zero_controls(), max_steps=400, tol=1e-8)
    assert solution.status is Status.LINE_SEARCH_FAILED, solution.message
    assert "no part of the step" in solution.message and "raise tol" in solution.message
    assert float(solution.controls[0]) == pytest.approx(-1.0, abs=1e-6)


@solvers
def test_an_interrupted_solve_continues_with_the_same_iterates(
    make: Callable[[], Solver], tmp_path: Path
) -> None:
    problem, checkpoint = low_rank(), tmp_path / "solve.safetensors"
    start = tuple(0.5 * normal(m, seed=m) for m in problem.dynamics.control_sizes)

    def interrupt(iterate: Iterate) -> None:
        if iterate.iteration == 2:
            raise KeyboardInterrupt

    whole = solve(problem, make(), start, max_steps=5, tol=0.0)
    with pytest.raises(KeyboardInterrupt):
        solve(
            problem,
            make(),
            start,
            max_steps=5,
            tol=0.0,
            callback=interrupt,
            checkpoint=checkpoint,
        )
    resumed = solve(problem, make(), start, max_steps=5, tol=0.0, checkpoint=checkpoint)
    assert resumed.history.equals(whole.history)
    assert torch.equal(flat(resumed.controls), flat(whole.controls))


def test_cross_entropy_with_tokens_as_state() -> None:
    problem = embedding_problem()
    assert isinstance(problem.cost, CrossEntropyCost)
    start = problem.zero_controls(dtype=F64)
    for solver in (GaussNewton(), NewtonCG()):
        solution = solve(problem, solver, start, max_steps=60, tol=1e-8)
        assert solution.status is Status.CONVERGED, solution.message


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_bad_settings_are_refused(value: float) -> None:
    for make in (GaussNewton, NewtonCG):
        with pytest.raises(InputError, match="forcing"):
            make(forcing=value)
    with pytest.raises(InputError, match="forcing = 1.0 must be below 1"):
        NewtonCG(forcing=1.0)
    with pytest.raises(InputError, match="damping"):
        GaussNewton(damping=value)
    with pytest.raises(InputError, match="radius"):
        NewtonCG(radius=value)
