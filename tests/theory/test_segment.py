"""A part of a system is a system: its states, gradients and costates are those of the whole."""

import pytest
import torch

from deltacontrol.theory.control.costs import SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.systems import ResidualNetwork, Segment
from deltacontrol.theory.errors import InputError
from tests.theory.problems import normal, residual_network


def test_segments_in_a_row_are_the_whole() -> None:
    problem = residual_network()
    u = tuple(normal(m, seed=t) for t, m in enumerate(problem.dynamics.control_sizes))
    states = problem.rollout(u)
    for start, stop in ((0, 2), (2, 3), (3, None), (0, 5)):
        part = Segment(problem.dynamics, start, stop)
        inside = ControlProblem(part, problem.cost, states[start]).rollout(u[start:stop])
        for a, b in zip(inside, states[start : None if stop is None else stop + 1], strict=True):
            assert torch.equal(a, b)


def test_the_last_segment_has_the_gradients_of_the_whole() -> None:
    problem = residual_network()
    u = tuple(normal(m, seed=t) for t, m in enumerate(problem.dynamics.control_sizes))
    whole = problem.evaluate(u)
    part = ControlProblem(Segment(problem.dynamics, 2), problem.cost, whole.states[2])
    tail = part.evaluate(u[2:])
    for a, b in zip(tail.gradient, whole.gradient[2:], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(tail.costates, whole.costates[2:], strict=True):
        assert torch.equal(a, b)


def test_a_segment_of_a_segment() -> None:
    network = ResidualNetwork.random(6, width=3, hidden=4, control_size=2, seed=1)
    inner = Segment(Segment(network, 1, 5), 1, 3)
    x, u = normal(4, 3, seed=1), normal(2, seed=2)
    assert inner.horizon == 2 and inner.control_sizes == (2, 2)
    assert torch.equal(inner.step(1, x, u), network.step(3, x, u))
    problem = ControlProblem(inner, SquaredErrorCost(torch.zeros_like(x)), x)
    assert len(problem.rollout((u, u))) == 3


@pytest.mark.parametrize("ends", [(2, 2), (3, 2), (-1, 2), (0, 7), (6, None)])
def test_a_segment_beyond_the_system(ends: tuple[int, int | None]) -> None:
    network = ResidualNetwork.random(6, width=3, hidden=4, control_size=2, seed=1)
    with pytest.raises(InputError, match="0 <= start < stop <= horizon"):
        Segment(network, *ends)
