"""Gradient descent by MSA, and shooting where its line search fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers import MSA, Shooting, Status, solve
from tests.theory.dense import flat, hessian
from tests.theory.problems import low_rank, residual_network, scalar, varying
from tests.theory.solver_suite import F64, distance


@pytest.mark.parametrize("make", [residual_network, low_rank, lambda: varying(6)])
def test_msa_is_gradient_descent(make: Callable[[], ControlProblem]) -> None:
    problem, step, iterates = make(), 0.05, []
    start = tuple(torch.linspace(-1, 1, m, dtype=F64) for m in problem.dynamics.control_sizes)
    solve(problem, MSA(step), start, max_steps=30, tol=0.0, callback=iterates.append)
    leaves = [u.clone().requires_grad_() for u in start]
    optimiser = torch.optim.SGD(leaves, lr=step)
    for it in iterates:
        assert distance(it.controls, tuple(leaves)) <= 1e-12 * float(flat(it.controls).norm())
        optimiser.zero_grad()
        problem.objective(tuple(leaves)).backward()
        optimiser.step()


def test_msa_with_too_long_a_step_diverges_and_returns_the_last_finite_iterate() -> None:
    problem = scalar()
    solution = solve(problem, MSA(1e3), problem.zero_controls(), max_steps=500, tol=1e-9)
    assert solution.status is Status.DIVERGED
    assert "last finite iterate" in solution.message and "smaller step" in solution.message
    assert torch.isfinite(flat(solution.controls)).all()


@pytest.mark.slow
def test_msa_converges_exactly_below_two_over_the_curvature() -> None:
    problem = scalar()
    start = problem.zero_controls()
    top = float(torch.linalg.eigvalsh(hessian(problem, start))[-1])
    below, above = (
        solve(problem, MSA(factor * 2 / top), start, max_steps=300, tol=1e-10)
        for factor in (0.9, 1.02)
    )
    assert below.status is Status.CONVERGED
    assert above.status is not Status.CONVERGED
    assert above.history["residual"].iloc[-1] > above.history["residual"].iloc[0]


def test_shooting_reports_a_failed_line_search_with_its_cause() -> None:
    problem = residual_network()
    solution = solve(problem, Shooting(), problem.zero_controls(), max_steps=9999, tol=0.0)
    assert solution.status is Status.LINE_SEARCH_FAILED
    assert "L-BFGS stopped" in solution.message and "raise tol" in solution.message
    assert 0 < solution.residual.norm <= 1e-6


@pytest.mark.parametrize(
    ("value", "name"), [(0.0, "step_size"), (-1.0, "step_size"), (float("nan"), "minimiser is nan")]
)
def test_bad_settings_are_refused(value: float, name: str) -> None:
    with pytest.raises(InputError, match=name):
        MSA(value)
    with pytest.raises(InputError, match="memory"):
        Shooting(0)
    problem = scalar()
    with pytest.raises(InputError, match="max_steps"):
        solve(problem, MSA(1.0), problem.zero_controls(), max_steps=-1, tol=0.0)
    with pytest.raises(InputError, match="step 0 has shape"):
        bad = tuple(torch.zeros(2, dtype=F64) for _ in range(5))
        solve(problem, MSA(1.0), bad, max_steps=1, tol=0.0)
