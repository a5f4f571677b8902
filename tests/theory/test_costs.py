"""Costs and systems: values by hand, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from deltacontrol.theory.control.costs import CrossEntropyCost, QuadraticCost, SquaredErrorCost
from deltacontrol.theory.control.systems import LinearDynamics, LowRankDynamics, ResidualNetwork
from deltacontrol.theory.errors import InputError
from tests.theory.problems import normal

F64 = torch.float64


def test_cross_entropy_averages_over_the_labels_that_count() -> None:
    logits, labels = normal(2, 3, 4, seed=0), torch.tensor([[0, 3, -100], [1, -100, -100]])
    expected = functional.cross_entropy(
        torch.stack([logits[0, 0], logits[0, 1], logits[1, 0]]), torch.tensor([0, 3, 1])
    )
    torch.testing.assert_close(CrossEntropyCost(labels).terminal(logits), expected)


def test_cross_entropy_refuses_what_has_no_mean() -> None:
    with pytest.raises(InputError, match="every one of the 2 labels is ignored"):
        CrossEntropyCost(torch.tensor([-100, -100]))
    with pytest.raises(InputError, match=r"logits have shape \(3, 4\) and labels \(2,\)"):
        CrossEntropyCost(torch.tensor([0, 1])).terminal(torch.zeros(3, 4))


def test_squared_error_is_half_the_mean_over_examples() -> None:
    x, target = normal(5, 3, seed=0), normal(5, 3, seed=1)
    value = SquaredErrorCost(target).terminal(x)
    assert float(value) == pytest.approx(0.5 * float((x - target).square().sum()) / 5)
    one = SquaredErrorCost(target[0]).terminal(x[0])
    assert float(one) == pytest.approx(0.5 * float((x[0] - target[0]).square().sum()))
    with pytest.raises(InputError, match=r"\(5, 3\) and the target \(3,\)"):
        SquaredErrorCost(target[0]).terminal(x)


def test_weight_decay_of_shared_and_per_example_controls() -> None:
    u = normal(4, 3, seed=2)
    for cost in (
        SquaredErrorCost(torch.zeros(1), weight_decay=0.6),
        CrossEntropyCost(torch.tensor([0]), weight_decay=0.6),
    ):
        assert float(cost.running(0, u, u[0])) == pytest.approx(0.3 * float(u[0].square().sum()))
        assert float(cost.running(0, u, u)) == pytest.approx(0.3 * float(u.square().sum()) / 4)
        assert float(cost.running(0, u, u[:, :0])) == 0.0


def test_quadratic_cost_by_hand() -> None:
    Q, R, N = normal(1, 2, 2, seed=0), normal(1, 3, 3, seed=1), normal(1, 2, 3, seed=2)
    q, r, Qf, qf = (normal(*s, seed=3) for s in ((1, 2), (1, 3), (2, 2), (2,)))
    cost = QuadraticCost(Q=Q, R=R, N=N, q=q, r=r, Qf=Qf, qf=qf)
    x, u = normal(2, seed=4), normal(3, seed=5)
    expected = 0.5 * x @ Q[0] @ x + 0.5 * u @ R[0] @ u + x @ N[0] @ u + q[0] @ x + r[0] @ u
    torch.testing.assert_close(cost.running(0, x, u), expected)
    torch.testing.assert_close(cost.terminal(x), 0.5 * x @ Qf @ x + qf @ x)
    batch = torch.stack([x, 2 * x])
    mean = (cost.running(0, x, u) + cost.running(0, 2 * x, u)) / 2
    torch.testing.assert_close(cost.running(0, batch, u), mean)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"Q": [torch.zeros(2, 3)]}, r"Q\[0\] has shape \(2, 3\); expected \(3, 3\)"),
        ({"N": [torch.zeros(1, 2)]}, r"N\[0\] has shape \(1, 2\); expected \(2, 1\)"),
        ({"r": [torch.zeros(2)]}, r"r\[0\] has shape \(2,\); expected \(1,\)"),
        ({"q": [torch.zeros(2)] * 2}, "q has 2 entries and R 1"),
        ({"Qf": torch.zeros(2, 1)}, r"Qf has shape \(2, 1\)"),
        ({"qf": torch.zeros(3)}, r"qf has shape \(3,\); expected \(2,\)"),
    ],
)
def test_quadratic_cost_refuses_matrices_that_do_not_fit(
    change: dict[str, object], words: str
) -> None:
    good = {"Q": [torch.zeros(2, 2)], "R": [torch.eye(1)], "Qf": torch.zeros(2, 2)}
    with pytest.raises(InputError, match=words):
        QuadraticCost(**{**good, **change})


def test_linear_dynamics_refuse_matrices_that_do_not_fit() -> None:
    A, B = torch.zeros(3, 2), torch.zeros(3, 1)
    with pytest.raises(InputError, match="different numbers of steps"):
        LinearDynamics([A], [B, B])
    with pytest.raises(InputError, match="step 0 has terms with different numbers of rows"):
        LinearDynamics([A], [torch.zeros(2, 1)])
    with pytest.raises(
        InputError, match=r"A\[1\] has shape \(3, 2\) but A\[0\], of shape \(3, 2\)"
    ):
        LinearDynamics([A, A], [B, B])
    with pytest.raises(InputError, match=r"step 0 has shape \(4,\); expected \(..., 2\)"):
        LinearDynamics([A], [B]).step(0, torch.zeros(4), torch.zeros(1))


def test_residual_network_formula_and_refusal() -> None:
    network = ResidualNetwork.random(3, width=4, hidden=6, control_size=2, seed=1)
    x, u = normal(4, seed=0), normal(2, seed=1)
    expected = x + network.W2[1] @ torch.tanh(network.W1[1] @ x + network.B[1] @ u)
    torch.testing.assert_close(network.step(1, x, u), expected)
    assert network.horizon == 3 and network.control_sizes == (2, 2, 2)
    with pytest.raises(InputError, match="layer 0 has W1"):
        ResidualNetwork([torch.zeros(6, 4)], [torch.zeros(6, 4)], [torch.zeros(6, 2)])


def test_low_rank_step_is_that_of_the_changed_weight() -> None:
    dynamics = LowRankDynamics([normal(3, 4, seed=0)], rank=2)
    x, u = normal(5, 3, seed=1), normal(14, seed=2)
    down, up = u[:6].reshape(3, 2), u[6:].reshape(2, 4)
    torch.testing.assert_close(dynamics.step(0, x, u), x @ (dynamics.weights[0] + down @ up))
    each = dynamics.step(0, x, u.expand(5, -1))
    torch.testing.assert_close(each, dynamics.step(0, x, u))
    torch.testing.assert_close(dynamics.step(0, x[0], u), dynamics.step(0, x, u)[0])
    with pytest.raises(InputError, match="rank is 0"):
        LowRankDynamics([normal(3, 4, seed=0)], rank=0)
