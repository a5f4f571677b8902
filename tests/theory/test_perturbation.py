"""Spectral norms against dense ones, and the growth bound where it is an equality."""

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.control.problem import Dynamics
from deltacontrol.theory.control.systems import LinearDynamics, ResidualNetwork
from deltacontrol.theory.depth.perturbation import (
    example_norms,
    growth_bound,
    segment_norms,
    spectral_norm,
)
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.linearisation import Linearisation
from deltacontrol.theory.linear.operator import LinearOperator, SymmetricMatrix
from tests.theory.problems import normal

F64 = torch.float64


class Blocks(LinearOperator):
    """``diag(A_1, ..., A_batch)`` of a tensor ``(batch, m, n)``."""

    def __init__(self, A: Tensor) -> None:
        batch, m, n = A.shape
        super().__init__((batch * m, batch * n), A.dtype, A.device)
        self.A = A

    def _product(self, x: Tensor) -> Tensor:
        rows = x.unflatten(-1, (len(self.A), -1))
        return torch.einsum("bij,...bj->...bi", self.A, rows).flatten(-2)

    def _transpose_product(self, y: Tensor) -> Tensor:
        rows = y.unflatten(-1, (len(self.A), -1))
        return torch.einsum("bij,...bi->...bj", self.A, rows).flatten(-2)


def test_spectral_norms_of_dense_matrices() -> None:
    A = normal(4, 7, 9, seed=1)
    found = spectral_norm(
        Blocks(A),
        torch.zeros(4, 9, dtype=F64),
        num_iterations=50,
    )
    values = torch.linalg.svdvals(A)[:, 0]
    torch.testing.assert_close(found.value, values, rtol=1e-12, atol=0)
    image = torch.einsum("bij,bj->bi", A, found.vector)
    torch.testing.assert_close(image.norm(dim=1), values, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.vector.norm(dim=1), torch.ones(4, dtype=F64))


