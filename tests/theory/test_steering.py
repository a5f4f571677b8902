"""Steering of few outputs: against a dense Riccati recursion, dense KKT and minimum energy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.feedback.correction import AdditiveControl
from deltacontrol.theory.feedback.laws import AffineFeedback, closed_loop
from deltacontrol.theory.feedback.steering import OutputSteering, steer_output
from deltacontrol.theory.solvers.riccati import Riccati
from deltacontrol.theory.solvers.solving import solve
from tests.theory.dense import kkt
from tests.theory.problems import normal, residual_network

F64 = torch.float64
BATCH, WIDTH, HORIZON = 3, 5, 6


def linear(seed: int = 0) -> ControlProblem:
    """Layers of changing width, with offsets, and no control of their own."""
    widths = [5, 4, 6, 5, 3, 4, 5]
    A = [normal(b, a, seed=seed + t) / 2 for t, (a, b) in enumerate(zip(widths, widths[1:],
         strict=False))]  # fmt: skip
    c = [normal(len(M), seed=seed + 50 + t) for t, M in enumerate(A)]
    B = [torch.zeros(len(M), 0, dtype=F64) for M in A]
    zero = QuadraticCost(
        Q=[torch.zeros(n, n, dtype=F64) for n in widths[:-1]],
        R=[torch.zeros(0, 0, dtype=F64)] * len(A),
        Qf=torch.zeros(widths[-1], widths[-1], dtype=F64),
    )
    return ControlProblem(LinearDynamics(A, B, c), zero, normal(BATCH, widths[0], seed=99))


def steering_problem(
    problem: ControlProblem, G: Tensor, target: Tensor, W: Tensor, r: float
) -> ControlProblem:
    """The same system as a dense quadratic problem: ``B_t = A_t``."""
    dynamics = problem.dynamics
    assert isinstance(dynamics, LinearDynamics)
    cost = QuadraticCost(
        Q=[torch.zeros(M.shape[1], M.shape[1], dtype=F64) for M in dynamics.A],
        R=[r * torch.eye(M.shape[1], dtype=F64) for M in dynamics.A],
        Qf=G.mT @ W @ G,
        qf=-G.mT @ W @ target,
    )
    return ControlProblem(LinearDynamics(dynamics.A, dynamics.A, dynamics.c), cost, problem.x0)


def dense_gains(problem: ControlProblem) -> list[Tensor]:
    """The gains of a plain Riccati recursion: ``K = -(R + B'PB)^{-1} B'PA``."""
    dynamics, cost = problem.dynamics, problem.cost
    assert isinstance(dynamics, LinearDynamics) and isinstance(cost, QuadraticCost)
    P, gains = cost.Qf, []
    for t in reversed(range(dynamics.horizon)):
        A, B = dynamics.A[t], dynamics.B[t]
        gains.append(-torch.linalg.solve(cost.R[t] + B.mT @ P @ B, B.mT @ P @ A))
        P = cost.Q[t] + A.mT @ P @ A + A.mT @ P @ B @ gains[-1]
    return gains[::-1]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_law_is_the_riccati_feedback(k: int) -> None:
    problem, G, target = linear(), normal(k, 5, seed=7), normal(k, seed=8)
    root = normal(k, k, seed=9)
    W, r = root @ root.mT + torch.eye(k, dtype=F64), 0.3
    dense = steering_problem(problem, G, target, W, r)
    added = AdditiveControl(problem, problem.zero_controls())
    law = steer_output(added, problem.x0, lambda x: x @ G.mT, target, weight=W, control_cost=r)
    loop = closed_loop(added, law, problem.x0)
    exact, _ = kkt(dense, per_example=True)
    for u, expected in zip(loop.controls, exact, strict=True):
        assert float((u - expected).norm() / expected.norm()) <= 1e-9
    for t, K in enumerate(dense_gains(dense)):
        offset = normal(*loop.states[t].shape, seed=30 + t)
        moved = law.control(t, loop.states[t] + offset) - law.control(t, loop.states[t])
        assert float((moved - offset @ K.mT).norm() / moved.norm()) <= 1e-9
    # In a linear system the prediction of the outputs is exact, too.
    torch.testing.assert_close(loop.states[-1] @ G.mT, law.predicted, rtol=1e-9, atol=1e-9)


def test_the_law_is_that_of_the_riccati_solver() -> None:
    problem, G, target = linear(), normal(2, 5, seed=7), normal(2, seed=8)
    dense = steering_problem(problem, G, target, 2.0 * torch.eye(2, dtype=F64), 0.3)
    start = dense.zero_controls(per_example=True)
    solution = solve(dense, Riccati(), start, max_steps=3, tol=1e-9)
    reference = AffineFeedback.of(solution)
    added = AdditiveControl(problem, problem.zero_controls())
    law = steer_output(added, problem.x0, lambda x: x @ G.mT, target, weight=2.0, control_cost=0.3)
    w = [normal(BATCH, len(A), seed=70 + t) for t, A in enumerate(problem.dynamics.A)]  # type: ignore[attr-defined]
    loop = closed_loop(added, law, problem.x0, w)
    for t, u in enumerate(loop.controls):
        expected = reference.control(t, loop.states[t])
        assert float((u - expected).norm() / expected.norm()) <= 1e-9


def test_rank_one_is_the_scalar_recursion() -> None:
    problem, g, r, w = linear(), normal(1, 5, seed=7), 0.5, 3.0
    target = torch.tensor([2.0], dtype=F64)
    added = AdditiveControl(problem, problem.zero_controls())
    law = steer_output(added, problem.x0, lambda x: x @ g.mT, target, weight=w, control_cost=r)
    a, alpha = g[0], w
    for t in reversed(range(HORIZON)):
        a = problem.dynamics.A[t].mT @ a  # type: ignore[attr-defined]
        torch.testing.assert_close(law.full_adjoints[t][0, 0], a, rtol=1e-13, atol=1e-13)  # type: ignore[index]
        alpha = alpha / (1 + alpha * float(a @ a) / r)
        assert float(law.information[t][0]) == pytest.approx(1 / alpha, rel=1e-12)


def test_an_infinite_weight_meets_the_target_at_minimum_energy() -> None:
    problem, G, target = linear(), normal(2, 5, seed=7), normal(BATCH, 2, seed=8)
    added = AdditiveControl(problem, problem.zero_controls())
    law = steer_output(added, problem.x0, lambda x: x @ G.mT, target)
    loop = closed_loop(added, law, problem.x0)
    torch.testing.assert_close(loop.states[-1] @ G.mT, target, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(law.predicted, target, rtol=1e-12, atol=1e-12)
    # The least-norm solution of "outputs = target" over all controls together.
    zeros = added_zeros(added)
    plain = ControlProblem(added, problem.cost, problem.x0)
    for i in range(BATCH):
        one = ControlProblem(added, problem.cost, problem.x0[i])
        jacobian = torch.func.jacrev(
            lambda z, one=one: one.rollout(tuple(z.split(added.control_sizes)))[-1] @ G.mT
        )(torch.zeros(sum(added.control_sizes), dtype=F64))
        start = plain.rollout(zeros)[-1][i] @ G.mT
        least = torch.linalg.pinv(jacobian) @ (target[i] - start)
        found = torch.cat([u[i] for u in loop.controls])
        assert float((found - least).norm() / least.norm()) <= 1e-9


def added_zeros(added: AdditiveControl) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(BATCH, m, dtype=F64) for m in added.control_sizes)


def test_masks_choose_what_moves() -> None:
    problem, G, target = linear(), normal(1, 5, seed=7), normal(1, seed=8)
    added = AdditiveControl(problem, problem.zero_controls())
    masks: list[Tensor | None] = [torch.zeros(m, dtype=F64) for m in added.control_sizes]
    masks[2] = torch.tensor([1.0, 0, 0, 1, 0, 1], dtype=F64)
    masks[4] = None
    law = steer_output(added, problem.x0, lambda x: x @ G.mT, target, masks=masks)
    loop = closed_loop(added, law, problem.x0)
    moved = [t for t, u in enumerate(loop.controls) if u.any()]
    assert moved == [2, 4]
    assert not loop.controls[2][:, [1, 2, 4]].any()
    torch.testing.assert_close(loop.states[-1] @ G.mT, target.expand(BATCH, 1))


def test_the_law_answers_to_a_disturbance() -> None:
    """The rest of a disturbed run is the optimum from the state that the disturbance gave."""
    problem, G, target = linear(), normal(2, 5, seed=7), normal(2, seed=8)
    W, r = 2.0 * torch.eye(2, dtype=F64), 0.3
    added = AdditiveControl(problem, problem.zero_controls())
    law = steer_output(added, problem.x0, lambda x: x @ G.mT, target, weight=2.0, control_cost=r)
    w = [0.5 * normal(BATCH, len(A), seed=70 + t) for t, A in enumerate(problem.dynamics.A)]  # type: ignore[attr-defined]
    loop = closed_loop(added, law, problem.x0, w)
    dense = steering_problem(problem, G, target, W, r)
    for start in (1, 3, 5):
        assert isinstance(dense.cost, QuadraticCost)
        rest = QuadraticCost(
            dense.cost.Q[start:], dense.cost.R[start:], dense.cost.Qf, qf=dense.cost.qf
        )
        A, c = dense.dynamics.A[start:], dense.dynamics.c[start:]  # type: ignore[attr-defined]
        exact = kkt(ControlProblem(LinearDynamics(A, A, c), rest, loop.states[start]), True)[0][0]
        assert float((loop.controls[start] - exact).norm() / exact.norm()) <= 1e-9


def test_around_any_trajectory_of_a_linear_system_the_law_is_the_same() -> None:
    problem, G, target = linear(), normal(2, 5, seed=7), normal(2, seed=8)
    added = AdditiveControl(problem, problem.zero_controls())
    around = tuple(normal(BATCH, m, seed=5 + t) for t, m in enumerate(added.control_sizes))
    laws = [
        steer_output(
            added, problem.x0, lambda x: x @ G.mT, target, weight=2.0, control_cost=0.4, controls=u
        )
        for u in (None, around)
    ]
    first, second = (closed_loop(added, law, problem.x0).controls for law in laws)
    for a, b in zip(first, second, strict=True):
        assert float((a - b).norm() / a.norm()) <= 1e-9
    torch.testing.assert_close(laws[0].predicted, laws[1].predicted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("damping", "rounds"), [(0.0, 20), (0.5, 60)])
def test_repeated_steering_of_a_nonlinear_system_converges_to_a_stationary_point(
    damping: float, rounds: int
) -> None:
    problem = residual_network()
    v = tuple(0.3 * normal(*u.shape, seed=t) for t, u in enumerate(problem.zero_controls()))
    added = AdditiveControl(problem, v)
    g, weight, r = normal(2, 4, seed=3), 5.0, 0.5
    target = problem.rollout(v)[-1] @ g.mT + 0.3 * normal(7, 2, seed=4)
    controls, misses = None, []
    for _ in range(rounds):
        law = steer_output(
            added, problem.x0, lambda x: x @ g.mT, target, weight=weight, control_cost=r,
            controls=controls, damping=damping,
        )  # fmt: skip
        loop = closed_loop(added, law, problem.x0)
        misses.append(float((loop.states[-1] @ g.mT - law.predicted).abs().max()))
        controls = loop.controls

    def J(z: Tensor) -> Tensor:
        u = z.reshape(len(added.control_sizes), -1, 4)
        x = ControlProblem(added, problem.cost, problem.x0).rollout(tuple(u))[-1]
        return weight / 2 * (x @ g.mT - target).square().sum() + r / 2 * z.square().sum()

    assert controls is not None
    z = torch.stack(controls)
    gradient = torch.func.grad(J)(z.reshape(-1))
    assert float(gradient.abs().max()) < 1e-9
    assert misses[0] > 1e-3  # the first linear model is not exact here
    assert misses[-1] < 1e-12


def test_bad_arguments_are_named() -> None:
    problem, G = linear(), normal(1, 5, seed=7)
    added = AdditiveControl(problem, problem.zero_controls())

    def make(target: Tensor, **more: object) -> OutputSteering:
        return steer_output(added, problem.x0, lambda x: x @ G.mT, target, **more)  # type: ignore[arg-type]

    one = torch.ones(1, dtype=F64)
    with pytest.raises(InputError, match="damping is 1"):
        make(one, damping=1.0)
    with pytest.raises(InputError, match="the target has shape"):
        make(torch.ones(2, dtype=F64))
    with pytest.raises(InputError, match="control_cost is 0"):
        make(one, control_cost=0.0)
    for weight in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="weight is"):
            make(one, weight=weight)
    with pytest.raises(InputError, match="the weight has shape"):
        make(one, weight=torch.eye(2, dtype=F64))
    with pytest.raises(InputError, match="does not react to any control"):
        make(one, masks=[torch.zeros(m, dtype=F64) for m in added.control_sizes])
    with pytest.raises(InputError, match="it steers the examples that it was made for"):
        make(one).control(0, problem.x0[:2])
