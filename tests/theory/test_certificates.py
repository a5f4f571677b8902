"""Certificates: valid at every point, equal to the gap of exact problems, honest about networks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from deltacontrol.theory.certificates import (
    Ball,
    Certificate,
    Kind,
    Tightness,
    gap_bound,
    least_on_ball,
    quadratic_gap,
)
from deltacontrol.theory.certificates.quadratics import DenseQuadratic
from deltacontrol.theory.control.costs import CrossEntropyCost, SquaredErrorCost
from deltacontrol.theory.control.problem import Box, ControlProblem
from deltacontrol.theory.control.systems import ResidualNetwork
from deltacontrol.theory.convex.losses import CrossEntropy
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.operator import SymmetricMatrix
from deltacontrol.theory.solvers import Riccati, solve
from tests.theory import certified
from tests.theory.certified import F64, Exact, exact
from tests.theory.dense import flat, hessian, unflatten
from tests.theory.lq_problems import random_problem
from tests.theory.problems import Forgetful, TerminalOnly, embedding_problem, normal


def bound(case: Exact) -> Certificate:
    return gap_bound(case.problem, case.controls, case.radius, affine=case.affine)


def indefinite(size: int, seed: int) -> tuple[Tensor, Tensor]:
    root = normal(size, size, seed=seed)
    return root + root.mT, normal(size, seed=seed + 1)


# -- exact problems ------------------------------------------------------------------------------


def check(numbers: range) -> None:
    """The bound is above what another method's point gains, and no more than it rounds above."""
    for number in numbers:
        case = exact(number)
        found, gap = bound(case), case.gap
        size = max(1.0, abs(found.objective))
        named = f"problem {number}: {found} and {gap}"
        assert found.upper >= gap - 1e-14 * size, named
        assert found.upper <= gap * (1 + 1e-6) + 1e-8 * size, named
        assert found.lower <= found.upper and found.proved, named
        assert found.tightness is Tightness.EXACT, named
        assert gains(case.problem, case.controls, found) == pytest.approx(
            found.lower, rel=1e-8, abs=1e-12 * size
        ), named
        away = flat(found.controls) - flat(case.controls)
        assert away.norm() <= case.radius * (1 + 1e-12), named


def gains(problem: ControlProblem, u, found: Certificate) -> float:
    return float(problem.objective(u) - problem.objective(found.controls))


def test_the_bound_is_the_gap_of_some_exact_problems() -> None:
    check(range(9))


@pytest.mark.slow
def test_the_bound_is_the_gap_of_200_exact_problems() -> None:
    check(range(200))


def test_without_a_ball_it_is_riccatis_value() -> None:
    problem = random_problem([3, 4, 2, 3], [2, 1, 2], seed=5)
    u = tuple(normal(m, seed=m) for m in problem.dynamics.control_sizes)
    found = gap_bound(problem, u, math.inf)
    least = solve(problem, Riccati()).objective
    assert found.upper == pytest.approx(float(problem.objective(u)) - least, rel=1e-9)
    assert found.tightness is Tightness.EXACT and found.multiplier == 0.0
    assert gap_bound(problem, found.controls, math.inf).upper < 1e-10
    case = certified.negative_curvature(np.random.default_rng(1), 1)
    endless = gap_bound(case.problem, case.controls, math.inf)
    assert endless.upper == math.inf and endless.tightness is Tightness.VACUOUS
    assert "take a finite radius" in repr(endless)


def test_a_squared_error_and_controls_per_example_are_quadratic_too() -> None:
    problem = random_problem([3, 4, 2], [2, 3], seed=6, batch=4)
    u = tuple(normal(4, m, seed=m) for m in problem.dynamics.control_sizes)
    other = replace(problem, cost=SquaredErrorCost(normal(4, 2, seed=9), weight_decay=0.1))
    for made in (problem, other):
        step = certified.trust_region(hessian(made, u), flat(made.gradient(u)), 0.7)
        found = gap_bound(made, u, 0.7)
        assert found.kind is Kind.QUADRATIC
        assert found.upper == pytest.approx(Exact(made, u, 0.7, step).gap, rel=1e-9)


