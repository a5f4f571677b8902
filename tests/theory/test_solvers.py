"""One conformance suite: every solver on every problem it is for."""

from __future__ import annotations

import cvxpy
import pytest
import torch

from deltacontrol.theory.control.costs import SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.solved_problems import exact_problems
from deltacontrol.theory.solvers import MSA, Iterate, Shooting, Status, solve
from deltacontrol.theory.solvers.emsa import ExtendedMSA
from tests.theory.dense import kkt, stacked
from tests.theory.problems import CASES, Case, residual_network, scalar, varying
from tests.theory.solver_suite import (
    FASTER,
    GENERAL,
    KEEPING,
    LQ_PAIRS,
    PAIRS,
    SOLVERS,
    Entry,
    curvature,
    distance,
    is_slow,
    slow_marked,
    solved,
)


@pytest.mark.parametrize(("entry", "case"), PAIRS)
def test_converges_with_the_residual_it_claims(entry: Entry, case: Case) -> None:
    solution, problem = solved(entry, case), case.make()
    assert solution.status is Status.CONVERGED, solution.message
    residual = problem.residual(solution.controls)
    assert residual.norm <= entry.tol
    assert solution.residual.norm == pytest.approx(residual.norm, rel=1e-6, abs=1e-15)
    assert solution.objective == pytest.approx(float(problem.objective(solution.controls)))
    for x, y in zip(solution.states, problem.rollout(solution.controls), strict=True):
        torch.testing.assert_close(x, y)
    costates = problem.costates(solution.states, solution.controls)
    for p, q in zip(solution.costates, costates, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(("entry", "case"), PAIRS)
def test_history_is_complete_and_descends_overall(entry: Entry, case: Case) -> None:
    history = solved(entry, case).history
    assert history.index.name == "iteration"
    assert history.index.tolist() == list(range(solved(entry, case).iterations + 1))
    assert history.columns.tolist() == ["objective", "residual", "step_size", "sweeps"]
    assert history.notna().all(axis=None)
    assert history["objective"].iloc[-1] <= history["objective"].iloc[0]
    assert history["step_size"].iloc[0] == 0.0 and (history["step_size"].iloc[1:] > 0).all()
    last = solved(entry, case).residual.norm
    assert history["residual"].iloc[-1] == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize(("entry", "case"), LQ_PAIRS)
def test_equals_the_dense_kkt_solution_to_the_residual_it_reached(entry: Entry, case: Case) -> None:
    """A gradient of norm ``g`` puts the optimum within ``g / lambda_min``."""
    solution = solved(entry, case)
    reference, _ = kkt(case.make(), case.per_example)
    bound = solution.residual.norm / curvature(case, solution.controls)
    assert distance(solution.controls, reference) <= 1.001 * bound + 1e-13


@pytest.mark.parametrize(("entry", "case"), [p for p in PAIRS if p.values[1].exact])
def test_equals_the_closed_form(entry: Entry, case: Case) -> None:
    solution = solved(entry, case)
    assert case.exact is not None
    bound = solution.residual.norm / curvature(case, solution.controls)
    assert distance(solution.controls, case.exact()) <= 1.001 * bound + 1e-13


def test_the_solvers_are_found() -> None:
    assert {MSA, Shooting, ExtendedMSA, *FASTER} <= {entry.kind for entry in SOLVERS}


@pytest.mark.parametrize("entry", KEEPING, ids=lambda entry: entry.name)
def test_bounds_are_kept_and_active_where_the_answer_says_so(entry: Entry) -> None:
    known = next(known for known in exact_problems(box=True) if known.name == "scalar-box")
    problem = known.make()
    start = known.start(problem)
    solution = solve(problem, entry.make(problem, start), start, max_steps=500, tol=1e-9)
    assert solution.status is Status.CONVERGED, solution.message
    assert known.error(solution.controls) <= 1e-8


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.strongly_convex], ids=lambda case: case.name
)
@pytest.mark.one_in(9)
def test_solvers_agree_with_each_other(case: Case) -> None:
    solutions = [
        solved(entry, case) for entry in SOLVERS if entry.solves(case) and not is_slow(entry, case)
    ]
    first = solutions[0]
    for other in solutions[1:]:
        least = min(curvature(case, s.controls) for s in (first, other))
        assert least > 0
        bound = (first.residual.norm + other.residual.norm) / least
        assert distance(first.controls, other.controls) <= 2 * bound
        assert other.objective == pytest.approx(first.objective, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("batch", [None, 6])
def test_dense_kkt_reference_equals_an_independent_convex_solve(batch: int | None) -> None:
    problem = varying(batch)
    m = stacked(problem, per_example=False)
    x = [cvxpy.Constant(problem.x0.numpy().reshape(-1))]
    controls, total = [], 0.0
    for t, (A, B) in enumerate(zip(m["A"], m["B"], strict=True)):
        u = cvxpy.Variable(B.shape[1]) if B.shape[1] else None
        controls.append(u)
        moved = A @ x[-1] + m["c"][t]
        weight, linear, z = m["Q"][t], m["q"][t], x[-1]
        if u is not None:
            moved = moved + B @ u
            weight = _block(m["Q"][t], m["N"][t], m["R"][t])
            linear = cvxpy.hstack([m["q"][t], m["r"][t]])
            z = cvxpy.hstack([x[-1], u])
        total = total + 0.5 * cvxpy.quad_form(z, cvxpy.psd_wrap(weight)) + linear @ z
        x.append(moved)
    total = total + 0.5 * cvxpy.quad_form(x[-1], cvxpy.psd_wrap(m["Q"][-1])) + m["q"][-1] @ x[-1]
    cvxpy.Problem(cvxpy.Minimize(total)).solve(solver=cvxpy.CLARABEL)
    reference, _ = kkt(problem, per_example=False)
    for u, expected in zip(controls, reference, strict=True):
        if u is not None:
            torch.testing.assert_close(torch.from_numpy(u.value), expected, rtol=1e-6, atol=1e-6)


def _block(Q: object, N: object, R: object) -> object:
    return torch.cat(
        [
            torch.cat([torch.as_tensor(Q), torch.as_tensor(N)], 1),
            torch.cat([torch.as_tensor(N).mT, torch.as_tensor(R)], 1),
        ]
    ).numpy()


@pytest.mark.parametrize("entry", slow_marked(GENERAL))
@pytest.mark.one_in(2)
def test_controls_of_their_own_are_those_of_each_example_alone(entry: Entry) -> None:
    network = residual_network()
    examples = 3
    whole = ControlProblem(
        network.dynamics,
        SquaredErrorCost(network.cost.target[:examples], weight_decay=1.0),
        network.x0[:examples],
    )
    start = whole.zero_controls(per_example=True)
    options = {"max_steps": entry.max_steps, "tol": 1e-7}
    together = solve(whole, entry.make(whole, start), start, **options)
    assert together.status is Status.CONVERGED, together.message
    for i in range(examples):
        cost = SquaredErrorCost(network.cost.target[i], weight_decay=1.0)
        alone = ControlProblem(network.dynamics, cost, network.x0[i])
        start = alone.zero_controls()
        solution = solve(alone, entry.make(alone, start), start, **options)
        for u, v in zip(together.controls, solution.controls, strict=True):
            torch.testing.assert_close(u[i], v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entry", GENERAL, ids=lambda entry: entry.name)
def test_callback_sees_every_iterate_and_can_end_the_solve(entry: Entry) -> None:
    problem = residual_network()
    start, seen = problem.zero_controls(), []
    solution = solve(
        problem, entry.make(problem, start), start, max_steps=3, tol=0.0, callback=seen.append
    )
    assert [it.iteration for it in seen] == [0, 1, 2, 3]
    assert [it.objective for it in seen] == solution.history["objective"].tolist()
    for it in seen:
        assert distance(it.evaluation.gradient, problem.gradient(it.controls)) <= 1e-12
        assert it.residual.norm == pytest.approx(problem.residual(it.controls).norm)

    def interrupt(iterate: Iterate) -> None:
        if iterate.iteration == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(problem, entry.make(problem, start), start, max_steps=9, tol=0.0, callback=interrupt)


@pytest.mark.parametrize("entry", SOLVERS, ids=lambda entry: entry.name)
def test_progress_is_shown_on_request(entry: Entry, capsys: pytest.CaptureFixture[str]) -> None:
    problem = scalar()
    start = problem.zero_controls()
    solver = entry.make(problem, start)
    solve(problem, solver, start, max_steps=2, tol=0.0)
    assert capsys.readouterr().err == ""
    solve(problem, solver, start, max_steps=2, tol=0.0, progress=True)
    assert "step/s" in capsys.readouterr().err
