"""Corrections towards a subspace: against dense KKT systems, and the moments behind them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.feedback.affine_subspace import AffineSubspace, Moments
from deltacontrol.theory.feedback.correction import (
    AdditiveControl,
    PIDCorrection,
    PIDGains,
    ProjectionCorrection,
)
from deltacontrol.theory.feedback.laws import AffineFeedback, closed_loop
from deltacontrol.theory.solvers.riccati import Riccati
from deltacontrol.theory.solvers.solving import solve
from tests.theory.dense import kkt
from tests.theory.problems import normal, residual_network

F64 = torch.float64
WIDTH, RANK, HORIZON = 5, 2, 6


def carried_subspaces(sigma: float) -> tuple[ControlProblem, list[AffineSubspace]]:
    """Layers ``x -> T_t (x - mu_t) + mu_{t+1}`` that carry the subspaces into each other.

    Along the subspace ``T_t`` is any matrix; across it, ``sigma`` times an isometry.
    """
    frames = [torch.linalg.qr(normal(WIDTH, WIDTH, seed=t))[0] for t in range(HORIZON + 1)]
    means = [normal(WIDTH, seed=20 + t) for t in range(HORIZON + 1)]
    A, c = [], []
    for t in range(HORIZON):
        inner = torch.zeros(WIDTH, WIDTH, dtype=F64)
        inner[:RANK, :RANK] = normal(RANK, RANK, seed=40 + t)
        isometry = torch.linalg.qr(normal(WIDTH - RANK, WIDTH - RANK, seed=60 + t))[0]
        inner[RANK:, RANK:] = sigma * isometry
        T = frames[t + 1] @ inner @ frames[t].mT
        A.append(T)
        c.append(means[t + 1] - T @ means[t])
    dynamics = LinearDynamics(A, A, c)  # the control is added to the state: B = A
    subspaces = [AffineSubspace(means[t], frames[t][:, :RANK]) for t in range(HORIZON)]
    return ControlProblem(dynamics, QuadraticCost.constant(0, *[torch.eye(WIDTH)] * 3), x0=means[0]
                          ), subspaces  # fmt: skip


def tracking(problem: ControlProblem, subspaces: list[AffineSubspace], c: float) -> QuadraticCost:
    """``1/2 ||P_t (x + u - mu_t)||^2 + c/2 ||u||^2`` in the form of a quadratic cost."""
    eye = torch.eye(WIDTH, dtype=F64)
    P = [eye - s.basis @ s.basis.mT for s in subspaces]
    q = [-p @ s.mean for p, s in zip(P, subspaces, strict=True)]
    zero = torch.zeros(WIDTH, WIDTH, dtype=F64)
    return QuadraticCost(Q=P, R=[p + c * eye for p in P], N=P, q=q, r=q, Qf=zero)


@pytest.mark.parametrize("sigma", [0.0, 0.7, 1.3])
@pytest.mark.parametrize("c", [0.1, 2.0])
def test_projection_with_optimal_gains_is_the_regulator_of_the_tracking_problem(
    sigma: float, c: float
) -> None:
    plain, subspaces = carried_subspaces(sigma)
    x0 = plain.x0 + normal(4, WIDTH, seed=80)
    problem = ControlProblem(plain.dynamics, tracking(plain, subspaces, c), x0)
    gains = PIDGains.optimal(HORIZON, c, transverse=sigma)
    assert gains.integral == gains.derivative == (0.0,) * HORIZON
    law = ProjectionCorrection(subspaces, gains.proportional)
    loop = closed_loop(problem.dynamics, law, x0)
    exact, _ = kkt(problem, per_example=True)
    for u, expected in zip(loop.controls, exact, strict=True):
        assert float((u - expected).norm()) <= 1e-9 * float(exact[0].norm())
    greedy = 1 / (1 + c)
    assert abs(gains.proportional[-1] - greedy) < 1e-15
    assert (min(gains.proportional) == max(gains.proportional)) == (sigma == 0.0)


def test_the_same_gains_stay_optimal_from_a_disturbed_state() -> None:
    plain, subspaces = carried_subspaces(0.9)
    gains = PIDGains.optimal(HORIZON, 0.5, transverse=0.9)
    law = ProjectionCorrection(subspaces, gains.proportional)
    w: list[Tensor | None] = [0.3 * normal(WIDTH, seed=90 + t) for t in range(HORIZON)]
    x0 = plain.x0 + normal(3, WIDTH, seed=81)
    loop = closed_loop(plain.dynamics, law, x0, w)
    cost = tracking(plain, subspaces, 0.5)
    for start in (2, 4):  # what is left of the problem, from the state that the disturbance gave
        rest = QuadraticCost(
            Q=cost.Q[start:], R=cost.R[start:], Qf=cost.Qf,
            N=cost.N[start:], q=cost.q[start:], r=cost.r[start:],  # type: ignore[index]
        )  # fmt: skip
        A, c = plain.dynamics.A[start:], plain.dynamics.c[start:]  # type: ignore[attr-defined]
        problem = ControlProblem(LinearDynamics(A, A, c), rest, loop.states[start])
        exact = kkt(problem, per_example=True)[0][0]
        assert float((loop.controls[start] - exact).norm() / exact.norm()) <= 1e-9


def test_the_law_is_that_of_the_riccati_solver() -> None:
    plain, subspaces = carried_subspaces(0.9)
    cost, x0 = tracking(plain, subspaces, 0.5), plain.x0 + normal(4, WIDTH, seed=80)
    problem = ControlProblem(plain.dynamics, cost, x0)
    start = problem.zero_controls(per_example=True)
    reference = AffineFeedback.of(solve(problem, Riccati(), start, max_steps=3, tol=1e-9))
    gains = PIDGains.optimal(HORIZON, 0.5, transverse=0.9)
    law = ProjectionCorrection(subspaces, gains.proportional)
    w: list[Tensor | None] = [0.3 * normal(WIDTH, seed=90 + t) for t in range(HORIZON)]
    loop = closed_loop(plain.dynamics, law, x0, w)
    for t, u in enumerate(loop.controls):
        expected = reference.control(t, loop.states[t])
        assert float((u - expected).norm() / expected.norm()) <= 1e-9


def augmented(sigma: float, c: float, ci: float, cd: float, e0: Tensor) -> ControlProblem:
    """The regulator problem of `PIDGains.optimal` for a scalar error."""
    A = torch.tensor([[sigma, 0, 0], [1, 1, 0], [1, 0, 0]], dtype=F64)
    B = torch.tensor([[sigma], [0], [0]], dtype=F64)
    # 1/2 (e+u)^2 + c/2 u^2 + ci/2 (z+e)^2 + cd/2 (e+u - e_)^2
    Q = torch.tensor([[1 + ci + cd, ci, -cd], [ci, ci, 0], [-cd, 0, cd]], dtype=F64)
    R = torch.tensor([[1 + c + cd]], dtype=F64)
    N = torch.tensor([[1 + cd], [0], [-cd]], dtype=F64)
    cost = QuadraticCost.constant(HORIZON, Q, R, torch.zeros(3, 3, dtype=F64), N)
    start = torch.stack([e0, 0 * e0, e0], dim=-1)
    return ControlProblem(LinearDynamics.constant(HORIZON, A, B), cost, start)


@pytest.mark.parametrize("costs", [(0.3, 0.0), (0.0, 0.8), (0.2, 0.5)])
def test_optimal_pid_gains_are_the_regulator_of_the_augmented_system(
    costs: tuple[float, float],
) -> None:
    sigma, c = 0.9, 0.4
    gains = PIDGains.optimal(
        HORIZON, c, transverse=sigma, integral_cost=costs[0], derivative_cost=costs[1]
    )
    # The error is the second coordinate: across the line, every layer multiplies by sigma.
    line = AffineSubspace(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)[:, :1])
    A = torch.diag(torch.tensor([1.1, sigma], dtype=F64))
    law = PIDCorrection([line] * HORIZON, gains.proportional, gains.integral, gains.derivative)
    x0 = normal(4, 2, seed=1)
    loop = closed_loop(LinearDynamics.constant(HORIZON, A, A), law, x0)
    exact, _ = kkt(augmented(sigma, c, *costs, x0[:, 1]), per_example=True)
    for u, expected in zip(loop.controls, exact, strict=True):
        assert bool((u[:, 0] == 0).all())
        assert float((u[:, 1:] - expected).norm()) <= 1e-9 * float(exact[0].norm())
    assert any(abs(g) > 1e-3 for g in gains.integral) == (costs[0] > 0)
    assert any(abs(g) > 1e-3 for g in gains.derivative) == (costs[1] > 0)


def test_pid_is_the_formula_and_starts_anew() -> None:
    states = [normal(3, 2, 4, seed=t) for t in range(4)]
    basis = torch.linalg.qr(normal(4, 2, seed=9))[0]
    subspace = AffineSubspace(normal(4, seed=8), basis)
    law = PIDCorrection([None, *[subspace] * 3], 0.5, (9.0, 0.2, 0.3, 0.4), 0.1)
    for _ in range(2):  # the second pass must not see the first
        errors: list[Tensor] = []
        assert law.control(0, states[0]).eq(0).all()
        for t in (1, 2, 3):
            errors.append(subspace.error(states[t]))
            last = errors[-2] if t > 1 else errors[-1]
            total = torch.stack(errors).sum(0)
            ki = (9.0, 0.2, 0.3, 0.4)[t]
            expected = -(0.5 * errors[-1] + ki * total + 0.1 * (errors[-1] - last))
            torch.testing.assert_close(law.correction(t, states[t]), expected)
            torch.testing.assert_close(law.correction(t, states[t]), expected)  # asked once more
            assert law.control(t, states[t]).shape == (3, 8)
    one = ProjectionCorrection([subspace], 0.5)
    three = PIDCorrection([subspace], 0.5)
    assert torch.equal(one.control(0, states[0]), three.control(0, states[0]))


def test_the_greedy_gain_minimises_its_objective() -> None:
    subspace = AffineSubspace(normal(4, seed=0), torch.linalg.qr(normal(4, 2, seed=1))[0])
    x, c = normal(6, 4, seed=2), 0.7
    u = ProjectionCorrection([subspace], 1 / (1 + c)).correction(0, x)
    assert u is not None
    leaf = u.clone().requires_grad_()
    value = subspace.error(x + leaf).square().sum() / 2 + c / 2 * leaf.square().sum()
    (gradient,) = torch.autograd.grad(value, leaf)
    assert float(gradient.abs().max()) < 1e-14


def test_error_is_the_orthogonal_part() -> None:
    basis = torch.linalg.qr(normal(6, 3, seed=1))[0]
    subspace = AffineSubspace(normal(6, seed=0), basis)
    x = normal(2, 4, 6, seed=2)
    error = subspace.error(x)
    assert float((error @ basis).abs().max()) < 1e-14
    inside = subspace.mean + normal(5, 3, seed=3) @ basis.mT
    assert float(subspace.error(inside).abs().max()) < 1e-14
    torch.testing.assert_close(subspace.error(x - error), torch.zeros_like(x), atol=1e-14, rtol=0)
    whole = AffineSubspace(subspace.mean, torch.linalg.qr(normal(6, 6, seed=4))[0])
    assert not whole.error(x).any()  # exactly


def test_moments_in_portions_are_those_of_all() -> None:
    x = 1e4 + normal(40, 3, 5, seed=0) * torch.arange(1.0, 6.0, dtype=F64)
    mask = torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    moments = Moments(5)
    for rows, kept in zip(x.split(7), mask.split(7), strict=True):
        moments.update(rows, kept)
        moments.update(rows, torch.zeros_like(kept))
    rows = x[mask]
    assert moments.count == len(rows)
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-14, atol=0)
    values, vectors = moments.eigh()
    covariance = torch.cov(rows.mT)
    torch.testing.assert_close(vectors * values @ vectors.mT, covariance, rtol=1e-11, atol=1e-11)
    assert bool((values.diff() >= 0).all())
    largest = AffineSubspace.principal(moments.mean, vectors, 1)
    assert float(largest.basis[:, 0] @ covariance @ largest.basis[:, 0]) == pytest.approx(
        float(torch.linalg.eigvalsh(covariance)[-1]), rel=1e-12
    )


def test_additive_control_is_the_system_under_shifted_states() -> None:
    problem = residual_network()
    v = tuple(normal(*u.shape, seed=t) for t, u in enumerate(problem.zero_controls()))
    added = AdditiveControl(problem, v)
    assert added.control_sizes == (4,) * 5
    zero = ControlProblem(added, problem.cost, problem.x0)
    for x, expected in zip(
        zero.rollout(zero.zero_controls(per_example=True)), problem.rollout(v), strict=True
    ):
        assert torch.equal(x, expected)
    u = normal(7, 4, seed=3)
    expected = problem.dynamics.step(2, problem.x0 + u, v[2])
    assert torch.equal(added.step(2, problem.x0, u), expected)


def test_bad_arguments_are_named() -> None:
    eye = torch.eye(3, dtype=F64)
    mean = torch.zeros(3, dtype=F64)
    with pytest.raises(InputError, match="not orthonormal"):
        AffineSubspace(mean, 2 * eye[:, :1])
    with pytest.raises(InputError, match=r"the basis \(2, 2\)"):
        AffineSubspace(mean, torch.eye(2, dtype=F64))
    with pytest.raises(InputError, match="rank 4 is not between 0 and the width 3"):
        AffineSubspace.principal(mean, eye, 4)
    with pytest.raises(InputError, match="the subspace lies in"):
        AffineSubspace(mean, eye[:, :1]).error(torch.zeros(2, 4, dtype=F64))
    with pytest.raises(InputError, match="gain has 2 entries; expected 1"):
        ProjectionCorrection([None], (1.0, 1.0))
    with pytest.raises(InputError, match="integral has 2 entries"):
        PIDCorrection([None], integral=(1.0, 1.0))
    law = PIDCorrection([AffineSubspace(mean, eye[:, :1])] * 2)
    law.control(0, torch.zeros(2, 3, dtype=F64))
    with pytest.raises(InputError, match="takes states of one shape"):
        law.control(1, torch.zeros(4, 3, dtype=F64))
    with pytest.raises(InputError, match="control_cost = 0"):
        PIDGains.optimal(3, 0.0)
    with pytest.raises(InputError, match="0 vectors have no covariance"):
        Moments(3).eigh()
    with pytest.raises(InputError, match="the mask has shape"):
        Moments(3).update(torch.zeros(2, 3), torch.ones(3))