def test_the_hard_case() -> None:
    """``g`` has no part along the least eigenvector: ``lambda = 1`` and ``s = (+-t, -1/3)``."""
    g, H = torch.tensor([0.0, 1.0], dtype=F64), torch.diag(torch.tensor([-1.0, 2.0], dtype=F64))
    found, r = quadratic_gap(g, H, 2.0), 2.0
    # -t^2/2 + s_2 + s_2^2 with s_2 = -1/3 and t^2 = r^2 - 1/9.
    gain = 0.5 * (r**2 - 1 / 9) + 1 / 3 - 1 / 9
    assert found.upper == pytest.approx(gain, rel=1e-12)
    assert found.lower == pytest.approx(gain, rel=1e-12) and found.multiplier == pytest.approx(1.0)


def test_a_ball_around_another_centre() -> None:
    case = certified.linear_quadratic(np.random.default_rng(3), 3)
    u = case.controls
    centre = tuple(c + 0.1 * normal(len(c), seed=t) for t, c in enumerate(u))
    found = gap_bound(case.problem, u, 2.0, centre=centre)
    H, middle = hessian(case.problem, u), flat(centre) - flat(u)
    slope = flat(case.problem.gradient(u)) + H @ middle
    step = middle + certified.trust_region(H, slope, 2.0)
    far = Exact(case.problem, u, math.inf, step)
    assert found.upper == pytest.approx(far.gap, rel=1e-9)
    assert (flat(found.controls) - flat(centre)).norm() <= 2.0 + 1e-12


# -- validity, whatever the solver did -----------------------------------------------------------


def test_every_point_gives_a_bound() -> None:
    """From any point, inside the ball or not, of functions of either sign."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        H, g = indefinite(5, seed)
        lowest = float(torch.linalg.eigvalsh(H)[0])
        ball = Ball(normal(5, seed=seed + 2), 1.5)

        def f(v: Tensor, g: Tensor = g, H: Tensor = H) -> float:
            return float(g @ v + 0.5 * v @ H @ v)

        inside = [ball.project(ball.centre + 2 * torch.randn(5, generator=generator, dtype=F64))
                  for _ in range(50)]  # fmt: skip
        best = ball.centre + certified.trust_region(H, g + H @ ball.centre, ball.radius)
        least = min(map(f, [*inside, best]))
        bounds = []
        for w in [3 * torch.randn(5, generator=generator, dtype=F64) for _ in range(50)] + [best]:
            bounds.append(least_on_ball(f(w), g + H @ w, w, lowest, ball).bound)
        assert max(bounds) <= least + 1e-12
        assert bounds[-1] == pytest.approx(least, abs=1e-9)  # and at the minimiser it closes


def test_the_multiplier_is_that_of_lagranges_dual() -> None:
    """``-1/2 g'(H + lambda I)^-1 g - lambda r^2/2`` is below the minimum for every ``lambda``."""
    for seed in range(10):
        H, g = indefinite(6, seed)
        found = quadratic_gap(g, H, 0.8)
        eye, lowest = torch.eye(6, dtype=F64), float(torch.linalg.eigvalsh(H)[0])

        def dual(multiplier: float, H: Tensor = H, g: Tensor = g, eye: Tensor = eye) -> float:
            solved = torch.linalg.solve(H + multiplier * eye, g)
            return -0.5 * float(g @ solved) - 0.5 * multiplier * 0.8**2

        assert dual(found.multiplier) == pytest.approx(-found.upper, rel=1e-9)
        for more in (0.01, 0.1, 1.0, 10.0):
            assert dual(-lowest + more) <= -found.lower + 1e-12


