"""Conjugate gradients inside a ball, which the Gauss-Newton steps are from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.solvers.truncated_cg import End, minimise_model
from tests.theory.problems import (
    normal,
)

pytestmark = pytest.mark.usefixtures("float64")


def spd(size: int) -> Tensor:
    root = normal(size, size, seed=1)
    return root @ root.mT / size + 0.1 * torch.eye(size)


def test_conjugate_gradients_solve_a_definite_system_in_as_many_products_as_unknowns() -> None:
    H, g = spd(12), normal(12, seed=2)
    found = minimise_model(lambda z: H @ z, g, rtol=1e-12, max_products=40)
    exact = -torch.linalg.solve(H, g)
    assert found.end is End.TOLERANCE and found.products <= 14
    assert (found.step - exact).norm() <= 1e-10 * exact.norm()
    assert found.decrease == pytest.approx(float(-0.5 * g @ exact), rel=1e-12)
    early = minimise_model(lambda z: H @ z, g, rtol=1e-12, max_products=3)
    assert early.end is End.PRODUCTS and early.products == 3
    assert early.residual == pytest.approx(float((g + H @ early.step).norm() / g.norm()))
    assert 0 < early.decrease < found.decrease


def test_a_ball_is_kept_and_met() -> None:
    H, g = spd(12), normal(12, seed=2)
    free = minimise_model(lambda z: H @ z, g, rtol=1e-10, max_products=40)
    for share in (0.01, 0.5, 0.9):
        radius = share * float(free.step.norm())
        found = minimise_model(lambda z: H @ z, g, rtol=1e-10, max_products=40, radius=radius)
        assert found.end is End.BOUNDARY
        assert float(found.step.norm()) == pytest.approx(radius, rel=1e-12)
        # No worse than the best point along the gradient, Cauchy's.
        tau = min(radius / float(g.norm()), float(g @ g) / float(g @ H @ g))
        cauchy = -tau * g
        assert found.decrease >= -float(g @ cauchy + 0.5 * cauchy @ H @ cauchy) - 1e-12


def test_negative_curvature_is_followed_to_the_boundary() -> None:
    H = torch.diag(torch.tensor([2.0, -1.0, 0.5]))
    g = torch.tensor([1.0, 1e-3, 0.3])
    found = minimise_model(lambda z: H @ z, g, rtol=1e-10, max_products=9, radius=50.0)
    assert found.end is End.NEGATIVE_CURVATURE
    assert float(found.step.norm()) == pytest.approx(50.0)
    assert found.curvature < -1000 and found.decrease > 500
    unlimited = minimise_model(lambda z: H @ z, g, rtol=1e-10, max_products=9)
    assert unlimited.end is End.NEGATIVE_CURVATURE and math.isfinite(unlimited.decrease)


def test_singular_curvature_is_named() -> None:
    H = torch.diag(torch.tensor([1.0, 0.0]))
    consistent = minimise_model(
        lambda z: H @ z, torch.tensor([2.0, 0.0]), rtol=1e-12, max_products=9
    )
    assert consistent.end is End.TOLERANCE and consistent.step.tolist() == [-2.0, 0.0]
    hopeless = minimise_model(lambda z: H @ z, torch.tensor([0.0, 1.0]), rtol=1e-12, max_products=9)
    assert hopeless.end is End.SINGULAR and not hopeless.step.any()
    bounded = minimise_model(
        lambda z: H @ z, torch.tensor([0.0, 1.0]), rtol=1e-12, max_products=9, radius=3.0
    )
    assert bounded.end is End.SINGULAR and bounded.step.tolist() == [0.0, -3.0]


def test_nothing_is_done_for_a_zero_gradient() -> None:
    found = minimise_model(lambda z: z, torch.zeros(3), rtol=0.5, max_products=9)
    assert found.products == 0 and not found.step.any() and found.residual == 0.0
