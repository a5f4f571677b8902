"""Feedback laws: the affine law, the closed loop, and the optimal law of a quadratic problem."""

from __future__ import annotations

import pytest
import torch

from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.feedback.laws import AffineFeedback, closed_loop
from deltacontrol.theory.lq import LQPolicy, riccati
from deltacontrol.theory.solvers import MSA, solve
from deltacontrol.theory.solvers.riccati import Riccati
from tests.theory.dense import flat, kkt
from tests.theory.problems import normal, residual_network, varying

F64 = torch.float64


@pytest.mark.parametrize("per_example", [False, True])
def test_without_a_disturbance_the_law_reproduces_its_trajectory(per_example: bool) -> None:
    problem = residual_network()
    zeros = problem.zero_controls(per_example=per_example)
    u = tuple(normal(*z.shape, seed=t) for t, z in enumerate(zeros))
    states = problem.rollout(u)
    gains = tuple(normal(3, 4, seed=50 + t) for t in range(5))
    loop = closed_loop(problem.dynamics, AffineFeedback(gains, u, states), problem.x0)
    for x, expected in zip(loop.states, states, strict=True):
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-13)
    for v, expected in zip(loop.controls, u, strict=True):
        torch.testing.assert_close(v, expected.expand(7, 3), rtol=0, atol=1e-13)


def test_the_gain_acts_on_one_example_or_on_all_together() -> None:
    K, whole = normal(2, 3, seed=0), normal(2, 12, seed=1)
    x, nominal, u = normal(4, 3, seed=2), normal(4, 3, seed=3), normal(2, seed=4)
    each = AffineFeedback((K,), (u,), (nominal,)).control(0, x)
    assert each.shape == (4, 2)
    for i in range(4):
        torch.testing.assert_close(each[i], u + K @ (x[i] - nominal[i]))
    together = AffineFeedback((whole,), (u,), (nominal,)).control(0, x)
    torch.testing.assert_close(together, u + whole @ (x - nominal).reshape(-1))
    own = AffineFeedback((normal(4, 2, 3, seed=5),), (u,), (nominal,)).control(0, x)
    torch.testing.assert_close(own[3], u + normal(4, 2, 3, seed=5)[3] @ (x[3] - nominal[3]))


def test_a_law_around_one_trajectory_serves_a_batch() -> None:
    K, nominal, u = normal(2, 3, seed=0), normal(3, seed=1), normal(2, seed=2)
    law = AffineFeedback((K,), (u,), (nominal,))
    x = normal(5, 3, seed=3)
    torch.testing.assert_close(law.control(0, x), torch.stack([law.control(0, r) for r in x]))
    torch.testing.assert_close(law.control(0, x[0]), u + K @ (x[0] - nominal))


def test_a_state_of_several_axes_is_flattened() -> None:
    nominal, x, u = normal(2, 3, 4, seed=0), normal(2, 3, 4, seed=1), normal(2, 5, seed=2)
    K = normal(5, 12, seed=3)
    expected = u + (x - nominal).reshape(2, 12) @ K.mT
    torch.testing.assert_close(AffineFeedback((K,), (u,), (nominal,)).control(0, x), expected)


def test_steps_without_control_have_empty_ones() -> None:
    problem = varying(6)
    u = problem.zero_controls()
    states = problem.rollout(u)
    gains = tuple(normal(len(v), x.shape[-1], seed=7) for v, x in zip(u, states, strict=False))
    loop = closed_loop(problem.dynamics, AffineFeedback(gains, u, states), problem.x0)
    assert [tuple(v.shape) for v in loop.controls] == [(6, 2), (6, 0), (6, 3), (6, 1)]


def tail(problem: ControlProblem, start: int, x0: torch.Tensor) -> ControlProblem:
    """The rest of a linear-quadratic problem, from a state on."""
    f, cost = problem.dynamics, problem.cost
    assert isinstance(f, LinearDynamics) and isinstance(cost, QuadraticCost) and f.c is not None
    terms = {name: getattr(cost, name)[start:] for name in ("Q", "R", "N", "q", "r")}
    dynamics = LinearDynamics(f.A[start:], f.B[start:], f.c[start:])
    return ControlProblem(dynamics, QuadraticCost(**terms, Qf=cost.Qf, qf=cost.qf), x0)