@pytest.mark.parametrize("centred", [True, False])
def test_the_bound_is_fenchels_dual(centred: bool) -> None:
    case = certified.logistic(np.random.default_rng(2), 2)
    problem = replace(case.problem, cost=replace(case.problem.cost, weight_decay=0.0))
    u, x = case.controls, case.problem.x0
    centre = u if centred else (u[0] + 0.01 * normal(len(u[0]), seed=7),)
    found = gap_bound(problem, u, 0.4, centre=centre, affine=True)
    a, loss = found.dual, CrossEntropy()
    assert a is not None
    targets = loss.targets(case.problem.cost.labels, tuple(a.shape))
    conjugate = loss.conjugate(len(a) * a.numpy(), targets)
    z = x @ centre[0].reshape(problem.dynamics.shape).mT
    value = float((a * z).sum()) - conjugate - 0.4 * float((a.mT @ x).norm())
    assert value == pytest.approx(found.objective - found.upper, abs=1e-12)


def test_a_number_above_the_least_eigenvalue_proves_nothing() -> None:
    """With a wrong floor the bound is broken, which is why no floor is estimated."""
    H, g = indefinite(8, 4)
    gap, lowest = quadratic_gap(g, H, 2.0).lower, float(torch.linalg.eigvalsh(H)[0])
    assert quadratic_gap(g, SymmetricMatrix(H), 2.0, floor=0.0).upper < 0.9 * gap
    assert quadratic_gap(g, SymmetricMatrix(H), 2.0, floor=lowest - 1e-9).upper >= gap


@pytest.mark.parametrize("products", [1, 3, 250])
def test_products_alone_give_a_valid_bound(products: int) -> None:
    root = normal(30, 12, seed=1)
    H, g = root @ root.mT, normal(30, seed=2)
    for radius in (0.01, 0.5, 50.0):
        dense = quadratic_gap(g, H, radius)
        found = quadratic_gap(g, SymmetricMatrix(H), radius, floor=0.0, max_products=products)
        assert found.upper >= dense.lower and found.lower <= dense.upper
        if products == 250:
            assert found.upper == pytest.approx(dense.upper, rel=1e-6)


def test_a_bad_inner_solver_makes_no_wrong_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    H, g = indefinite(5, 8)
    good = quadratic_gap(g, H, 1.0)
    for wrong in (normal(5, seed=3), 1e6 * normal(5, seed=4), torch.full((5,), math.nan).double()):
        monkeypatch.setattr(DenseQuadratic, "minimiser", lambda *_, wrong=wrong: wrong)
        bad = quadratic_gap(g, H, 1.0)
        assert bad.upper >= good.lower and bad.lower <= good.upper
        assert bad.tightness is Tightness.LOOSE


# -- networks ------------------------------------------------------------------------------------


def network(decay: float = 0.1, seed: int = 0) -> ControlProblem:
    dynamics = ResidualNetwork.random(4, width=3, hidden=5, control_size=4, seed=seed)
    labels = torch.arange(6) % 3
    return ControlProblem(dynamics, CrossEntropyCost(labels, decay), normal(6, 3, seed=seed + 1))


def controls_of(problem: ControlProblem, scale: float = 0.3) -> tuple[Tensor, ...]:
    sizes = problem.dynamics.control_sizes
    return tuple(scale * normal(m, seed=50 + t) for t, m in enumerate(sizes))


def test_of_a_network_the_bound_and_the_true_remainder_hold() -> None:
    """``J(u) - J(u + d) <= upper - <a, rho(d)>`` at every ``d`` of the ball: what is proved."""
    problem = network()
    u = controls_of(problem)
    z = problem.rollout(u)[-1]
    for radius in (0.1, 1.0, 5.0):
        found = gap_bound(problem, u, radius)
        assert found.kind is Kind.LINEARISED and not found.proved
        assert found.remainder is not None and found.dual is not None
        assert found.attained == pytest.approx(gains(problem, u, found), abs=1e-14)
        assert found.tightness is Tightness.EXACT  # of the linearisation
        step = flat(found.controls) - flat(u)
        others: list[float] = []
        directions = [step, *normal(30, len(step), seed=3)]
        for number, ray in enumerate(directions):
            length = radius * (number + 1) / len(directions) if number else float(step.norm())
            d = length * ray / ray.norm()
            ahead = unflatten(flat(u) + d, u)
            changed = torch.func.jvp(
                lambda flat_u: problem.rollout(unflatten(flat_u, u))[-1], (flat(u),), (d,)
            )[1]
            rest = problem.rollout(ahead)[-1] - z - changed
            left_out = -float((found.dual * rest).sum())
            gain = float(problem.objective(u) - problem.objective(ahead))
            assert gain <= found.upper + left_out + 1e-12
            assert gain <= found.ceiling
            others.append(left_out)
        assert found.remainder.found >= max(others[1:])  # and larger than at random points


