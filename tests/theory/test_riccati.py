"""The Riccati recursion against dense KKT systems, scipy, cvxpy and itself."""

from __future__ import annotations

from typing import Any

import cvxpy
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.lq import UnboundedError, factorise, recursion, riccati
from tests.theory.dense import flat, kkt, stacked
from tests.theory.lq_problems import (
    ONE,
    batch_terms,
    policy_of,
    quadratic,
    random_problem,
    relative,
    with_terms,
)
from tests.theory.problems import double_integrator, normal, positive, varying

F64 = torch.float64


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


@pytest.mark.parametrize(("R", "step"), [((1.0, -2.0, 1.0), 1), ((-5.0, 1.0, 1.0), 0)])
def test_an_indefinite_control_cost_is_unbounded_and_names_its_step(R: tuple, step: int) -> None:
    with pytest.raises(UnboundedError, match=f"at step {step}: .* eigenvalue") as caught:
        riccati([ONE] * 3, [ONE] * 3, [ONE] * 3, [r * ONE for r in R], 0.0 * ONE)
    assert caught.value.step == step


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
    with pytest.raises(InputError, match="has the entry nan at"):
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
