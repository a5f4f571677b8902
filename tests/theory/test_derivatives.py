"""All steps differentiated at once, and the sweep of one group: equal to the loop over steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.control.costs import CrossEntropyCost, QuadraticCost, SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem, Cost, Dynamics
from deltacontrol.theory.control.systems import LinearDynamics, LowRankDynamics, ResidualNetwork
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.quadratic.derivatives import Along, evaluate, one_by_one, running_costs
from deltacontrol.theory.solvers.quadratic_model import QuadraticModel, sweep

L, N, M = 5, 4, 3


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


SYSTEMS: dict[str, Dynamics] = {
    "linear": LinearDynamics(normal(1, L, N, N) / 2, normal(2, L, N, M), normal(3, L, N)),
    "list": LinearDynamics(list(normal(1, L, N, N) / 2), list(normal(2, L, N, M))),
    "residual": ResidualNetwork.random(L, N, 6, M),
    "low-rank": LowRankDynamics(normal(4, L, N, N) / 2, rank=2),
}
SHAPES = pytest.mark.parametrize(
    ("batch", "per_example"), [(None, False), (1, False), (6, False), (6, True)]
)


def costs(batch: int | None, m: int) -> dict[str, Cost]:
    lead = () if batch is None else (batch,)
    Q, R = (normal(5 + k, L, size, size) for k, size in enumerate((N, m)))
    terms = (normal(8, L, N, m), normal(9, L, N), normal(10, L, m), normal(11, N))
    return {
        "quadratic": QuadraticCost(Q, list(R @ R.mT), normal(7, N, N), *terms),
        "error": SquaredErrorCost(normal(12, *lead, N), weight_decay=0.3),
        "entropy": CrossEntropyCost(torch.zeros(lead, dtype=torch.int64), weight_decay=0.1),
    }


def case(system: str, cost: str, batch: int | None, per_example: bool):
    dynamics = SYSTEMS[system]
    m = dynamics.control_sizes[0]
    x0 = normal(13, N) if batch is None else normal(13, batch, N)
    problem = ControlProblem(dynamics, costs(batch, m)[cost], x0)
    u = tuple(
        0.3 * normal(20 + t, *u_t.shape)
        for t, u_t in enumerate(problem.zero_controls(per_example=per_example))
    )
    return problem, u


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12 * float(wanted.abs().max()))


@SHAPES
@pytest.mark.parametrize("cost", ["quadratic", "error", "entropy"])
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.one_in(3)
def test_all_at_once_are_one_by_one(system, cost, batch, per_example, second_order) -> None:
    problem, u = case(system, cost, batch, per_example)
    now = problem.evaluate(u)
    found_now, along = evaluate(problem, u)
    assert along is not None
    for name in ("states", "costates", "gradient"):
        for a, b in zip(getattr(found_now, name), getattr(now, name), strict=True):
            assert_near(a, b)
    assert_near(found_now.objective, now.objective)
    found = along.model(problem, now, second_order)
    for all_of_them, each in zip(found, one_by_one(problem, u, now, second_order), strict=True):
        assert_near(all_of_them, torch.stack(each))
    each = [problem.cost.running(t, now.states[t], u_t) for t, u_t in enumerate(u)]
    assert_near(torch.stack(list(running_costs(problem, now.states, u))), torch.stack(each))


@pytest.mark.parametrize("batch", [None, 6])
@pytest.mark.parametrize("system", ["linear", "residual"])
@pytest.mark.parametrize(("convexity", "damping"), [(0.0, 0.0), (1.0, 0.0), (1.0, 3.0)])
def test_the_sweep_of_one_group_is_the_batched_one(system, batch, convexity, damping) -> None:
    problem, u = case(system, "error", batch, False)
    model = QuadraticModel.of(problem, u, problem.evaluate(u), second_order=True)
    assert model.stacked is not None
    options = {"convexity": convexity, "damping": damping}
    found, wanted = sweep(model, **options), sweep(replace(model, stacked=None), **options)
    for name in ("k", "K", "V"):
        for a, b in zip(getattr(found, name), getattr(wanted, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert found.slope == pytest.approx(wanted.slope, rel=1e-9)
    assert found.curvature == pytest.approx(wanted.curvature, rel=1e-9)


class Doubled(ResidualNetwork):
    """A step of one's own, which the parent's ``all_steps`` does not know."""

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        return 2 * super().step(t, x, u)


class Contradicting(Doubled):
    def all_steps(self, x: Tensor, u: Tensor) -> Tensor | None:
        return ResidualNetwork.all_steps(self, x, u)


def test_a_step_of_ones_own_is_not_overlooked() -> None:
    given = ResidualNetwork.random(L, N, 6, M)
    for kind in (Doubled, Contradicting):
        dynamics = kind(given.W1, given.W2, given.B)
        problem = ControlProblem(dynamics, SquaredErrorCost(normal(1, N)), normal(2, N))
        u = problem.zero_controls()
        now = problem.evaluate(u)
        if kind is Doubled:
            assert Along.of(problem, u, now.states) is None
            continue
        with pytest.raises(InputError, match=r"Contradicting.all_steps .* those of step"):
            Along.of(problem, u, now.states)


def test_steps_of_several_sizes_go_one_by_one() -> None:
    dynamics = LinearDynamics([normal(1, N, N)] * 2, [normal(2, N, 1), normal(3, N, 2)])
    cost = SquaredErrorCost(normal(4, N), weight_decay=1.0)
    problem = ControlProblem(dynamics, cost, normal(5, N))
    u = problem.zero_controls()
    assert Along.of(problem, u, problem.rollout(u)) is None
