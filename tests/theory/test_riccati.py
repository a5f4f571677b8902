"""The Riccati recursion against dense KKT systems, scipy, cvxpy and itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import cvxpy
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.theory.dense import flat, kkt, stacked
from tests.theory.problems import double_integrator, normal, positive, residual_network, varying
from theory.costs import QuadraticCost
from theory.errors import InputError
from theory.lq import (
    LQPolicy,
    UnboundedError,
    factorise,
    factorise_by_scan,
    recursion,
    riccati,
)
from theory.problem import ControlProblem, Controls
from theory.solvers import Status, solve
from theory.solvers.riccati import Riccati
from theory.systems import LinearDynamics

F64 = torch.float64


def random_problem(
    sizes: list[int], controls: list[int], seed: int, batch: int | None = None, scale: float = 0.8
) -> ControlProblem:
    """All terms present; ``[Q N; N' R]`` is positive definite."""
    steps = range(len(controls))
    dynamics = LinearDynamics(
        A=[scale * normal(sizes[t + 1], sizes[t], seed=seed + 10 * t) for t in steps],
        B=[normal(sizes[t + 1], controls[t], seed=seed + 10 * t + 1) for t in steps],
        c=[normal(sizes[t + 1], seed=seed + 10 * t + 2) for t in steps],
    )
    weights = [positive(sizes[t] + controls[t], seed + 10 * t + 3, 0.5) for t in steps]
    cost = QuadraticCost(
        Q=[W[:n, :n] for W, n in zip(weights, sizes, strict=False)],
        R=[W[n:, n:] for W, n in zip(weights, sizes, strict=False)],
        N=[W[:n, n:] for W, n in zip(weights, sizes, strict=False)],
        q=[normal(sizes[t], seed=seed + 10 * t + 4) for t in steps],
        r=[normal(controls[t], seed=seed + 10 * t + 5) for t in steps],
        Qf=positive(sizes[-1], seed + 6, 0.1),
        qf=normal(sizes[-1], seed=seed + 7),
    )
    shape = (sizes[0],) if batch is None else (batch, sizes[0])
    return ControlProblem(dynamics, cost, x0=normal(*shape, seed=seed + 8))


def parts(problem: ControlProblem) -> tuple[LinearDynamics, QuadraticCost]:
    dynamics, cost = problem.dynamics, problem.cost
    assert isinstance(dynamics, LinearDynamics) and isinstance(cost, QuadraticCost)
    return dynamics, cost


def with_terms(problem: ControlProblem, **terms: Any) -> ControlProblem:
    """The problem with other terms of its cost."""
    cost = dataclasses.replace(parts(problem)[1], **terms)
    return dataclasses.replace(problem, cost=cost)


def quadratic(problem: ControlProblem) -> tuple:
    dynamics, cost = parts(problem)
    return dynamics.A, dynamics.B, cost.Q, cost.R, cost.Qf, cost.N


def policy_of(problem: ControlProblem) -> LQPolicy:
    dynamics, cost = parts(problem)
    return riccati(*quadratic(problem), c=dynamics.c, q=cost.q, r=cost.r, qf=cost.qf)


def relative(a: Controls, b: Controls) -> float:
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


PROBLEMS = {
    "varying": lambda: varying(None),
    "equal-sizes": lambda: random_problem([4] * 7, [2] * 6, seed=1000),
    "large": lambda: random_problem([70] * 4, [9] * 3, seed=2000, scale=0.1),
    "one-step": lambda: random_problem([3, 5], [2], seed=3000),
    "no-terms": double_integrator,
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_dense_kkt_solution(name: str) -> None:
    problem = PROBLEMS[name]()
    policy = policy_of(problem)
    states, controls = policy.simulate(problem.x0)
    expected, costates = kkt(problem, per_example=False)
    assert relative(controls, expected) <= 1e-12
    for x, y in zip(states, problem.rollout(controls), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    for t, (x, p) in enumerate(zip(states, costates, strict=True)):
        torch.testing.assert_close(
            policy.hessians[t] @ x + policy.slopes[t], p, rtol=1e-9, atol=1e-9
        )
    value = float(policy.cost_to_go(0, problem.x0))
    assert value == pytest.approx(float(problem.objective(controls)), rel=1e-12)
    for t, (x, u) in enumerate(zip(states, controls, strict=False)):
        torch.testing.assert_close(policy.control(t, x), u, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=6),
    data=st.data(),
    seed=st.integers(0, 10**6),
)
def test_equals_the_dense_kkt_solution_for_any_sizes(
    sizes: list[int], data: st.DataObject, seed: int
) -> None:
    controls = [data.draw(st.integers(0, 4)) for _ in sizes[1:]]
    problem = random_problem(sizes, controls, seed)
    expected, _ = kkt(problem, per_example=False)
    found = policy_of(problem).simulate(problem.x0).controls
    assert [u.shape for u in found] == [u.shape for u in expected]
    assert float((flat(found) - flat(expected)).norm()) <= 1e-9 * float(flat(expected).norm())


@pytest.mark.parametrize("name", ["varying", "equal-sizes", "large"])
def test_the_three_forms_of_the_recursion_are_equal(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = quadratic(PROBLEMS[name]())
    by_lapack = factorise(*terms)
    twice = [torch.stack([A, A]) for A in terms[0]]
    by_torch = factorise(twice, *terms[1:])
    monkeypatch.setattr(recursion, "_root", lambda P: None)
    general = factorise(*terms)
    assert by_lapack._quick is not None and by_torch._quick is not None
    assert general._quick is None and len(general._hessians) == len(terms[0]) + 1
    for other in (by_torch, general):
        for a, b in zip(by_lapack.gains, other.gains, strict=True):
            torch.testing.assert_close(a[0], b[0], rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(b[0], b[-1], rtol=1e-11, atol=1e-11)
        for a, b in zip(by_lapack.hessians, other.hessians, strict=True):
            torch.testing.assert_close(a[0], b[0], rtol=1e-11, atol=1e-11)
        for a, b in zip(by_lapack.inverse_roots, other.inverse_roots, strict=True):
            torch.testing.assert_close(a[0] @ a[0].mT, b[0] @ b[0].mT, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("scale", [0.5, 1.3])
def test_long_horizon_gain_solves_the_algebraic_riccati_equation(cross: bool, scale: float) -> None:
    """Also where ``A`` is unstable, so that errors would grow with the horizon."""
    n, m, horizon = 5, 2, 10_000 if cross else 1000
    A, B = scale * normal(n, n, seed=1), normal(n, m, seed=2)
    weight = positive(n + m, 3, 0.5)
    Q, R = weight[:n, :n], weight[n:, n:]
    N = weight[:n, n:] if cross else None
    policy = riccati([A] * horizon, [B] * horizon, [Q] * horizon, [R] * horizon, 0 * Q,
                     None if N is None else [N] * horizon)  # fmt: skip
    s = None if N is None else N.numpy()
    P = scipy.linalg.solve_discrete_are(A.numpy(), B.numpy(), Q.numpy(), R.numpy(), s=s)
    H_ux = B.numpy().T @ P @ A.numpy() + (0 if N is None else N.numpy().T)
    K = -scipy.linalg.solve(R.numpy() + B.numpy().T @ P @ B.numpy(), H_ux)
    assert abs(policy.gains[0].numpy() - K).max() <= 1e-8 * abs(K).max()
    assert abs(policy.hessians[0].numpy() - P).max() <= 1e-8 * abs(P).max()
    assert torch.equal(policy.hessians[0], policy.hessians[0].mT)


def test_equals_a_convex_solver() -> None:
    problem = random_problem([3, 4, 4, 2], [2, 1, 3], seed=11)
    m = stacked(problem, per_example=False)
    x, controls, total = cvxpy.Constant(problem.x0.numpy()), [], 0.0
    for t, (A, B) in enumerate(zip(m["A"], m["B"], strict=True)):
        u = cvxpy.Variable(B.shape[1])
        z = cvxpy.hstack([x, u])
        top = torch.cat([torch.as_tensor(m["Q"][t]), torch.as_tensor(m["N"][t])], 1)
        low = torch.cat([torch.as_tensor(m["N"][t]).mT, torch.as_tensor(m["R"][t])], 1)
        weight = cvxpy.psd_wrap(torch.cat([top, low]).numpy())
        total = total + 0.5 * cvxpy.quad_form(z, weight) + m["q"][t] @ x + m["r"][t] @ u
        x = A @ x + B @ u + m["c"][t]
        controls.append(u)
    total = total + 0.5 * cvxpy.quad_form(x, cvxpy.psd_wrap(m["Q"][-1])) + m["q"][-1] @ x
    cvxpy.Problem(cvxpy.Minimize(total)).solve(solver=cvxpy.CLARABEL)
    expected = tuple(torch.from_numpy(u.value) for u in controls)
    assert relative(policy_of(problem).simulate(problem.x0).controls, expected) <= 1e-6


def batch_terms(*lead: int, horizon: int = 5, n: int = 4, m: int = 2) -> dict[str, Tensor]:
    root = normal(horizon, *lead, n + m, n + m, seed=30)
    weight = root @ root.mT / (n + m) + 0.5 * torch.eye(n + m, dtype=F64)
    last = normal(*lead, n, n, seed=31)
    return {
        "A": 0.5 * normal(horizon, *lead, n, n, seed=32),
        "B": normal(horizon, *lead, n, m, seed=33),
        "Q": weight[..., :n, :n],
        "R": weight[..., n:, n:],
        "N": weight[..., :n, n:],
        "Qf": last @ last.mT,
        "c": normal(horizon, *lead, n, seed=34),
        "q": normal(horizon, *lead, n, seed=35),
        "r": normal(horizon, *lead, m, seed=36),
        "qf": normal(*lead, n, seed=37),
    }


@pytest.mark.parametrize(("lead", "m"), [((3,), 2), ((2, 3), 1), ((210,), 4)])
def test_a_batch_equals_its_problems_one_by_one(lead: tuple[int, ...], m: int) -> None:
    terms, x0 = batch_terms(*lead, m=m), normal(*lead, 4, seed=38)
    batch = riccati(**terms)
    trajectory = batch.simulate(x0)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in lead)).reshape(
        -1, len(lead)
    ):
        at = tuple(index.tolist())
        one = {k: v[at] if k in ("Qf", "qf") else v[:, *at] for k, v in terms.items()}
        single = riccati(**one)
        pairs = [(batch.gains, single.gains), (batch.feedforward, single.feedforward)]
        pairs += [(batch.hessians, single.hessians), (batch.slopes, single.slopes)]
        pairs += list(zip(trajectory, single.simulate(x0[at]), strict=True))
        for many, alone in pairs:
            for a, b in zip(many, alone, strict=True):
                torch.testing.assert_close(a[at], b, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(batch.constants[:, *at], single.constants)
        torch.testing.assert_close(batch.cost_to_go(2, x0)[at], single.cost_to_go(2, x0[at]))


def test_batch_axes_broadcast() -> None:
    """One system for many linear terms, many systems for one cost, many states for one law."""
    terms, many = batch_terms(), batch_terms(3)
    x0 = normal(3, 4, seed=40)
    whole = riccati(**(terms | {"q": many["q"]}))
    systems = riccati(**(terms | {"A": many["A"]}))
    for i in range(3):
        alone = riccati(**(terms | {"q": many["q"][:, i]})).simulate(x0[i])
        for a, b in zip(whole.simulate(x0).controls, alone.controls, strict=True):
            torch.testing.assert_close(a[i], b)
        alone = riccati(**(terms | {"A": many["A"][:, i]})).simulate(x0[0])
        for a, b in zip(systems.simulate(x0[0]).controls, alone.controls, strict=True):
            torch.testing.assert_close(a[i], b)
    law = riccati(**terms)
    for a, b in zip(law.simulate(x0).states, law.simulate(x0[1]).states, strict=True):
        torch.testing.assert_close(a[1], b)
    crossed = systems.simulate(normal(5, 1, 4, seed=41))
    assert crossed.states[0].shape == (5, 3, 4) and crossed.controls[0].shape == (5, 3, 2)
    alone = riccati(**(terms | {"A": many["A"][:, 2]})).simulate(normal(5, 1, 4, seed=41)[4, 0])
    torch.testing.assert_close(crossed.states[-1][4, 2], alone.states[-1])


def test_float32_loses_digits_and_nothing_else() -> None:
    terms, x0 = batch_terms(3), normal(3, 4, seed=38)
    exact = riccati(**terms).simulate(x0).controls
    single = riccati(**{k: v.float() for k, v in terms.items()}).simulate(x0.float()).controls
    assert all(u.dtype == torch.float32 for u in single)
    assert 1e-9 < relative(tuple(u.double() for u in single), exact) <= 1e-4


def test_only_symmetric_parts_count() -> None:
    terms = batch_terms()
    skew = {
        "Q": normal(5, 4, 4, seed=50),
        "R": normal(5, 2, 2, seed=51),
        "Qf": normal(4, 4, seed=52),
    }
    skewed = {k: v + skew[k] - skew[k].mT if k in skew else v for k, v in terms.items()}
    for a, b in zip(riccati(**terms).gains, riccati(**skewed).gains, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    big = normal(300, 300, seed=53)
    eye = torch.eye(300, dtype=F64)
    plain, skewed = (
        riccati(0.1 * eye[None], eye[None, :, :2], Q[None], eye[None, :2, :2], eye).hessians[0]
        for Q in (eye, eye + big - big.mT)
    )
    torch.testing.assert_close(plain, skewed, rtol=1e-12, atol=1e-12)


def test_inputs_are_left_alone_and_may_require_gradients() -> None:
    terms = {k: v.requires_grad_() for k, v in batch_terms().items()}
    before = {k: v.detach().clone() for k, v in terms.items()}
    policy = riccati(**terms)
    states, controls = policy.simulate(normal(4, seed=38).requires_grad_())
    assert not any(x.requires_grad for x in (*states, *controls, *policy.gains))
    assert all(torch.equal(terms[k], before[k]) for k in terms)


@pytest.mark.parametrize("final", [0.0, 1.0])
@pytest.mark.parametrize("running", [0.0, 1.0])
def test_semidefinite_costs_of_the_state(final: float, running: float) -> None:
    """Rank-one weights, as of a single output: no ``P_t`` is positive definite."""
    row = normal(1, 4, seed=60)
    problem = random_problem([4] * 6, [2] * 5, seed=61)
    weight = row.mT @ row
    problem = with_terms(problem, N=None, Q=[running * weight] * 5, Qf=final * weight)
    expected, _ = kkt(problem, per_example=False)
    assert relative(policy_of(problem).simulate(problem.x0).controls, expected) <= 1e-11


def test_an_indefinite_state_cost_is_fine_while_the_controls_hold_it() -> None:
    problem = random_problem([3] * 4, [2] * 3, seed=70, scale=0.3)
    indefinite = torch.diag(torch.tensor([1.0, -0.2, 0.5], dtype=F64))
    problem = with_terms(problem, N=None, Q=[indefinite] * 3, Qf=0.3 * indefinite)
    expected, _ = kkt(problem, per_example=False)
    assert relative(policy_of(problem).simulate(problem.x0).controls, expected) <= 1e-12


QUADRATIC = ("A", "B", "Q", "R", "Qf", "N")


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("horizon", [1, 2, 3, 6, 7, 8, 200])
def test_the_parallel_scan_equals_the_recursion(
    horizon: int, lead: tuple[int, ...], cross: bool
) -> None:
    terms = batch_terms(*lead, horizon=horizon)
    quadratic = {name: terms[name] for name in (QUADRATIC if cross else QUADRATIC[:-1])}
    by_scan, expected = factorise_by_scan(**quadratic), factorise(**quadratic)
    for name in ("gains", "hessians"):
        for a, b in zip(getattr(by_scan, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    rest = {k: v for k, v in terms.items() if k not in QUADRATIC}
    x0 = normal(*lead, 4, seed=38)
    for a, b in zip(
        by_scan.policy(**rest).simulate(x0).controls,
        expected.policy(**rest).simulate(x0).controls,
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_scan_refuses_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="equal sizes"):
        factorise_by_scan(*quadratic(varying(None)))
    terms = {name: batch_terms()[name] for name in QUADRATIC}
    with pytest.raises(InputError, match="positive definite"):
        factorise_by_scan(**(terms | {"R": 0 * terms["R"], "N": None}))
    stiff = {"Q": 0 * terms["Q"], "R": 1e-9 * terms["R"], "Qf": 1e12 * terms["Qf"], "N": None}
    with pytest.raises(InputError, match="too inexact"):
        factorise_by_scan(**(terms | stiff))


ONE = torch.ones(1, 1, dtype=F64)


@pytest.mark.parametrize(("R", "step"), [((1.0, -2.0, 1.0), 1), ((-5.0, 1.0, 1.0), 0)])
def test_an_indefinite_control_cost_is_unbounded_and_names_its_step(R: tuple, step: int) -> None:
    with pytest.raises(UnboundedError, match=f"at step {step}: .* eigenvalue") as caught:
        riccati([ONE] * 3, [ONE] * 3, [ONE] * 3, [r * ONE for r in R], 0.0 * ONE)
    assert caught.value.step == step


def test_an_unbounded_problem_in_a_batch_is_named() -> None:
    R = torch.ones(3, 2, 4, 1, 1, dtype=F64)
    R[2, 1, 3] = -9.0
    ones = torch.ones(3, 1, 1, dtype=F64)
    with pytest.raises(UnboundedError, match=r"at step 2 of problem \(1, 3\)"):
        riccati(ones, ones, ones, R, ONE)


def gauge(final: float = 1.0) -> dict[str, Any]:
    """Two controls that act alike, no cost on them: only their sum matters."""
    B = torch.ones(1, 2, dtype=F64)
    R = torch.zeros(2, 2, dtype=F64)
    return {"A": [ONE] * 2, "B": [B] * 2, "Q": [ONE] * 2, "R": [R] * 2, "Qf": final * ONE}


def test_a_gauge_takes_the_control_of_least_norm() -> None:
    policy = riccati(**gauge())
    assert policy.singular == (0, 1)
    states, controls = policy.simulate(torch.tensor([3.0], dtype=F64))
    torch.testing.assert_close(controls[0], torch.tensor([-1.5, -1.5], dtype=F64))
    torch.testing.assert_close(states[1], torch.zeros(1, dtype=F64), atol=1e-15, rtol=0)
    torch.testing.assert_close(policy.hessians[0], ONE)


def test_controls_that_do_nothing_stay_zero() -> None:
    policy = riccati(**gauge(final=0.0))
    _, controls = policy.simulate(torch.tensor([3.0], dtype=F64))
    assert policy.singular == (0, 1)
    assert not controls[1].any()


def test_a_free_direction_that_the_cost_rewards_is_unbounded() -> None:
    tilt = torch.tensor([1.0, -1.0], dtype=F64)
    with pytest.raises(UnboundedError, match="at step 1: .*slope 1.41") as caught:
        riccati(**gauge(), r=[0 * tilt, tilt])
    assert caught.value.step == 1
    riccati(**gauge(), r=[0 * tilt, tilt.abs()])
    with pytest.raises(UnboundedError, match="from almost every state"):
        riccati(**gauge(), N=[tilt[None]] * 2)


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-9])
def test_a_small_control_cost_is_not_taken_for_a_singular_one(scale: float) -> None:
    problem = random_problem([4] * 4, [2] * 3, seed=80)
    problem = with_terms(problem, N=None, R=[scale * torch.eye(2, dtype=F64)] * 3)
    policy = policy_of(problem)
    expected, _ = kkt(problem, per_example=False)
    assert policy.singular == ()
    assert relative(policy.simulate(problem.x0).controls, expected) <= 1e-10


def test_rounding_errors_are_not_taken_for_a_control_cost() -> None:
    """``R = 0`` and a ``B`` of rank one in floating point: ``B'PB`` has noise, not curvature."""
    column, P = normal(6, 1, seed=81), positive(6, 82, 1.0)
    B = column @ normal(1, 3, seed=83)
    A, zero = normal(6, 6, seed=84), torch.zeros(3, 3, dtype=F64)
    policy = riccati([A], [B], [P], [zero], P)
    assert policy.singular == (0,)
    best = torch.linalg.pinv(B.mT @ P @ B, rtol=1e-10, hermitian=True) @ B.mT @ P @ A
    torch.testing.assert_close(policy.gains[0], -best, rtol=1e-9, atol=1e-9)


def test_an_unstable_system_overflows_with_its_name() -> None:
    A = torch.full((400, 1, 1), 1e3, dtype=F64)
    ones, nothing = torch.ones(400, 1, 1, dtype=F64), torch.zeros(400, 1, 1, dtype=F64)
    with pytest.raises(InputError, match="overflow"):
        riccati(A, nothing, ones, ones, ONE)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("name", ["A", "B", "Q", "R", "Qf"])
def test_nan_is_refused(name: str, batch: bool) -> None:
    terms = batch_terms(2) if batch else batch_terms()
    terms[name] = terms[name].clone()
    terms[name].reshape(-1)[0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        riccati(**terms)


def test_a_horizon_of_zero_is_its_terminal_cost() -> None:
    policy = riccati([], [], [], [], 2 * ONE, qf=ONE[0])
    assert float(policy.cost_to_go(0, torch.tensor([3.0], dtype=F64))) == 12.0
    states, controls = policy.simulate(torch.tensor([3.0], dtype=F64))
    assert len(states) == 1 and controls == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.zeros(5, 3, 2, dtype=F64)}, r"B\[0\] has shape \(3, 2\); expected \(4, 2\)"),
        ({"Q": torch.zeros(5, 3, 3, dtype=F64)}, r"Q\[0\] has shape"),
        ({"R": torch.zeros(4, 2, 2, dtype=F64)}, "different numbers of steps"),
        ({"N": torch.zeros(5, 2, 4, dtype=F64)}, r"N\[0\] has shape"),
        ({"Qf": torch.zeros(3, 3, dtype=F64)}, r"Qf has shape \(3, 3\); expected \(4, 4\)"),
        ({"Qf": torch.zeros(4, 4)}, "dtypes"),
        ({"A": torch.zeros(5, 2, 4, 4, dtype=F64), "B": torch.zeros(5, 3, 4, 2, dtype=F64)},
         "do not broadcast"),
        ({"c": torch.zeros(5, 3, dtype=F64)}, r"c\[0\] has shape \(3,\)"),
        ({"q": torch.zeros(4, 4, dtype=F64)}, "q has 4 entries; expected 5"),
        ({"r": torch.zeros(5, 2)}, r"r\[0\] has shape \(2,\) and dtype torch.float32"),
        ({"A": torch.zeros(5, 2, 4, 4, dtype=F64), "r": torch.zeros(5, 3, 2, dtype=F64)},
         "do not broadcast"),
        ({"R": [torch.ones(2, dtype=F64)] * 5}, r"R\[0\] has shape \(2,\); expected a matrix"),
    ],
)  # fmt: skip
def test_terms_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        riccati(**(batch_terms() | change))


def test_states_that_do_not_fit_are_refused() -> None:
    terms = quadratic(varying(None))
    with pytest.raises(InputError, match=r"A\[1\] takes 3 entries but A\[0\] gives 4"):
        riccati([terms[0][0], torch.zeros(4, 3, dtype=F64), *terms[0][2:]], terms[1],
                [terms[2][0], torch.eye(3, dtype=F64), *terms[2][2:]], *terms[3:5])  # fmt: skip
    policy = riccati(**batch_terms(3))
    with pytest.raises(InputError, match=r"x0\[0\] has shape \(5,\)"):
        policy.simulate(torch.zeros(5, dtype=F64))
    with pytest.raises(InputError, match="batch axes before it"):
        policy.simulate(torch.zeros(2, 4, dtype=F64))


def run(problem: ControlProblem, tol: float = 1e-10, per_example: bool = False, steps: int = 5):
    start = problem.zero_controls(per_example=per_example)
    return solve(problem, Riccati(), start, max_steps=steps, tol=tol)


@pytest.mark.parametrize("per_example", [False, True])
def test_one_iteration_solves_a_batch(per_example: bool) -> None:
    problem = random_problem([3, 4, 4, 2], [2, 0, 3], seed=90, batch=5)
    solution = run(problem, per_example=per_example)
    assert solution.status is Status.CONVERGED and solution.iterations == 1
    expected, costates = kkt(problem, per_example)
    assert relative(solution.controls, expected) <= 1e-12
    for p, q in zip(solution.costates, costates, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_gains_on_a_batch_are_those_of_the_stacked_system() -> None:
    problem = random_problem([3, 4, 2], [2, 3], seed=91, batch=4)
    m = {k: [torch.as_tensor(v) for v in vs] for k, vs in stacked(problem, False).items()}
    whole = riccati(m["A"], m["B"], m["Q"][:-1], m["R"], m["Q"][-1], m["N"])
    solution = run(problem)
    assert solution.gains is not None
    for K, expected in zip(solution.gains, whole.gains, strict=True):
        torch.testing.assert_close(K, expected, rtol=1e-11, atol=1e-11)
    separate = run(problem, per_example=True)
    assert separate.gains is not None
    for K, expected in zip(separate.gains, policy_of(problem).gains, strict=True):
        torch.testing.assert_close(K, expected, rtol=0, atol=0)


def test_refinement_removes_the_rounding_errors_of_a_stiff_problem() -> None:
    problem = random_problem([4] * 30, [2] * 29, seed=92, scale=0.6)
    problem = with_terms(problem, N=None, Qf=1e10 * torch.eye(4, dtype=F64))
    residuals = run(problem, tol=0.0, steps=3).history["residual"]
    assert min(residuals[2:]) < residuals[1]


def test_the_solve_ends_when_rounding_errors_remain() -> None:
    solution = run(random_problem([4] * 6, [2] * 5, seed=93), tol=0.0, steps=50)
    assert solution.status is Status.LINE_SEARCH_FAILED and solution.iterations < 10
    assert "rounding" in solution.message and solution.gains is not None
    assert solution.residual.norm <= 1e-12


def with_cost(R: float, N: float = 0.0, r: float = 0.0, x0: float = 1.0) -> ControlProblem:
    """One state, two steps, the second with the given cost; its control moves nothing."""
    dynamics = LinearDynamics([ONE] * 2, [ONE, 0 * ONE])
    cost = QuadraticCost(
        Q=[ONE] * 2,
        R=[ONE, R * ONE],
        N=[0 * ONE, N * ONE],
        r=[0 * ONE[0], r * ONE[0]],
        Qf=ONE,
    )
    return ControlProblem(dynamics, cost, x0=torch.tensor([x0], dtype=F64))


@pytest.mark.parametrize("problem", [with_cost(-1.0), with_cost(0.0, N=1.0), with_cost(0.0, r=1.0)])
def test_an_unbounded_problem_is_reported_with_its_step(problem: ControlProblem) -> None:
    solution = run(problem)
    assert solution.status is Status.UNBOUNDED
    assert "step 1" in solution.message and solution.gains is None


def test_a_conflict_that_no_control_reaches_is_not_unbounded() -> None:
    """``x'Nu`` with ``R = 0`` falls without end from every state but zero, where ``x`` stays."""
    nothing = LinearDynamics([ONE] * 2, [0 * ONE] * 2)
    problem = dataclasses.replace(with_cost(0.0, N=1.0, x0=0.0), dynamics=nothing)
    solution = solve(problem, Riccati(), (ONE[0], ONE[0]), max_steps=3, tol=1e-12)
    assert solution.status is Status.CONVERGED
    problem = dataclasses.replace(problem, x0=ONE[0])
    assert run(problem).status is Status.UNBOUNDED


def test_other_problems_are_refused() -> None:
    with pytest.raises(InputError, match="ResidualNetwork and SquaredErrorCost; take ILQR"):
        run(residual_network())
    problem = random_problem([3, 4, 2], [2, 3], seed=91, batch=4)
    mixed = problem.zero_controls()[0], problem.zero_controls(per_example=True)[1]
    with pytest.raises(InputError, match=r"all are shared.*\(4, 3\)"):
        solve(problem, Riccati(), mixed, max_steps=1, tol=0.0)


def test_nan_in_the_problem_is_divergence() -> None:
    problem = dataclasses.replace(with_cost(1.0), x0=torch.tensor([float("nan")], dtype=F64))
    solution = run(problem)
    assert solution.status is Status.DIVERGED and solution.gains is None


def test_an_interrupted_solve_goes_on_as_if_it_had_not_been(tmp_path) -> None:
    problem = random_problem([4] * 6, [2] * 5, seed=94)
    start, path = problem.zero_controls(), tmp_path / "solve.safetensors"
    whole = solve(problem, Riccati(), start, max_steps=50, tol=0.0)
    solve(problem, Riccati(), start, max_steps=1, tol=0.0, checkpoint=path)
    resumed = solve(problem, Riccati(), start, max_steps=50, tol=0.0, checkpoint=path)
    assert resumed.history == whole.history and resumed.status is whole.status
    assert all(torch.equal(a, b) for a, b in zip(whole.controls, resumed.controls, strict=True))


def test_float32_problems_keep_their_dtype() -> None:
    problem = random_problem([4] * 6, [2] * 5, seed=95)
    dynamics, cost = parts(problem)
    terms = {name: getattr(cost, name) for name in ("Q", "R", "N", "q", "r")}
    single: dict[str, Any] = {k: [v.float() for v in vs] for k, vs in terms.items()}
    assert cost.qf is not None and dynamics.c is not None
    single |= {"Qf": cost.Qf.float(), "qf": cost.qf.float()}
    matrices = ([v.float() for v in vs] for vs in (dynamics.A, dynamics.B, dynamics.c))
    small = ControlProblem(LinearDynamics(*matrices), QuadraticCost(**single), problem.x0.float())
    solution = run(small, tol=1e-4)
    assert solution.status is Status.CONVERGED
    assert all(u.dtype == torch.float32 for u in solution.controls)
    expected, _ = kkt(problem, per_example=False)
    assert relative(tuple(u.double() for u in solution.controls), expected) <= 1e-5
