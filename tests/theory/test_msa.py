"""MSA with each way to minimise H, and extended MSA: exact answers, divergence, descent, boxes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from deltacontrol.theory.control.costs import CrossEntropyCost, QuadraticCost, SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem, Dynamics
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.control.work import metered
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers.emsa import ExtendedMSA, step_change
from deltacontrol.theory.solvers.minimisers import ExactArgmin, GradientStep, InnerLBFGS
from deltacontrol.theory.solvers.msa import MSA
from deltacontrol.theory.solvers.solving import Status, solve
from tests.theory.dense import flat, hessian, kkt
from tests.theory.msa_terms import ones
from tests.theory.problems import (
    CASES,
    embedding_problem,
    low_rank,
    normal,
    residual_classifier,
    residual_network,
    scalar,
    scalar_exact,
    varying,
)

F64 = torch.float64


def descends(objectives: Sequence[float]) -> bool:
    """Whether no value exceeds the one before by more than rounding."""
    return all(b - a <= 1e-13 * abs(a) for a, b in itertools.pairwise(objectives))


def with_radius(radius: float) -> ControlProblem:
    """A linear-quadratic problem on which exact MSA multiplies errors by ``radius`` in the end."""
    problem = varying(4)
    cost = problem.cost
    assert isinstance(cost, QuadraticCost)
    u = problem.zero_controls()
    R = torch.block_diag(*cost.R)
    M = hessian(problem, u) - R
    present = float(torch.linalg.eigvals(torch.linalg.solve(R, M)).abs().max())
    scaled = QuadraticCost(
        Q=cost.Q,
        R=[present / radius * Rt for Rt in cost.R],
        N=cost.N,
        q=cost.q,
        r=cost.r,
        Qf=cost.Qf,
        qf=cost.qf,
    )
    return ControlProblem(problem.dynamics, scaled, problem.x0)


# MSA with the exact minimiser


@pytest.mark.parametrize("make", [scalar, lambda: varying(6)])
def test_exact_argmin_is_the_newton_step_of_each_hamiltonian(make) -> None:
    problem, iterates = make(), []
    solve(
        problem, MSA(ExactArgmin()), ones(problem), max_steps=2, tol=0.0, callback=iterates.append
    )
    u, v = iterates[0].controls, iterates[1].controls
    gradient = problem.gradient(u)
    for t, (a, b, g) in enumerate(zip(u, v, gradient, strict=True)):
        assert float((b - (a - torch.linalg.solve(problem.cost.R[t], g))).norm()) <= 1e-11
    # It minimises: H is no smaller at any other control.
    now = iterates[0].evaluation
    for t, b in enumerate(v):
        values = [
            float(problem.hamiltonian(t, now.states[t], c, now.costates[t + 1]))
            for c in (b, *(b + 0.1 * normal(*b.shape, seed=s) for s in range(20)))
        ]
        assert values[0] <= min(values) + 1e-12


@pytest.mark.parametrize("radius", [0.8, 1.2])
@pytest.mark.slow
def test_exact_msa_converges_exactly_below_radius_one(radius: float) -> None:
    problem = with_radius(radius)
    reference, _ = kkt(problem, per_example=False)
    assert float(torch.linalg.eigvalsh(hessian(problem, reference))[0]) > 0
    errors = []
    solution = solve(
        problem,
        MSA(ExactArgmin()),
        problem.zero_controls(),
        max_steps=40,
        tol=1e-9,
        callback=lambda it: errors.append(float((flat(it.controls) - flat(reference)).norm())),
    )
    assert (errors[-1] / errors[-11]) ** 0.1 == pytest.approx(radius, rel=1e-3)
    assert (errors[-1] < errors[0]) == (radius < 1)
    assert solution.status is Status.MAX_STEPS


@pytest.mark.slow
def test_extended_msa_solves_what_exact_msa_diverges_on() -> None:
    problem = with_radius(3.0)
    start = problem.zero_controls()
    basic = solve(problem, MSA(ExactArgmin()), start, max_steps=25, tol=1e-8)
    assert basic.status is not Status.CONVERGED
    assert basic.history["residual"].iloc[-1] > 1e6 * basic.history["residual"].iloc[0]
    for minimiser, tol in ((ExactArgmin(), 1e-9), (InnerLBFGS(), 1e-6)):
        extended = solve(problem, ExtendedMSA(1.0, minimiser), start, max_steps=300, tol=tol)
        assert extended.status is Status.CONVERGED, extended.message
        reference, _ = kkt(problem, per_example=False)
        least = float(torch.linalg.eigvalsh(hessian(problem, start))[0])
        error = float((flat(extended.controls) - flat(reference)).norm())
        assert error <= 1.001 * extended.residual.norm / least
        assert descends(extended.history["objective"].tolist())


def test_a_weight_decay_on_affine_dynamics_needs_no_matrix() -> None:
    """A control of 10^5 entries, whose Hessian would take 80 GB."""
    size = 100_000
    B = normal(3, size, seed=1) / size**0.5
    dynamics = LinearDynamics([torch.eye(3, dtype=F64)], [B])
    target = normal(3, seed=2)
    problem = ControlProblem(dynamics, SquaredErrorCost(target, 2.0), torch.zeros(3, dtype=F64))
    with metered() as meter:
        solution = solve(
            problem, MSA(ExactArgmin()), problem.zero_controls(), max_steps=99, tol=1e-10
        )
    assert solution.status is Status.CONVERGED
    gram = B @ B.mT
    exact = B.mT @ torch.linalg.solve(gram + 2.0 * torch.eye(3, dtype=F64), target)
    assert float((solution.controls[0] - exact).norm()) <= 1e-9
    assert meter.steps <= 12 * (solution.iterations + 1)


def test_exact_argmin_refuses_what_is_not_quadratic_naming_the_step() -> None:
    problem = residual_network()
    with pytest.raises(InputError, match=r"H_0 is not quadratic in u_0: .* InnerLBFGS"):
        solve(problem, MSA(ExactArgmin()), problem.zero_controls(), max_steps=3, tol=0.0)


def test_exact_argmin_refuses_a_large_dense_hessian() -> None:
    with pytest.raises(InputError, match=r"H_0 in its 2 control entries .* dense_limit"):
        solve(varying(None), MSA(ExactArgmin(1)), ones(varying(None)), max_steps=3, tol=0.0)


def test_no_running_cost_leaves_h_without_a_minimum() -> None:
    problem = scalar()
    one = torch.ones(1, 1, dtype=F64)
    free = ControlProblem(
        problem.dynamics, QuadraticCost.constant(5, Q=0 * one, R=0 * one, Qf=one), problem.x0
    )
    solution = solve(free, MSA(ExactArgmin()), free.zero_controls(), max_steps=9, tol=1e-9)
    assert solution.status is Status.UNBOUNDED and solution.iterations == 0
    assert "H_0 is unbounded below in u_0: it is linear, with slope 3" in solution.message
    assert "running cost" in solution.message and "box" in solution.message


def test_a_singular_hessian_with_the_gradient_in_its_range_has_a_nearest_minimiser() -> None:
    """``H = 1/2 (v_0 - 1)^2``: the second entry is free, and stays."""
    eye = torch.eye(2, dtype=F64)
    cost = QuadraticCost(
        Q=[0 * eye],
        R=[torch.diag(torch.tensor([1.0, 0.0], dtype=F64))],
        r=[torch.tensor([-1.0, 0.0], dtype=F64)],
        Qf=0 * eye,
    )
    problem = ControlProblem(LinearDynamics([eye], [eye]), cost, torch.zeros(2, dtype=F64))
    start = (torch.tensor([5.0, 7.0], dtype=F64),)
    solution = solve(problem, MSA(ExactArgmin()), start, max_steps=5, tol=1e-14)
    assert solution.status is Status.CONVERGED and solution.iterations == 1
    assert solution.controls[0].tolist() == [1.0, 7.0]


@pytest.mark.parametrize(("decay", "bounded"), [(1.1, True), (0.9, False)])
def test_lora_has_a_minimum_of_h_iff_the_decay_exceeds_the_singular_value(
    decay: float, bounded: bool
) -> None:
    """Then it is zero (notebook 2, C)."""
    problem = low_rank()
    u = tuple(normal(m, seed=1) for m in problem.dynamics.control_sizes)
    plain = ControlProblem(problem.dynamics, SquaredErrorCost(problem.cost.target), problem.x0)
    now = plain.evaluate(u)
    sigmas = [
        float(torch.linalg.matrix_norm(now.states[t].mT @ now.costates[t + 1], 2)) for t in (0, 1)
    ]
    decayed = ControlProblem(
        problem.dynamics, SquaredErrorCost(problem.cost.target, decay * max(sigmas)), problem.x0
    )
    solution = solve(decayed, MSA(ExactArgmin()), u, max_steps=1, tol=0.0)
    if bounded:
        assert solution.iterations == 1
        assert float(flat(solution.controls).norm()) <= 1e-12 * float(flat(u).norm())
    else:
        step = sigmas.index(max(sigmas))
        assert solution.status is Status.UNBOUNDED
        assert f"H_{step} is unbounded below in u_{step}: its Hessian has the eigenvalue -" in (
            solution.message
        )


# The inner L-BFGS and the gradient step


def test_inner_lbfgs_reaches_the_exact_minimiser() -> None:
    problem = varying(6)
    start = ones(problem)
    exact, inner = (
        solve(problem, MSA(minimiser), start, max_steps=1, tol=0.0)
        for minimiser in (ExactArgmin(), InnerLBFGS(50, reduction=1e-12))
    )
    torch.testing.assert_close(flat(inner.controls), flat(exact.controls), rtol=1e-8, atol=1e-8)


def test_a_number_is_a_gradient_step() -> None:
    assert MSA(0.5) == MSA(GradientStep(0.5))
    assert repr(MSA(0.5)) == "MSA(minimiser=GradientStep(step_size=0.5))"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: InnerLBFGS(0), "steps = 0"),
        (lambda: InnerLBFGS(5, reduction=0.0), "reduction"),
        (lambda: ExactArgmin(-1), "dense_limit"),
        (lambda: GradientStep(-1.0), "step_size"),
        (lambda: ExtendedMSA(0.0), "rho = 0.0 must be positive; rho = 0 is MSA"),
        (lambda: ExtendedMSA(float("nan")), "rho"),
    ],
)
def test_bad_settings_are_refused(make, match: str) -> None:
    with pytest.raises(InputError, match=match):
        make()


# Boxes


# Extended MSA


def test_with_a_fixed_rho_the_scalar_problem_descends_exactly_above_the_threshold() -> None:
    """Notebook 3: the step is ``-grad J/(1 + rho)``, which descends iff ``rho > (L - 1)/2 = 2``."""
    problem = scalar()
    for rho, descending in ((1.98, False), (2.02, True)):
        solution = solve(
            problem,
            ExtendedMSA(rho, ExactArgmin(), adaptive=False),
            problem.zero_controls(),
            max_steps=8,
            tol=1e-12,
        )
        history = solution.history["objective"].tolist()
        assert descends(history) == descending
        residuals = solution.history["residual"].tolist()
        factor = residuals[-1] / residuals[-2]
        assert factor == pytest.approx(abs(1 - 6 / (1 + rho)), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("residual", "low-rank")])
def test_the_schedule_descends_from_any_first_rho(case) -> None:
    problem = case.make()
    for rho in (1e-3, 1e3):
        start = case.start(problem, 1.0)
        solution = solve(problem, ExtendedMSA(rho), start, max_steps=12, tol=1e-9)
        history = solution.history["objective"].tolist()
        assert descends(history) and history[-1] < history[0]


@pytest.mark.slow
def test_without_weight_decay_the_augmented_hamiltonian_of_lora_still_has_a_minimum() -> None:
    problem = low_rank()
    plain = ControlProblem(problem.dynamics, SquaredErrorCost(problem.cost.target), problem.x0)
    start = tuple(normal(m, seed=1) for m in problem.dynamics.control_sizes)
    basic = solve(plain, MSA(ExactArgmin()), start, max_steps=10, tol=1e-8)
    assert basic.status is Status.UNBOUNDED
    extended = solve(plain, ExtendedMSA(), start, max_steps=10, tol=1e-8)
    history = extended.history["objective"].tolist()
    assert descends(history) and history[-1] < 0.9 * history[0]


@pytest.mark.parametrize("make", [residual_network, low_rank, lambda: varying(6)])
def test_step_changes_are_what_their_names_say(make) -> None:
    """Against per-example gradients of the Hamiltonian by plain autograd."""
    problem = make()
    u, v = ones(problem, 0.3), ones(problem, -0.2)
    now = problem.evaluate(u)
    examples = len(problem.x0)
    for t, (a, b) in enumerate(zip(u, v, strict=True)):
        x, p = now.states[t], now.costates[t + 1]
        change = step_change(problem, t, x, p, a, b)

        def gradient(control: Tensor, t: int = t, x: Tensor = x, p: Tensor = p) -> Tensor:
            leaf = x.clone().requires_grad_()
            value = problem.hamiltonian(t, leaf, control, p)
            return torch.autograd.grad(value, leaf)[0]

        old, new = (problem.hamiltonian(t, x, c, p) for c in (a, b))
        assert float(change.hamiltonian) == pytest.approx(float(new - old), rel=1e-9, abs=1e-12)
        moved = problem.dynamics.step(t, x, b) - problem.dynamics.step(t, x, a)
        assert float(change.state) == pytest.approx(float(moved.square().sum(-1).mean()))
        turned = examples * (gradient(b) - gradient(a))
        assert float(change.costate) == pytest.approx(float(turned.square().sum(-1).mean()))
        assert float(change.squares) == float(change.state + change.costate)
        if b.numel():
            torch.testing.assert_close(gradient(a), now.costates[t])


def test_rho_does_not_depend_on_the_batch_size() -> None:
    """Each example twice is the same problem: the same iterates."""
    problem = residual_network()
    twice = ControlProblem(
        problem.dynamics,
        SquaredErrorCost(problem.cost.target.repeat(2, 1), 1.0),
        problem.x0.repeat(2, 1),
    )
    first, second = (
        solve(p, ExtendedMSA(3.0, adaptive=False), ones(p), max_steps=3, tol=0.0)
        for p in (problem, twice)
    )
    torch.testing.assert_close(flat(second.controls), flat(first.controls), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_integer_states_and_steps_without_control_are_fine() -> None:
    problem = embedding_problem()
    start = problem.zero_controls(dtype=F64)
    solution = solve(problem, ExtendedMSA(), start, max_steps=50, tol=1e-5)
    assert solution.status is Status.CONVERGED, solution.message
    assert descends(solution.history["objective"].tolist())


class Attention(Dynamics):
    """Fused attention whose queries a control moves, then a mean over the tokens."""

    horizon = 2
    control_sizes = (4, 0)

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        if t == 1:
            return x.mean(1)
        heads = x.unsqueeze(1)
        return x + functional.scaled_dot_product_attention(heads + u, heads, heads).squeeze(1)


def test_the_second_derivatives_pass_through_fused_attention() -> None:
    cost = CrossEntropyCost(torch.tensor([0, 1, 3]), 0.1)
    problem = ControlProblem(Attention(), cost, normal(3, 5, 4, seed=4))
    solution = solve(problem, ExtendedMSA(), problem.zero_controls(), max_steps=50, tol=1e-7)
    assert solution.status is Status.CONVERGED, solution.message
    assert descends(solution.history["objective"].tolist())


@pytest.mark.slow
def test_where_no_step_helps_the_solver_says_so() -> None:
    problem = residual_classifier()
    solution = solve(problem, ExtendedMSA(), problem.zero_controls(), max_steps=400, tol=0.0)
    assert solution.status is Status.LINE_SEARCH_FAILED
    assert "raise tol" in solution.message
    assert 0 < solution.residual.norm <= 1e-6
    assert descends(solution.history["objective"].tolist())


def test_a_fixed_rho_that_is_too_small_ends_where_the_augmented_h_has_no_minimum() -> None:
    """``R = -1`` and ``B'B = 1``: the augmented Hamiltonian is convex only for ``rho > 1``."""
    one = torch.ones(1, 1, dtype=F64)
    problem = ControlProblem(
        LinearDynamics([one], [one]),
        QuadraticCost([0 * one], [-one], Qf=2 * one),
        torch.ones(1, dtype=F64),
    )
    start = problem.zero_controls()
    fixed = solve(problem, ExtendedMSA(0.5, ExactArgmin(), False), start, max_steps=9, tol=1e-9)
    assert fixed.status is Status.UNBOUNDED
    assert "the augmented H_0 is unbounded below" in fixed.message
    adaptive = solve(problem, ExtendedMSA(0.5, ExactArgmin()), start, max_steps=99, tol=1e-9)
    assert adaptive.status is Status.CONVERGED
    assert float(adaptive.controls[0]) == pytest.approx(-2.0, abs=1e-8)


def test_the_exact_scalar_answer() -> None:
    solution = solve(
        scalar(), ExtendedMSA(1.0, ExactArgmin()), ones(scalar()), max_steps=60, tol=1e-11
    )
    assert solution.status is Status.CONVERGED
    assert float((flat(solution.controls) - flat(scalar_exact())).norm()) <= 1e-10
