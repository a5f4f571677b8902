"""Steps that differ in constants alone, differentiated at once: equal to the loop over steps."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.control.costs import QuadraticCost, SquaredErrorCost
from deltacontrol.theory.control.dynamics import Alike, Dynamics, alike_steps
from deltacontrol.theory.control.problem import ControlProblem, Cost
from deltacontrol.theory.control.systems import Segment
from deltacontrol.theory.quadratic import alike
from deltacontrol.theory.quadratic.alike import alike_at_once
from deltacontrol.theory.quadratic.derivatives import one_by_one
from deltacontrol.theory.solvers import DDP, ILQR, solve
from deltacontrol.theory.solvers.quadratic_model import QuadraticModel
from tests.theory.problems import normal

BATCH, TOKENS, WIDTH, M, L = 2, 2, 2, 3, 4


class Attentive(Dynamics):
    """Numbers of tokens → states → attention, four times, each with a control → one row of logits.

    The tokens of an example interact.
    """

    horizon = L + 2
    control_sizes = (1, *(M,) * L, 2)

    def __init__(self) -> None:
        self.embedding = normal(5, WIDTH, seed=1)
        self.W, self.B = normal(L, WIDTH, WIDTH, seed=2), normal(L, M, WIDTH, seed=3)
        self.alone: list[int] = []  # which of the alike steps were asked for

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        if t == 0:
            return self.embedding[x] + u
        if t == L + 1:
            return x.flatten(1)[:, :2] * u
        self.alone.append(t)
        return self.attend({"W": self.W[t - 1], "B": self.B[t - 1]}, x, u)

    @staticmethod
    def attend(c: Mapping[str, Tensor], x: Tensor, u: Tensor) -> Tensor:
        return x + torch.tanh(torch.softmax(x @ c["W"] @ x.mT, -1) @ x + u @ c["B"])

    def alike(self) -> Alike | None:
        return Alike(1, L + 1, {"W": self.W, "B": self.B}, self.attend)


class Doubled(Attentive):
    """A step of one's own, which the parent's ``alike`` does not know."""

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        return 2 * super().step(t, x, u)


class Contradicting(Doubled):
    def alike(self) -> Alike | None:
        return Attentive.alike(self)


class Uneven(Cost):
    """Costs that differ from step to step, and have mixed derivatives."""

    def running(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        own = u.square().sum() * (t + 1)
        return own + (x.square().sum() * u.sum().sin() if x.is_floating_point() else 0.0)

    def terminal(self, x: Tensor) -> Tensor:
        return x.square().mean()


COSTS = {"error": SquaredErrorCost(normal(BATCH, 2, seed=4), weight_decay=0.3), "uneven": Uneven()}


def problem_of(dynamics: Dynamics, cost: str = "error"):
    x0 = torch.tensor([[0, 3], [4, 1]])
    u = tuple(normal(m, seed=10 + t) / 2 for t, m in enumerate(dynamics.control_sizes))
    return ControlProblem(dynamics, COSTS[cost], x0), u


def assert_near(found, wanted) -> None:
    for a, b in zip(found, wanted, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12 * float(y.norm()))


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("cost", COSTS)
def test_at_once_are_one_by_one(cost: str, second_order: bool) -> None:
    problem, u = problem_of(Attentive(), cost)
    now = problem.evaluate(u)
    wanted = one_by_one(problem, u, now, second_order)
    problem.dynamics.alone.clear()
    assert_near(alike_at_once(problem, u, now, second_order), wanted)
    assert not problem.dynamics.alone
    model = QuadraticModel.of(problem, u, now, second_order=second_order)
    assert_near((model.A, model.B, model.W), wanted)
    assert not problem.dynamics.alone


@pytest.mark.parametrize("solver", [ILQR(), DDP()])
def test_solvers_walk_the_same_way(monkeypatch: pytest.MonkeyPatch, solver) -> None:
    problem, u = problem_of(Attentive())
    found = solve(problem, solver, u, max_steps=4, tol=0.0)
    monkeypatch.setattr(alike, "MOST_ENTRIES", 0)
    wanted = solve(problem, solver, u, max_steps=4, tol=0.0)
    assert found.objective == pytest.approx(wanted.objective, rel=1e-10)
    for a, b in zip(found.controls, wanted.controls, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [Doubled, Contradicting])
def test_a_step_of_ones_own_is_not_overlooked(kind: type[Attentive]) -> None:
    problem, u = problem_of(kind())
    now = problem.evaluate(u)
    assert (alike_steps(problem.dynamics) is None) == (kind is Doubled)
    problem.dynamics.alone.clear()
    found = alike_at_once(problem, u, now, True)
    assert set(problem.dynamics.alone) == set(range(1, L + 1))
    assert_near(found, one_by_one(problem, u, now, True))


N = BATCH * TOKENS * WIDTH


@pytest.mark.parametrize(
    ("entries", "steps", "asked", "alone"),
    [
        ((N + M) ** 2, L, True, 0),
        (N * (N + M), L, True, 1),  # [A_t B_t] are small, but W_t are not: one by one
        (N * (N + M) - 1, L, False, 2),
        ((N + M) ** 2, L + 2, False, 2),
    ],
)
def test_large_steps_and_few_go_one_by_one_and_are_not_asked(
    monkeypatch: pytest.MonkeyPatch, entries: int, steps: int, asked: bool, alone: int
) -> None:
    problem, u = problem_of(Attentive())
    now = problem.evaluate(u)
    wanted = one_by_one(problem, u, now, True)
    calls: list[int] = []
    give = problem.dynamics.alike
    monkeypatch.setattr(alike, "MOST_ENTRIES", entries)
    monkeypatch.setattr(alike, "LEAST_STEPS", steps)
    monkeypatch.setattr(Attentive, "alike", lambda _: calls.append(1) or give())
    problem.dynamics.alone.clear()
    assert_near(alike_at_once(problem, u, now, True), wanted)
    assert bool(calls) == asked
    assert problem.dynamics.alone.count(1) == alone


def test_controls_of_single_examples_go_one_by_one() -> None:
    class Rows(Attentive):
        """States of one token, each with a control of its own."""

        horizon, control_sizes = L, (M,) * L

        def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
            self.alone.append(t)
            return x + torch.tanh(x @ self.W[t] + u @ self.B[t])

        def alike(self) -> Alike | None:
            raise AssertionError

    cost = QuadraticCost.constant(
        L, Q=torch.eye(WIDTH).double(), R=torch.eye(M).double(), Qf=torch.eye(WIDTH).double()
    )
    problem = ControlProblem(Rows(), cost, normal(BATCH, WIDTH, seed=5))
    u = problem.zero_controls(per_example=True)
    now = problem.evaluate(u)
    problem.dynamics.alone.clear()
    A, B, _ = alike_at_once(problem, u, now, False)
    assert A[0].shape == (BATCH, WIDTH, WIDTH) and B[0].shape == (BATCH, WIDTH, M)
    assert set(problem.dynamics.alone) == set(range(L))


def test_a_segment_has_those_of_the_whole() -> None:
    dynamics = Attentive()
    problem, u = problem_of(dynamics)
    states = problem.rollout(u)
    for start, stop, first, last in ((0, None, 1, L + 1), (2, None, 0, L - 1), (2, 4, 0, 2)):
        part = Segment(dynamics, start, stop)
        found = alike_steps(part)
        assert found is not None and (found.start, found.stop) == (first, last)
        for t in range(found.start, found.stop):
            c = {name: value[t - found.start] for name, value in found.constants.items()}
            x, control = states[start + t], u[start + t]
            assert torch.equal(found.function(c, x, control), part.step(t, x, control))
    assert alike_steps(Segment(dynamics, 4)) is None
    assert alike_steps(Segment(Doubled(), 0)) is None