def optimal(problem: ControlProblem) -> LQPolicy:
    f, cost = problem.dynamics, problem.cost
    assert isinstance(f, LinearDynamics) and isinstance(cost, QuadraticCost)
    terms = {name: getattr(cost, name) for name in ("Q", "R", "N", "q", "r", "Qf", "qf")}
    return riccati(A=f.A, B=f.B, c=f.c, **terms)


@pytest.mark.parametrize("batch", [None, 5])
def test_the_law_of_a_solution_is_the_riccati_feedback(batch: int | None) -> None:
    """From the solution's gains, and from the recursion; also where disturbances push."""
    problem = varying(batch)
    policy = optimal(problem)
    start = problem.zero_controls(per_example=batch is not None)
    solution = solve(problem, Riccati(), start, max_steps=3, tol=1e-9)
    law = AffineFeedback.of(solution)
    pushes = [normal(*x.shape, seed=200 + t) for t, x in enumerate(solution.states[1:])]
    for disturbance in (None, pushes, [None, pushes[1], None, pushes[3]]):
        expected = closed_loop(problem.dynamics, policy, problem.x0, disturbance)
        found = closed_loop(problem.dynamics, law, problem.x0, disturbance)
        assert (flat(found.controls) - flat(expected.controls)).norm() <= 1e-9
    undisturbed = closed_loop(problem.dynamics, law, problem.x0).controls
    torch.testing.assert_close(flat(undisturbed), flat(solution.controls), rtol=0, atol=1e-12)


def test_the_law_stays_optimal_after_a_disturbance() -> None:
    """The principle of optimality, against a dense solve of what remains."""
    problem = varying(None)
    disturbance = [normal(n, seed=210 + n) if t == 1 else None for t, n in enumerate((4, 4, 2, 3))]
    states, controls = closed_loop(problem.dynamics, optimal(problem), problem.x0, disturbance)
    expected, _ = kkt(tail(problem, 2, states[2]), per_example=False)
    torch.testing.assert_close(flat(controls[2:]), flat(expected), rtol=0, atol=1e-12)
    planned, _ = kkt(problem, per_example=False)
    assert (flat(controls[2:]) - flat(planned[2:])).norm() > 0.1


def test_one_control_for_a_batch_answers_to_all_of_it() -> None:
    problem = varying(5)
    solution = solve(problem, Riccati(), problem.zero_controls(), max_steps=3, tol=1e-9)
    law = AffineFeedback.of(solution)
    disturbance = [normal(5, n, seed=220 + n) if t == 1 else None for t, n in enumerate((4,) * 4)]
    states, controls = closed_loop(problem.dynamics, law, problem.x0, disturbance)
    assert [u.shape for u in controls] == [u.shape for u in solution.controls]
    expected, _ = kkt(tail(problem, 2, states[2]), per_example=False)
    torch.testing.assert_close(flat(controls[2:]), flat(expected), rtol=0, atol=1e-11)


def test_a_solution_without_gains_gives_no_law() -> None:
    problem = varying(None)
    solution = solve(problem, MSA(1e-3), problem.zero_controls(), max_steps=1, tol=0.0)
    with pytest.raises(InputError, match="no feedback gains"):
        AffineFeedback.of(solution)


def test_bad_laws_and_disturbances_are_refused() -> None:
    problem = residual_network()
    u = problem.zero_controls()
    states = problem.rollout(u)
    gains = (torch.zeros(3, 4, dtype=F64),) * 5
    with pytest.raises(InputError, match="5 gains, 4 controls, 6 states"):
        AffineFeedback(gains, u[:4], states)
    with pytest.raises(InputError, match="gain of step 0 has shape"):
        AffineFeedback((torch.zeros(3, 5, dtype=F64),) * 5, u, states)
    with pytest.raises(InputError, match="gain of step 0 has shape"):
        AffineFeedback((torch.zeros(2, 4, dtype=F64),) * 5, u, states)
    law = AffineFeedback(gains, u, states)
    with pytest.raises(InputError, match="the law was made for"):
        law.control(0, torch.zeros(7, 5, dtype=F64))
    with pytest.raises(InputError, match="expected 5 disturbances"):
        closed_loop(problem.dynamics, law, problem.x0, [None] * 4)
    with pytest.raises(InputError, match="disturbance of step 2"):
        big = [None, None, torch.zeros(3, 7, 4, dtype=F64), None, None]
        closed_loop(problem.dynamics, law, problem.x0, big)
