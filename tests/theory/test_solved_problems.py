"""The problems that a solver's author is given: each answer is optimal, to full precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from deltacontrol.theory.control.problem import Controls
from deltacontrol.theory.control.solved_problems import PROBLEMS, KnownProblem, exact_problems
from tests.theory.dense import flat, hessian, kkt

EXACT = list(exact_problems(box=True))
each = pytest.mark.parametrize("known", EXACT, ids=lambda known: known.name)


def answer(known: KnownProblem) -> Controls:
    assert known.exact is not None
    return known.exact()


@each
def test_the_answer_is_stationary(known: KnownProblem) -> None:
    assert known.make().residual(answer(known)).norm <= 1e-13


@each
def test_the_answer_is_a_strict_minimum_among_the_controls_that_are_allowed(
    known: KnownProblem,
) -> None:
    """Random directions, back into the box: ``J`` rises along each, with its curvature."""
    problem, exact = known.make(), answer(known)
    least = float(problem.objective(exact))
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(5):
            near = tuple(
                u + size * torch.randn(u.shape, generator=generator, dtype=u.dtype) for u in exact
            )
            near = near if problem.box is None else problem.box.project(near)
            assert float(problem.objective(near)) > least


@each
def test_it_is_strongly_convex_where_it_says_so(known: KnownProblem) -> None:
    curvature = torch.linalg.eigvalsh(hessian(known.make(), answer(known)))
    assert (float(curvature[0]) > 1e-3) == known.strongly_convex


@pytest.mark.parametrize(
    "known", list(exact_problems(linear_quadratic=True)), ids=lambda known: known.name
)
def test_linear_quadratic_answers_equal_the_dense_kkt_system(known: KnownProblem) -> None:
    reference, _ = kkt(known.make(), known.per_example)
    assert known.error(reference) <= 1e-12


@each
def test_it_is_the_same_each_time_and_says_where_the_answer_is_from(known: KnownProblem) -> None:
    assert all(map(torch.equal, answer(known), answer(known)))
    assert torch.equal(known.make().x0, known.make().x0)
    assert known.formula and known.source


def test_the_error_is_relative_and_needs_an_answer() -> None:
    known = EXACT[0]
    exact = answer(known)
    assert known.error(exact) == 0.0
    assert known.error(tuple(1.5 * u for u in exact)) == pytest.approx(0.5, rel=1e-15)
    unknown = next(p for p in PROBLEMS if p.exact is None)
    with pytest.raises(ValueError, match="not known"):
        unknown.error(unknown.start(unknown.make()))


def test_the_choice_of_problems() -> None:
    names = {known.name for known in exact_problems()}
    assert names == {known.name for known in EXACT} - {"scalar-box"}
    assert all(known.linear_quadratic for known in exact_problems(linear_quadratic=True))
    assert len({known.name for known in PROBLEMS}) == len(PROBLEMS)
    assert {known.name for known in EXACT} == {p.name for p in PROBLEMS if p.exact is not None}


def test_the_start_is_random_only_on_request() -> None:
    known = EXACT[0]
    problem = known.make()
    assert not flat(known.start(problem)).any()
    assert flat(known.start(problem, 0.5)).all()
    other = dataclasses.replace(known, per_example=True)
    assert other.start(next(p for p in PROBLEMS if p.name == "varying-batch").make())[0].ndim == 2
