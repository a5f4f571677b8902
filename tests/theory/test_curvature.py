"""Products with the Gauss-Newton curvature and the Hessian against dense ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deltacontrol.theory.control.costs import SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.linear.curvature import Curvature, GaussNewtonCurvature, HessianCurvature
from tests.theory.curvatures import cases, dense, matrix
from tests.theory.dense import flat
from tests.theory.problems import CASES, Case, embedding_problem, low_rank, normal, residual_network

kinds = pytest.mark.parametrize("kind", [GaussNewtonCurvature, HessianCurvature])


@pytest.fixture(autouse=True)
def _default_float64(float64: None) -> None:
    """Everything here is in float64."""


@cases
@kinds
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.one_in(3)
def test_products_equal_the_dense_curvature(case: Case, kind: type[Curvature], keep: bool) -> None:
    problem = case.make()
    u = case.start(problem, 0.6)
    expected = dense(kind, problem, u)
    curvature = kind(problem, u, keep=keep)
    found = matrix(curvature)
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    assert (found - found.mT).norm() <= 1e-13 * expected.norm()
    torch.testing.assert_close(curvature.gradient, flat(problem.gradient(u)))


@pytest.mark.parametrize("case", [c for c in CASES if c.linear_quadratic], ids=lambda c: c.name)
def test_gauss_newton_is_exact_for_linear_dynamics(case: Case) -> None:
    problem = case.make()
    u = case.start(problem, 0.6)
    exact, approximate = (
        matrix(kind(problem, u)) for kind in (HessianCurvature, GaussNewtonCurvature)
    )
    torch.testing.assert_close(exact, approximate, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [residual_network, low_rank, embedding_problem])
def test_hessian_equals_central_differences_of_the_gradient(
    make: Callable[[], ControlProblem],
) -> None:
    problem, step = make(), 1e-5
    u = tuple(normal(*c.shape, seed=3) for c in problem.zero_controls())
    v = tuple(normal(*c.shape, seed=4) for c in u)
    ahead, back = (
        flat(problem.gradient(tuple(a + s * b for a, b in zip(u, v, strict=True))))
        for s in (step, -step)
    )
    found = HessianCurvature(problem, u) @ flat(v)
    assert (found - (ahead - back) / (2 * step)).norm() <= 1e-8 * found.norm()


def without_decay() -> ControlProblem:
    problem = low_rank()
    return ControlProblem(problem.dynamics, SquaredErrorCost(normal(5, 3, seed=8)), problem.x0)


def test_gauss_newton_is_semidefinite_where_the_hessian_is_not() -> None:
    bare = without_decay()
    u = tuple(0.3 * normal(m, seed=m) for m in bare.dynamics.control_sizes)
    least = {
        kind: float(torch.linalg.eigvalsh(matrix(kind(bare, u)))[0])
        for kind in (GaussNewtonCurvature, HessianCurvature)
    }
    assert least[GaussNewtonCurvature] >= -1e-13 and least[HessianCurvature] < -0.01
