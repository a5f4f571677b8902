"""One conformance suite: every solver on every problem it is for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import isabstract

import cvxpy
import pytest
import torch

from deltacontrol.theory import solvers
from deltacontrol.theory.control.costs import QuadraticCost, SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.control.solved_problems import exact_problems
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers import (
    MSA,
    Iterate,
    Shooting,
    Solution,
    Solver,
    Status,
    TorchOptimiser,
    solve,
)
from deltacontrol.theory.solvers.emsa import ExtendedMSA
from deltacontrol.theory.solvers.gauss_newton import GaussNewton, NewtonCG
from deltacontrol.theory.solvers.ilqr import DDP, ILQR
from deltacontrol.theory.solvers.riccati import Riccati
from tests.theory.dense import flat, hessian, kkt, stacked
from tests.theory.problems import (
    CASES,
    Case,
    low_rank,
    residual_network,
    scalar,
    varying,
)

F64 = torch.float64


@dataclass(frozen=True)
class Entry:
    """A solver of the suite: how to make it for a problem, and which cases it is for."""

    kind: type[Solver]
    tol: float
    max_steps: int
    tol32: float = 1e-4  # the residual that it reaches in float32
    variant: str = ""

    @property
    def name(self) -> str:
        return self.kind.__name__ + (f"-{self.variant}" if self.variant else "")

    def make(self, problem: ControlProblem, at: Controls) -> Solver:
        return MAKERS.get(self.name, self.kind.example)(problem, at)

    def solves(self, case: Case) -> bool:
        if self.kind is ExtendedMSA or self.variant == "adam":
            return case.name in EXTENDED
        return case.linear_quadratic or not self.kind.linear_quadratic


def msa(problem: ControlProblem, at: Controls) -> Solver:
    return MSA(1.0 / float(torch.linalg.eigvalsh(hessian(problem, at))[-1]))


def descent(problem: ControlProblem, at: Controls) -> Solver:
    rate = 1.0 / float(torch.linalg.eigvalsh(hessian(problem, at))[-1])
    return TorchOptimiser(torch.optim.SGD, lr=rate, momentum=0.9, nesterov=True)


def quasi_newton(problem: ControlProblem, at: Controls) -> Solver:
    """One iteration of L-BFGS a step."""
    return TorchOptimiser(
        "LBFGS",
        max_iter=1,
        max_eval=25,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )


def found() -> Iterator[type[Solver]]:
    """Every solver of the package, wherever its file."""
    for info in pkgutil.iter_modules(solvers.__path__, solvers.__name__ + "."):
        for kind in vars(importlib.import_module(info.name)).values():
            if isinstance(kind, type) and issubclass(kind, Solver) and not isabstract(kind):
                if kind.__module__ == info.name and not kind.__name__.startswith("_"):
                    yield kind


MAKERS = {
    "MSA": msa,
    "TorchOptimiser-sgd": descent,
    "TorchOptimiser-adam": lambda problem, at: TorchOptimiser("Adam", lr=0.02),
    "TorchOptimiser-lbfgs": quasi_newton,
}
# Extended MSA and Adam are slow where J is badly conditioned; tests/theory/test_msa.py and
# tests/theory/test_torch_optimiser.py have more of them.
EXTENDED = ("scalar", "varying-batch", "varying-per-example", "classifier")
# A solver that is not listed has to reach 1e-7 in 20,000 steps.
FASTER = {
    ILQR: (1e-8, 200),
    DDP: (1e-9, 30),
    GaussNewton: (1e-8, 200),
    NewtonCG: (1e-8, 30),
    Riccati: (1e-9, 2),
}
SOLVERS = [
    *(Entry(k, *FASTER.get(k, (1e-7, 20_000))) for k in found() if k is not TorchOptimiser),
    Entry(TorchOptimiser, 1e-7, 20_000, variant="sgd"),
    Entry(TorchOptimiser, 1e-7, 20_000, variant="adam"),
    # Torch's line search gives up at (eps |J| curvature)^(1/2), 6e-4 for the network in float32.
    Entry(TorchOptimiser, 1e-7, 200, tol32=3e-4, variant="lbfgs"),
]
GENERAL = [entry for entry in SOLVERS if not entry.kind.linear_quadratic]
# L-BFGS of torch mixes the entries of a control, so its steps cannot be projected.
KEEPING = [e for e in SOLVERS if e.kind.takes_box and e.variant != "lbfgs"]

PAIRS = [
    pytest.param(entry, case, id=f"{entry.name}-{case.name}")
    for entry in SOLVERS
    for case in CASES
    if entry.solves(case)
]
LQ_PAIRS = [pair for pair in PAIRS if pair.values[1].linear_quadratic]

_solved: dict[tuple[str, str], Solution] = {}


def solved(entry: Entry, case: Case) -> Solution:
    """The solution of a case, computed once."""
    key = (entry.name, case.name)
    if key not in _solved:
        problem = case.make()
        # A bilinear problem is stationary at zero, so that one starts elsewhere.
        start = case.start(problem, 0.0 if case.strongly_convex else 0.5)
        solver = entry.make(problem, start)
        _solved[key] = solve(problem, solver, start, max_steps=entry.max_steps, tol=entry.tol)
    return _solved[key]


def curvature(case: Case, at: Controls) -> float:
    """The smallest eigenvalue of the Hessian of ``J``."""
    return float(torch.linalg.eigvalsh(hessian(case.make(), at))[0])


def distance(a: Controls, b: Controls) -> float:
    return float((flat(a) - flat(b)).norm())


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
def test_solvers_agree_with_each_other(case: Case) -> None:
    solutions = [solved(entry, case) for entry in SOLVERS if entry.solves(case)]
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


@pytest.mark.parametrize("entry", GENERAL, ids=lambda entry: entry.name)
def test_status_is_honest_when_the_steps_run_out(entry: Entry) -> None:
    problem = residual_network()
    start = problem.zero_controls()
    solution = solve(problem, entry.make(problem, start), start, max_steps=2, tol=1e-12)
    assert solution.status is Status.MAX_STEPS
    assert solution.iterations == 2
    assert solution.residual.norm > 1e-12
    assert "after all 2 iterations" in solution.message and "more steps" in solution.message


@pytest.mark.parametrize("entry", SOLVERS, ids=lambda entry: entry.name)
def test_no_steps_only_evaluates_the_start(entry: Entry) -> None:
    problem = scalar()
    start = problem.zero_controls()
    solution = solve(problem, entry.make(problem, start), start, max_steps=0, tol=0.0)
    assert solution.status is Status.MAX_STEPS and solution.iterations == 0
    assert all(torch.equal(a, b) for a, b in zip(solution.controls, start, strict=True))


@pytest.mark.parametrize("entry", SOLVERS, ids=lambda entry: entry.name)
def test_a_solved_start_converges_without_a_step(entry: Entry) -> None:
    problem = varying(None)
    start, _ = kkt(problem, per_example=False)
    solution = solve(problem, entry.make(problem, start), start, max_steps=9, tol=1e-10)
    assert solution.status is Status.CONVERGED and solution.iterations == 0


@pytest.mark.parametrize("entry", GENERAL, ids=lambda entry: entry.name)
def test_nan_is_divergence(entry: Entry) -> None:
    network = residual_network()
    target = torch.full((7, 4), float("nan"), dtype=F64)
    problem = ControlProblem(network.dynamics, SquaredErrorCost(target), network.x0)
    start = network.zero_controls()
    solution = solve(problem, entry.make(network, start), start, max_steps=9, tol=1e-9)
    assert solution.status is Status.DIVERGED
    assert "initial controls" in solution.message


def float32_network() -> ControlProblem:
    network = residual_network()
    dynamics = type(network.dynamics).random(5, 4, 6, 3, seed=1, dtype=torch.float32)
    cost = SquaredErrorCost(network.cost.target.float(), weight_decay=1.0)
    return ControlProblem(dynamics, cost, network.x0.float())


@pytest.mark.parametrize("entry", GENERAL, ids=lambda entry: entry.name)
def test_controls_keep_their_dtype_and_the_start_is_left_alone(entry: Entry) -> None:
    problem = float32_network()
    start = problem.zero_controls()
    solution = solve(problem, entry.make(problem, start), start, max_steps=200, tol=entry.tol32)
    assert solution.status is Status.CONVERGED, solution.message
    assert all(u.dtype == torch.float32 and u.shape == (3,) for u in solution.controls)
    assert not any(u.any() for u in start)


FALLING = [entry for entry in GENERAL if entry.kind.descends]


@pytest.mark.parametrize("entry", FALLING, ids=lambda entry: entry.name)
def test_a_concave_problem_is_unbounded_for_the_right_reason(entry: Entry) -> None:
    one, zero = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    cost = QuadraticCost(Q=[zero] * 3, R=[-one] * 3, Qf=zero, qf=one[0])
    problem = ControlProblem(LinearDynamics.constant(3, one, one), cost, one[0])
    start = problem.zero_controls()
    solution = solve(problem, entry.make(problem, start), start, max_steps=500, tol=1e-8)
    assert solution.status is Status.UNBOUNDED, solution.message
    assert "raise the running cost" in solution.message
    assert "callback" not in solution.message


@pytest.mark.parametrize("entry", FALLING, ids=lambda entry: entry.name)
def test_rounding_errors_end_a_solve_in_float32(entry: Entry) -> None:
    """No solver claims more than float32 resolves, or asks for more steps there.

    Plain MSA and optimisers of a fixed rate have no line search that could tell, and take the steps
    that they are given.
    """
    problem = float32_network()
    start = problem.zero_controls()
    solution = solve(problem, entry.make(problem, start), start, max_steps=400, tol=1e-12)
    assert solution.residual.norm < entry.tol32
    assert solution.status is Status.LINE_SEARCH_FAILED, solution.message
    assert solution.iterations < 300 and "float64" in solution.message


@pytest.mark.parametrize("entry", GENERAL, ids=lambda entry: entry.name)
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


@pytest.mark.parametrize("make", [residual_network, low_rank, lambda: varying(6)])
def test_msa_is_gradient_descent(make: Callable[[], ControlProblem]) -> None:
    problem, step, iterates = make(), 0.05, []
    start = tuple(torch.linspace(-1, 1, m, dtype=F64) for m in problem.dynamics.control_sizes)
    solve(problem, MSA(step), start, max_steps=30, tol=0.0, callback=iterates.append)
    leaves = [u.clone().requires_grad_() for u in start]
    optimiser = torch.optim.SGD(leaves, lr=step)
    for it in iterates:
        assert distance(it.controls, tuple(leaves)) <= 1e-12 * float(flat(it.controls).norm())
        optimiser.zero_grad()
        problem.objective(tuple(leaves)).backward()
        optimiser.step()


def test_msa_with_too_long_a_step_diverges_and_returns_the_last_finite_iterate() -> None:
    problem = scalar()
    solution = solve(problem, MSA(1e3), problem.zero_controls(), max_steps=500, tol=1e-9)
    assert solution.status is Status.DIVERGED
    assert "last finite iterate" in solution.message and "smaller step" in solution.message
    assert torch.isfinite(flat(solution.controls)).all()


def test_msa_converges_exactly_below_two_over_the_curvature() -> None:
    problem = scalar()
    start = problem.zero_controls()
    top = float(torch.linalg.eigvalsh(hessian(problem, start))[-1])
    below, above = (
        solve(problem, MSA(factor * 2 / top), start, max_steps=300, tol=1e-10)
        for factor in (0.9, 1.02)
    )
    assert below.status is Status.CONVERGED
    assert above.status is not Status.CONVERGED
    assert above.history["residual"].iloc[-1] > above.history["residual"].iloc[0]


def test_shooting_reports_a_failed_line_search_with_its_cause() -> None:
    problem = residual_network()
    solution = solve(problem, Shooting(), problem.zero_controls(), max_steps=9999, tol=0.0)
    assert solution.status is Status.LINE_SEARCH_FAILED
    assert "L-BFGS stopped" in solution.message and "raise tol" in solution.message
    assert 0 < solution.residual.norm <= 1e-6


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_bad_settings_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="step_size"):
        MSA(value)
    with pytest.raises(InputError, match="memory"):
        Shooting(0)
    problem = scalar()
    with pytest.raises(InputError, match="max_steps"):
        solve(problem, MSA(1.0), problem.zero_controls(), max_steps=-1, tol=0.0)
    with pytest.raises(InputError, match="step 0 has shape"):
        bad = tuple(torch.zeros(2, dtype=F64) for _ in range(5))
        solve(problem, MSA(1.0), bad, max_steps=1, tol=0.0)
