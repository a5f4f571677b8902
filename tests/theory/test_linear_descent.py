"""The training of linear models by their kernel: closed forms, fixed points, the flow's limit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.linear_descent import effective_dimension, linear_descent

TRAIN, OTHERS, CONTROLS = 6, 3, 9


@pytest.fixture
def linear(float64: None) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs at the start, their Jacobian, and targets of the first of them."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(TRAIN + OTHERS, generator=generator)
    jacobian = torch.randn(TRAIN + OTHERS, CONTROLS, generator=generator)
    return start, jacobian, torch.randn(TRAIN, generator=generator)


def test_outputs_are_those_of_the_controls(linear: tuple[Tensor, Tensor, Tensor]) -> None:
    """The same descent of the controls themselves, with a metric and a decay."""
    start, J, y = linear
    metric = torch.rand(CONTROLS) + 0.5
    rates = torch.tensor([[0.02, 0.05], [0.01, 0.05], [0.03, 0.0]])
    K = (J * metric) @ J[:TRAIN].mT
    found = linear_descent(start, K, lambda z: (z - y).tanh(), rates, decay=0.1)
    for copy in range(2):
        u = torch.zeros(CONTROLS)
        for rate in rates[:, copy]:
            slope = ((start + J @ u)[:TRAIN] - y).tanh()
            u = u - rate * (metric * (J[:TRAIN].mT @ slope) + 0.1 * u)
        torch.testing.assert_close(found[copy], start + J @ u, rtol=1e-12, atol=1e-12)


def test_the_squared_distance_has_its_closed_form(linear: tuple[Tensor, Tensor, Tensor]) -> None:
    start, J, y = linear
    K = J @ J[:TRAIN].mT
    rates = torch.full((7, 1), 0.03)
    found = linear_descent(start, K, lambda z: z - y, rates)[0]
    step = torch.eye(TRAIN) - 0.03 * K[:TRAIN]
    left = torch.linalg.matrix_power(step, 7) @ (start[:TRAIN] - y)
    torch.testing.assert_close(found[:TRAIN], y + left, rtol=1e-10, atol=1e-10)
    # Others follow by the same controls: K_* K^-1 of the change.
    change = torch.linalg.solve(K[:TRAIN], y + left - start[:TRAIN])
    torch.testing.assert_close(found[TRAIN:], start[TRAIN:] + K[TRAIN:] @ change)


def test_short_steps_are_the_flow_to_first_order(linear: tuple[Tensor, Tensor, Tensor]) -> None:
    start, J, y = linear
    K, time = J @ J[:TRAIN].mT, 0.2
    exact = y + torch.linalg.matrix_exp(-time * K[:TRAIN]) @ (start[:TRAIN] - y)

    def error(steps: int) -> float:
        rates = torch.full((steps, 1), time / steps)
        return float((linear_descent(start, K, lambda z: z - y, rates)[0, :TRAIN] - exact).norm())

    assert error(400) == pytest.approx(error(800) * 2, rel=0.02)
    assert error(800) < 1e-2


def test_with_decay_it_ends_in_the_ridge_of_the_metric(
    linear: tuple[Tensor, Tensor, Tensor],
) -> None:
    start, J, y = linear
    metric = torch.rand(CONTROLS) + 0.5
    K = (J * metric) @ J[:TRAIN].mT
    found = linear_descent(start, K, lambda z: z - y, torch.full((4000, 1), 0.02), decay=0.5)[0]
    normal = J[:TRAIN].mT @ J[:TRAIN] + 0.5 * torch.diag(1 / metric)
    u = torch.linalg.solve(normal, J[:TRAIN].mT @ (y - start[:TRAIN]))
    torch.testing.assert_close(found, start + J @ u, rtol=1e-9, atol=1e-9)


def test_a_divergence_shows_and_harms_no_other_copy(
    linear: tuple[Tensor, Tensor, Tensor],
) -> None:
    start, J, y = linear
    K = J @ J[:TRAIN].mT
    rates = torch.tensor([0.01, 1e3]).expand(200, 2)
    found = linear_descent(start, K, lambda z: z - y, rates)
    alone = linear_descent(start, K, lambda z: z - y, rates[:, :1])
    assert not found[1].isfinite().all()
    torch.testing.assert_close(found[:1], alone)


def test_the_effective_dimension_is_a_sum_over_eigenvalues(float64: None) -> None:
    values = torch.tensor([4.0, 1.0, 0.25, 0.0])
    basis = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))).Q
    found = effective_dimension((basis * values) @ basis.mT, 0.5)
    assert found == pytest.approx(4 / 4.5 + 1 / 1.5 + 0.25 / 0.75, rel=1e-12)
    with pytest.raises(InputError, match="the ridge is 0"):
        effective_dimension(torch.eye(2), 0.0)


def test_shapes_that_do_not_fit_are_refused(float64: None) -> None:
    with pytest.raises(InputError, match=r"start has shape \(3,\), kernel \(2, 2\)"):
        linear_descent(torch.zeros(3), torch.eye(2), lambda z: z, torch.ones(1, 1))
