"""Truncated conjugate gradients: their ends, the ball, singular and negative curvature."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.conjugate_gradients import End, conjugate_gradients
from deltacontrol.theory.linear.operator import SymmetricMatrix
from tests.theory.problems import normal


@pytest.fixture(autouse=True)
def _default_float64(float64: None) -> None:
    """Everything here is in float64."""


def spd(size: int) -> Tensor:
    root = normal(size, size, seed=1)
    return root @ root.mT / size + 0.1 * torch.eye(size)


def test_conjugate_gradients_solve_a_definite_system_in_as_many_products_as_unknowns() -> None:
    H, g = spd(12), normal(12, seed=2)
    found = conjugate_gradients(SymmetricMatrix(H), g, rtol=1e-12, max_products=40)
    exact = -torch.linalg.solve(H, g)
    assert found.end is End.TOLERANCE and found.products <= 14
    assert (found.step - exact).norm() <= 1e-10 * exact.norm()
    assert found.decrease == pytest.approx(float(-0.5 * g @ exact), rel=1e-12)
    early = conjugate_gradients(SymmetricMatrix(H), g, rtol=1e-12, max_products=3)
    assert early.end is End.PRODUCTS and early.products == 3
    assert early.residual == pytest.approx(float((g + H @ early.step).norm() / g.norm()))
    assert 0 < early.decrease < found.decrease


def test_a_ball_is_kept_and_met() -> None:
    H, g = spd(12), normal(12, seed=2)
    free = conjugate_gradients(SymmetricMatrix(H), g, rtol=1e-10, max_products=40)
    for share in (0.01, 0.5, 0.9):
        radius = share * float(free.step.norm())
        found = conjugate_gradients(
            SymmetricMatrix(H), g, rtol=1e-10, max_products=40, radius=radius
        )
        assert found.end is End.BOUNDARY
        assert float(found.step.norm()) == pytest.approx(radius, rel=1e-12)
        # No worse than the best point along the gradient, Cauchy's.
        tau = min(radius / float(g.norm()), float(g @ g) / float(g @ H @ g))
        cauchy = -tau * g
        assert found.decrease >= -float(g @ cauchy + 0.5 * cauchy @ H @ cauchy) - 1e-12


def test_negative_curvature_is_followed_to_the_boundary() -> None:
    H = torch.diag(torch.tensor([2.0, -1.0, 0.5]))
    g = torch.tensor([1.0, 1e-3, 0.3])
    found = conjugate_gradients(SymmetricMatrix(H), g, rtol=1e-10, max_products=9, radius=50.0)
    assert found.end is End.NEGATIVE_CURVATURE
    assert float(found.step.norm()) == pytest.approx(50.0)
    assert found.curvature < -1000 and found.decrease > 500
    unlimited = conjugate_gradients(SymmetricMatrix(H), g, rtol=1e-10, max_products=9)
    assert unlimited.end is End.NEGATIVE_CURVATURE and math.isfinite(unlimited.decrease)


def test_singular_curvature_is_named() -> None:
    H = torch.diag(torch.tensor([1.0, 0.0]))
    consistent = conjugate_gradients(
        SymmetricMatrix(H), torch.tensor([2.0, 0.0]), rtol=1e-12, max_products=9
    )
    assert consistent.end is End.TOLERANCE and consistent.step.tolist() == [-2.0, 0.0]
    hopeless = conjugate_gradients(
        SymmetricMatrix(H), torch.tensor([0.0, 1.0]), rtol=1e-12, max_products=9
    )
    assert hopeless.end is End.SINGULAR and not hopeless.step.any()
    bounded = conjugate_gradients(
        SymmetricMatrix(H), torch.tensor([0.0, 1.0]), rtol=1e-12, max_products=9, radius=3.0
    )
    assert bounded.end is End.SINGULAR and bounded.step.tolist() == [0.0, -3.0]


def test_nothing_is_done_for_a_zero_gradient() -> None:
    found = conjugate_gradients(
        SymmetricMatrix(torch.eye(3)), torch.zeros(3), rtol=0.5, max_products=9
    )
    assert found.products == 0 and not found.step.any() and found.residual == 0.0


def test_what_is_not_finite_is_no_convergence() -> None:
    H, g = spd(4), normal(4, seed=2)
    bad = g.clone()
    bad[1] = math.nan
    for wrong in (bad, bad.nan_to_num(math.inf)):
        found = conjugate_gradients(SymmetricMatrix(H), wrong, rtol=1e-8, max_products=9)
        assert found.end is End.NOT_FINITE and found.products == 0 and not found.step.any()
    H[2, 3] = math.nan
    found = conjugate_gradients(SymmetricMatrix(H), g, rtol=1e-8, max_products=9, radius=1.0)
    assert found.end is End.NOT_FINITE and bool(torch.isfinite(found.step).all())


@pytest.mark.parametrize("rtol", [-1.0, math.nan])
def test_a_tolerance_that_no_residual_reaches_is_refused(rtol: float) -> None:
    with pytest.raises(InputError, match="rtol is"):
        conjugate_gradients(SymmetricMatrix(spd(3)), normal(3, seed=2), rtol=rtol, max_products=5)
