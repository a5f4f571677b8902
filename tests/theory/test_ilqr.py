"""Iterative LQR and DDP: their steps, their convergence, boxes, gains and failures."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.quadratic.box_qp import box_qp
from deltacontrol.theory.solvers import Shooting, Solution, Solver, Status, solve
from deltacontrol.theory.solvers.ilqr import DDP, ILQR
from deltacontrol.theory.solvers.quadratic_model import (
    IndefiniteError,
    Policy,
    QuadraticModel,
    sweep,
)
from tests.theory.dense import box_optimum, flat, hessian, unflatten
from tests.theory.ilqr_runs import BOTH, run
from tests.theory.problems import (
    boxed,
    deep_residual_network,
    double_integrator,
    embedding_problem,
    low_rank,
    normal,
    pendulum,
    reachable_residual_network,
    residual_classifier,
    residual_network,
    scalar,
    varying,
)

F64 = torch.float64


def model_at(problem: ControlProblem, u: Controls, second_order: bool) -> QuadraticModel:
    return QuadraticModel.of(problem, u, problem.evaluate(u), second_order=second_order)


def linear_step(model: QuadraticModel, policy: Policy, like: Controls) -> Controls:
    """The step of the law in the linearised dynamics."""
    dx = torch.zeros(model.A[0].shape[0], model.A[0].shape[2], 1, dtype=F64)
    step = []
    for t, u in enumerate(like):
        du = policy.k[t].unsqueeze(-1) + policy.K[t] @ dx
        step.append(du.reshape(u.shape))
        dx = model.A[t] @ dx + model.B[t] @ du
    return tuple(step)


def gauss_newton(problem: ControlProblem, u: Controls) -> Tensor:
    """``M' W M`` with ``M`` the Jacobian of all states and controls, ``W`` the costs' Hessian."""
    horizon = problem.dynamics.horizon

    def trajectory(z: Tensor) -> Tensor:
        controls = unflatten(z, u)
        return torch.cat([x.reshape(-1) for x in problem.rollout(controls)] + [z])

    shapes = [x.shape for x in problem.rollout(u)]

    def cost(y: Tensor) -> Tensor:
        parts = y.split([s.numel() for s in shapes] + [flat(u).numel()])
        states = [part.reshape(s) for part, s in zip(parts[:-1], shapes, strict=True)]
        return problem.total_cost(states, unflatten(parts[-1], u))

    assert horizon == len(u)
    M = torch.func.jacrev(trajectory)(flat(u))
    return M.mT @ torch.func.hessian(cost)(trajectory(flat(u))) @ M


SMALL: dict[str, tuple[Callable[[], ControlProblem], bool]] = {
    "shared": (residual_network, False),
    "per-example": (residual_network, True),
    "varying": (lambda: varying(3), True),
    "varying-shared": (lambda: varying(6), False),
    "classifier": (residual_classifier, False),
    "tokens": (embedding_problem, False),
    "tokens-per-example": (embedding_problem, True),
    "low-rank": (low_rank, False),
}
each_small = pytest.mark.parametrize("name", SMALL)


def small(name: str, scale: float) -> tuple[ControlProblem, Controls]:
    make, per_example = SMALL[name]
    problem = make()
    zeros = problem.zero_controls(per_example=per_example, dtype=F64)
    return problem, tuple(scale * normal(*u.shape, seed=t) for t, u in enumerate(zeros))


@each_small
def test_the_undamped_step_of_ddp_is_newtons(name: str) -> None:
    problem, u = small(name, 0.1)
    H, g = hessian(problem, u), flat(problem.gradient(u))
    model = model_at(problem, u, second_order=True)
    if float(torch.linalg.eigvalsh(H)[0]) <= 0:
        with pytest.raises(IndefiniteError, match="not positive definite at step"):
            sweep(model)
        return
    policy = sweep(model)
    step = flat(linear_step(model, policy, u))
    torch.testing.assert_close(step, -torch.linalg.solve(H, g), rtol=1e-9, atol=1e-11)
    assert policy.slope == pytest.approx(float(g @ step), rel=1e-9)
    assert policy.curvature == pytest.approx(float(step @ H @ step), rel=1e-9)


@each_small
def test_the_undamped_step_of_ilqr_is_gauss_newtons(name: str) -> None:
    problem, u = small(name, 0.1)
    G, g = gauss_newton(problem, u), flat(problem.gradient(u))
    model = model_at(problem, u, second_order=False)
    step = flat(linear_step(model, sweep(model), u))
    torch.testing.assert_close(step, -torch.linalg.solve(G, g), rtol=1e-9, atol=1e-11)


@each_small
def test_bending_and_damping_give_descent_everywhere(name: str) -> None:
    problem, u = small(name, 1.0)
    g = flat(problem.gradient(u))
    model = model_at(problem, u, second_order=True)
    before = math.inf
    for damping in (1e-8, 1e-2, 1.0, 1e2, 1e6):
        policy = sweep(model, convexity=1.0, damping=damping)
        step = flat(linear_step(model, policy, u))
        assert policy.slope == pytest.approx(float(g @ step), rel=1e-9) and policy.slope < 0
        assert float(step.norm()) <= before
        before = float(step.norm())


def test_without_cross_terms_each_step_is_newtons_of_one_control() -> None:
    problem, u = small("shared", 0.3)
    model = model_at(problem, u, second_order=True)
    policy = sweep(model, cross=False)
    for t, k in enumerate(policy.k):

        def alone(z: Tensor, t: int = t) -> Tensor:
            return problem.objective((*u[:t], z, *u[t + 1 :]))

        H, g = torch.func.hessian(alone)(u[t]), torch.func.grad(alone)(u[t])
        torch.testing.assert_close(k[0], -torch.linalg.solve(H, g), rtol=1e-10, atol=1e-12)
        assert not policy.K[t].any()
    descent = sweep(model, cross=False, step_size=0.2)
    for k, g in zip(descent.k, problem.gradient(u), strict=True):
        torch.testing.assert_close(k[0], -0.2 * g, rtol=1e-12, atol=0)


def order(solution: Solution) -> float:
    """``log(r_{k+1}/r_k) / log(r_k/r_{k-1})``, larger of the last two: 1 linear, 2 quadratic."""
    logs = [math.log(r) for r in solution.history["residual"] if r > 1e-15][-4:]
    falls = [b - a for a, b in zip(logs, logs[1:], strict=False)]
    return max(b / a for a, b in zip(falls, falls[1:], strict=False))


FAST = [(16, 8, 1)]
SLOW = [
    (width, size, seed)
    for width in (16, 64, 128, 256)
    for size in (width, width // 2)
    for seed in range(3)
    if (width, size, seed) not in FAST
]


@pytest.mark.parametrize(
    ("width", "size", "seed"), [*FAST, *(pytest.param(*p, marks=pytest.mark.slow) for p in SLOW)]
)
def test_ddp_solves_deep_networks_in_thirty_iterations(width: int, size: int, seed: int) -> None:
    problem = deep_residual_network(width, size, seed=seed)
    solution = run(problem, DDP(), tol=1e-10)
    assert solution.status is Status.CONVERGED, solution.message
    assert order(solution) > 1.6
    if width == 16:
        assert torch.linalg.eigvalsh(hessian(problem, solution.controls))[0] > 0


@BOTH
@pytest.mark.parametrize(
    "width", [16, *(pytest.param(w, marks=pytest.mark.slow) for w in (64, 128, 256))]
)
@pytest.mark.one_in(2)
def test_both_reach_1e_8_on_twelve_layers_within_30_iterations(solver: Solver, width: int) -> None:
    """Where the target can nearly be reached; far from there iLQR is slow."""
    problem = reachable_residual_network(width)
    solution = run(problem, solver, tol=1e-8)
    assert solution.status is Status.CONVERGED, solution.message


@pytest.mark.slow
@pytest.mark.parametrize("horizon", [4, 24])
def test_ddp_solves_networks_of_other_depths(horizon: int) -> None:
    problem = deep_residual_network(8, horizon=horizon)
    solution = run(problem, DDP(), tol=1e-10)
    assert solution.status is Status.CONVERGED, solution.message


@pytest.mark.slow
def test_ilqr_converges_linearly_at_the_rate_of_the_neglected_curvature() -> None:
    """The error is multiplied by ``I - G^-1 H`` in each iteration."""
    problem = residual_network()
    start = problem.zero_controls()
    best = solve(problem, DDP(), start, max_steps=30, tol=1e-13).controls
    G, H = gauss_newton(problem, best), hessian(problem, best)
    eye = torch.eye(len(G), dtype=F64)
    rate = float(torch.linalg.eigvals(eye - torch.linalg.solve(G, H)).abs().max())
    solution = solve(problem, ILQR(), start, max_steps=100, tol=1e-9)
    assert solution.status is Status.CONVERGED, solution.message
    tail = solution.history["residual"].tolist()[-9:]
    observed = (tail[-1] / tail[0]) ** (1 / 8)
    assert 0.05 < rate < 0.9
    assert observed == pytest.approx(rate, rel=0.05)
    assert order(solution) < 1.2


@pytest.mark.slow
def test_the_pendulum_swings_up_to_a_certified_optimum() -> None:
    problem = pendulum()
    found = {type(s).__name__: run(problem, s, 1e-9, 60) for s in (DDP(), ILQR())}
    found["Shooting"] = run(problem, Shooting(), 1e-6, 5000)
    controls = [flat(s.controls) for s in found.values()]
    for name, solution in found.items():
        assert solution.status is Status.CONVERGED, f"{name}: {solution.message}"
    least = float(torch.linalg.eigvalsh(hessian(problem, found["DDP"].controls))[0])
    assert least > 1e-3, "stationary, but no strict minimum"
    for other, solution in zip(controls[1:], list(found.values())[1:], strict=True):
        assert (other - controls[0]).norm() <= 2 * (1e-9 + solution.residual.norm) / least
    angle, speed = found["DDP"].states[-1]
    assert abs(angle - math.pi) < 0.1 and abs(speed) < 0.1


BOXED: dict[str, Callable[[], ControlProblem]] = {
    "scalar": lambda: boxed(scalar(), -0.4, 0.4),
    "double-integrator": lambda: boxed(double_integrator(), -0.1, 0.1),
    "varying": lambda: boxed(varying(None), -0.15, 0.1),
    "varying-batch": lambda: boxed(varying(6), -0.3, 0.3),
}


@BOTH
@pytest.mark.parametrize("name", BOXED)
def test_boxes_agree_with_a_convex_programme(name: str, solver: Solver) -> None:
    problem = BOXED[name]()
    solution = run(problem, solver, tol=1e-10)
    assert solution.status is Status.CONVERGED, solution.message
    reference = box_optimum(problem, solution.controls)
    assert problem.residual(reference).norm <= 1e-10
    torch.testing.assert_close(flat(solution.controls), flat(reference), rtol=0, atol=1e-8)
    assert flat(problem.gradient(reference)).norm() > 1e-3, "a box that does not bind tests nothing"


@BOTH
def test_boxes_per_example_are_boxes_of_each_problem(solver: Solver) -> None:
    problem = boxed(varying(3), -0.15, 0.1)
    start = problem.zero_controls(per_example=True)
    solution = solve(problem, solver, start, max_steps=30, tol=1e-10)
    assert solution.status is Status.CONVERGED, solution.message
    for i, x0 in enumerate(problem.x0):
        one = ControlProblem(problem.dynamics, problem.cost, x0, problem.box)
        reference = box_optimum(one, one.zero_controls())
        for u, expected in zip(solution.controls, reference, strict=True):
            torch.testing.assert_close(u[i], expected, rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("make", [residual_network, pendulum, lambda: deep_residual_network(8)])
def test_boxes_of_nonlinear_problems(make: Callable[[], ControlProblem]) -> None:
    problem = boxed(make(), -0.2, 0.15)
    solution = run(problem, DDP(), tol=1e-10, max_steps=60)
    assert solution.status is Status.CONVERGED, solution.message
    u, g = flat(solution.controls), flat(problem.gradient(solution.controls))
    assert u.min() >= -0.2 and u.max() <= 0.15
    free = (u > -0.2) & (u < 0.15)
    assert not free.all() and g[free].norm() <= 1e-10
    H = hessian(problem, solution.controls)[free][:, free]
    assert free.sum() == 0 or torch.linalg.eigvalsh(H)[0] > 0
    assert solution.gains is not None
    for K, control in zip(solution.gains, solution.controls, strict=True):
        assert not K[(control == -0.2) | (control == 0.15)].any()


def test_box_qp_is_the_minimum_of_every_group() -> None:
    root = normal(5, 7, 7, seed=1)
    H = root @ root.mT + 0.1 * torch.eye(7, dtype=F64)
    g, low = 5 * normal(5, 7, seed=2), torch.full((5, 7), -0.3, dtype=F64)
    high = low + 0.5
    low[0, 0], high[1, 1], low[2, 2] = -math.inf, math.inf, 0.2
    high[2, 2] = 0.2
    found = box_qp(H, g, low, high)
    assert found is not None
    slope = g + (H @ found.x.unsqueeze(-1)).squeeze(-1)
    moved = (found.x - slope).clamp(low, high)
    torch.testing.assert_close(found.x, moved, rtol=0, atol=1e-12)
    assert 0 < found.free.sum() < found.free.numel()
    assert box_qp(-H, 0 * g, low, high) is None


def test_gains_are_the_derivative_of_the_optimal_controls() -> None:
    """``du_t/dx_0 = K_t dx_t/dx_0`` along the closed loop, by finite differences of solves."""
    problem = deep_residual_network(3, horizon=4)
    solution = run(problem, DDP(), tol=1e-12)
    assert solution.gains is not None
    assert [K.shape for K in solution.gains] == [(3, 3)] * 4
    model = model_at(problem, solution.controls, second_order=True)
    size = 1e-4
    for i in range(3):
        ends = []
        for sign in (1, -1):
            x0 = problem.x0.clone()
            x0[i] += sign * size
            moved = ControlProblem(problem.dynamics, problem.cost, x0)
            ends.append(solve(moved, DDP(), solution.controls, max_steps=30, tol=1e-12).controls)
        dx = torch.eye(3, dtype=F64)[i]
        for t, (K, plus, minus) in enumerate(zip(solution.gains, *ends, strict=True)):
            torch.testing.assert_close(K @ dx, (plus - minus) / (2 * size), rtol=1e-5, atol=1e-6)
            dx = model.A[t][0] @ dx + model.B[t][0] @ (K @ dx)


def test_gains_of_examples_are_those_of_each_alone() -> None:
    problem = varying(3)
    start = problem.zero_controls(per_example=True)
    solution = solve(problem, ILQR(), start, max_steps=9, tol=1e-10)
    one = ControlProblem(problem.dynamics, problem.cost, problem.x0[1])
    alone = solve(one, ILQR(), one.zero_controls(), max_steps=9, tol=1e-10)
    assert solution.gains is not None and alone.gains is not None
    for K, expected in zip(solution.gains, alone.gains, strict=True):
        torch.testing.assert_close(K[1], expected, rtol=1e-9, atol=1e-12)


@BOTH
def test_linear_quadratic_problems_take_one_step(solver: Solver) -> None:
    for problem in (scalar(), double_integrator(), varying(None), varying(6)):
        assert run(problem, solver, tol=1e-9).iterations == 1


@BOTH
def test_a_singular_control_cost_is_no_obstacle(solver: Solver) -> None:
    """The second control does nothing: ``Q_uu`` is singular at every step."""
    A = torch.eye(2, dtype=F64)
    B = torch.tensor([[1.0, 0.0], [0.5, 0.0]], dtype=F64)
    cost = QuadraticCost.constant(4, Q=A, R=0 * A, Qf=A)
    problem = ControlProblem(LinearDynamics.constant(4, A, B), cost, normal(2, seed=1))
    solution = run(problem, solver, tol=1e-9)
    assert solution.status is Status.CONVERGED, solution.message
    assert solution.gains is not None
    assert all(torch.isfinite(K).all() for K in solution.gains)
    assert all(u[1] == 0 for u in solution.controls)


@BOTH
@pytest.mark.parametrize("kind", ["concave", "linear"])
def test_a_problem_without_minimum_is_called_unbounded(kind: str, solver: Solver) -> None:
    one = torch.ones(1, 1, dtype=F64)
    R = -one if kind == "concave" else 0 * one
    r = [torch.ones(1, dtype=F64)] * 3
    cost = QuadraticCost(Q=[0 * one] * 3, R=[R] * 3, Qf=0.1 * one, r=r)
    B = one if kind == "concave" else 0 * one
    problem = ControlProblem(LinearDynamics.constant(3, one, B), cost, one[0])
    solution = run(problem, solver)
    assert solution.status is Status.UNBOUNDED, solution.message
    assert "weight decay" in solution.message


@BOTH
def test_a_box_gives_a_concave_problem_a_minimum_at_its_bounds(solver: Solver) -> None:
    one = torch.ones(1, 1, dtype=F64)
    cost = QuadraticCost(
        Q=[0 * one] * 3, R=[-one] * 3, Qf=0.1 * one, r=[torch.ones(1, dtype=F64)] * 3
    )
    problem = boxed(
        ControlProblem(LinearDynamics.constant(3, one, one), cost, one[0]), low=-2.0, high=1.0
    )
    solution = run(problem, solver)
    assert solution.status is Status.CONVERGED and solution.residual.norm == 0.0
    assert flat(solution.controls).tolist() == [-2.0] * 3