def test_few_iterations_give_a_lower_bound_with_its_residual() -> None:
    A = normal(3, 40, 40, seed=2)
    exact = torch.linalg.svdvals(A)
    last = torch.zeros(3, dtype=F64)
    for iterations in (1, 4, 8, 16, 40):
        found = spectral_norm(
            Blocks(A),
            torch.zeros(3, 40, dtype=F64),
            num_iterations=iterations,
        )
        assert bool((found.value <= exact[:, 0] * (1 + 1e-12)).all())
        assert bool((found.value >= last * (1 - 1e-12)).all())
        gap = (exact.square() - found.value.square()[:, None]).abs().min(dim=1).values
        assert bool((gap <= found.residual + 1e-10).all())
        last = found.value
    torch.testing.assert_close(last, exact[:, 0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_lanczos_that_ends_early(rank: int) -> None:
    """Of a matrix of rank one, or zero, nothing is left after two products."""
    a, b = normal(2, 5, seed=3), normal(2, 5, seed=4)
    A = rank * a[:, :, None] * b[:, None, :]
    found = spectral_norm(
        Blocks(A),
        torch.zeros(2, 5, dtype=F64),
    )
    expected = rank * a.norm(dim=1) * b.norm(dim=1)
    torch.testing.assert_close(found.value, expected, rtol=1e-12, atol=1e-12)
    assert bool((found.residual <= 1e-10).all())


def test_norms_along_a_segment_are_those_of_dense_jacobians() -> None:
    network = ResidualNetwork.random(3, width=4, hidden=6, control_size=2, seed=1)
    x, y, u = normal(5, 4, seed=5), normal(5, 4, seed=6), normal(2, seed=7)
    found = segment_norms(network, 1, x, y, u, num_points=4, num_iterations=10)
    assert found.value.shape == (4, 5) and found.vector.shape == (4, 5, 4)
    for k, s in enumerate((0.0, 1 / 3, 2 / 3, 1.0)):
        for i in range(5):
            point = x[i] + s * (y[i] - x[i])
            J = torch.func.jacrev(lambda z: network.step(1, z, u))(point)
            expected = torch.linalg.matrix_norm(J, ord=2)
            torch.testing.assert_close(found.value[k, i], expected, rtol=1e-6, atol=0)


def perturbed_states(dynamics: Dynamics, x0: Tensor, defects: list[Tensor]) -> list[Tensor]:
    states = [x0]
    for t, defect in enumerate(defects):
        u = x0.new_zeros(dynamics.control_sizes[t])
        states.append(dynamics.step(t, states[-1], u) + defect)
    return states


def test_the_bound_is_an_equality_for_aligned_scalars() -> None:
    """``x_{t+1} = a_t x_t`` with ``a_t > 0`` and positive defects."""
    rates = (0.5, 2.0, 3.0)
    one = torch.ones(1, 1, dtype=F64)
    dynamics = LinearDynamics(A=[a * one for a in rates], B=[0 * one for _ in rates])
    x0 = torch.tensor([[1.0], [-2.0]], dtype=F64)
    defects = [torch.tensor([[0.1], [0.0]], dtype=F64) * (t + 1) for t in range(3)]
    x = perturbed_states(dynamics, x0, [torch.zeros_like(d) for d in defects])
    y = perturbed_states(dynamics, x0 + 0.3, defects)
    lipschitz = [
        segment_norms(dynamics, t, x[t], y[t], x0.new_zeros(1)).value.amax(0) for t in range(3)
    ]
    bound = growth_bound(lipschitz, [example_norms(d) for d in defects], example_norms(y[0] - x0))
    actual = torch.stack([example_norms(b - a) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(bound, actual, rtol=1e-12, atol=1e-12)


def test_the_bound_holds_for_a_network_and_not_without_its_factors() -> None:
    """Layers that expand: leaving out the propagation falls below the true deviation."""
    network = ResidualNetwork.random(5, width=4, hidden=8, control_size=2, seed=2)
    network = ResidualNetwork(network.W1, 4.0 * torch.as_tensor(network.W2), network.B)
    x0 = 0.1 * normal(6, 4, seed=8)
    zeros = [torch.zeros_like(x0)] * 5
    lin = Linearisation(network, perturbed_states(network, x0, zeros), [x0.new_zeros(2)] * 5)
    start = spectral_norm(lin.transition, x0).vector
    x = perturbed_states(network, x0, zeros)
    y = perturbed_states(network, x0 + 0.01 * start, zeros)
    u = x0.new_zeros(2)
    constants = [segment_norms(network, t, x[t], y[t], u).value.amax(0) for t in range(5)]
    none = [torch.zeros(6, dtype=F64)] * 5
    initial = example_norms(y[0] - x[0])
    actual = example_norms(y[-1] - x[-1])
    assert bool((actual <= growth_bound(constants, none, initial)[-1]).all())
    unit = [torch.ones(6, dtype=F64)] * 5
    assert bool((actual > growth_bound(unit, none, initial)[-1]).all())


def test_bad_input() -> None:
    network = ResidualNetwork.random(2, width=4, hidden=6, control_size=2, seed=1)
    x, u = normal(3, 4, seed=1), normal(2, seed=2)
    with pytest.raises(InputError, match="num_points = 1"):
        segment_norms(network, 0, x, x, u, num_points=1)
    with pytest.raises(InputError, match=r"shapes \(3, 4\) and \(2, 4\)"):
        segment_norms(network, 0, x, x[:2], u)
    with pytest.raises(InputError, match="num_iterations = 0"):
        spectral_norm(SymmetricMatrix(torch.eye(12, dtype=F64)), x, num_iterations=0)
    with pytest.raises(InputError, match="1 Lipschitz constants and 2 defects"):
        growth_bound([x[:, 0]], [x[:, 0]] * 2, x[:, 0])
