"""The layerwise linear-quadratic problem against Gauss-Newton, dense and by products."""

from __future__ import annotations

import pytest
import torch

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.curvature import GaussNewtonCurvature
from deltacontrol.theory.solvers.gauss_newton import damped_step
from deltacontrol.theory.solvers.layerwise import layerwise_step
from tests.theory.curvatures import dense_gauss_newton
from tests.theory.dense import flat
from tests.theory.problems import (
    CASES,
    Case,
    embedding_problem,
    forgetful_problem,
    residual_network,
)

F64 = torch.float64
SHARED = (
    *(case for case in CASES if not case.per_example),
    Case("embedding", embedding_problem),
    Case("forgetful", forgetful_problem),
)


@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
@pytest.mark.parametrize("damping", [0.01, 1.0])
@pytest.mark.one_in(3)
def test_riccati_products_and_normal_equations_give_one_step(case: Case, damping: float) -> None:
    problem = case.make()
    u = case.start(problem, 0.6)
    by_layers = flat(layerwise_step(problem, u, damping))
    by_products = damped_step(GaussNewtonCurvature(problem, u), damping, rtol=1e-13).step
    G = dense_gauss_newton(problem, u)
    dense = -torch.linalg.solve(
        G + damping * torch.eye(len(G), dtype=F64), flat(problem.gradient(u))
    )
    assert (by_layers - dense).norm() <= 1e-9 * dense.norm()
    assert (by_products - dense).norm() <= 1e-9 * dense.norm()
    other = flat(layerwise_step(problem, u, 2 * damping))
    assert (other - dense).norm() > 1e-4 * dense.norm()


def test_controls_of_each_example_are_refused() -> None:
    problem = residual_network()
    with pytest.raises(InputError, match="shares"):
        layerwise_step(problem, problem.zero_controls(per_example=True), 0.1)