def test_the_remainder_is_of_second_order_and_found_where_it_is() -> None:
    """A tenth of the radius leaves a hundredth; the search finds what random points do not."""
    problem = network()
    u = controls_of(problem)
    small, tiny = (gap_bound(problem, u, r).remainder for r in (1e-2, 1e-3))
    assert small is not None and tiny is not None
    assert small.found == pytest.approx(100 * tiny.found, rel=0.1)
    assert small.bent == pytest.approx(small.found, rel=0.1)
    blind = gap_bound(problem, u, 1e-2, starts=0, steps=0).remainder
    assert blind is not None and 0 < blind.found <= small.found * (1 + 1e-9)


def test_affine_outputs_leave_nothing_out() -> None:
    case = certified.logistic(np.random.default_rng(5), 5)
    proved = gap_bound(case.problem, case.controls, 0.5, affine=True)
    found = gap_bound(case.problem, case.controls, 0.5)
    assert proved.kind is Kind.CONVEX and found.kind is Kind.LINEARISED
    assert found.upper == pytest.approx(proved.upper, rel=1e-9)
    assert found.remainder is not None and found.remainder.value < 1e-12
    assert found.attained == pytest.approx(proved.lower, rel=1e-6)


def test_it_tells_what_is_proved() -> None:
    problem = network()
    text = repr(gap_bound(problem, controls_of(problem), 0.5))
    for told in ("the linearised problem", "an estimate and not a bound", "if the remainder is"):
        assert told in text
    case = exact(0)
    assert "estimate" not in repr(bound(case)) and "<table>" in bound(case)._repr_html_()


# -- mistakes ------------------------------------------------------------------------------------


def test_mistakes_are_named() -> None:
    problem = network()
    u = controls_of(problem)
    ball = {"radius": 1.0}
    for changes, told in (
        ({"radius": 0.0}, "radius is 0.0; expected a positive length"),
        ({"radius": math.inf}, "the radius is infinite"),
        ({"affine": True, **ball}, "not affine in the controls: at a distance of 1"),
        ({"problem": replace(problem, box=Box(-1, 1)), **ball}, "has a box"),
        ({"centre": tuple(c + 9 for c in u), **ball}, "give a ball that holds them"),
        ({"centre": u[:2], **ball}, "expected 4 controls"),
        ({"problem": ControlProblem(Forgetful(), TerminalOnly(), normal(2, seed=1)),
          "controls": (normal(2, seed=1),) * 4, **ball}, "not for Forgetful with TerminalOnly"),
        ({"problem": replace(problem, x0=problem.x0.float()),
          "controls": tuple(c.float() for c in u), **ball}, "float64"),
        ({"controls": tuple(c * math.nan for c in u), **ball}, "not all finite"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=told):
            gap_bound(**({"problem": problem, "controls": u} | changes))  # type: ignore[arg-type]
    g, H = normal(3, seed=1), torch.eye(3, dtype=F64)
    for given, told in (
        ((g, H[:2]), "expected .n,. and .n, n."),
        ((g, SymmetricMatrix(H)), "a floor of the eigenvalues goes with an operator"),
        ((g, H.half()), "give both in float64"),
    ):
        with pytest.raises(InputError, match=told):
            quadratic_gap(*given, 1.0)


def test_token_states_and_steps_without_controls() -> None:
    problem = embedding_problem()
    found = gap_bound(problem, problem.zero_controls(dtype=F64), 0.5)
    # Here the network gains more than its linearisation can, and the remainder covers it.
    assert found.estimate >= found.attained > found.upper >= found.lower > 0
