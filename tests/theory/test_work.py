"""The count of work, and its place in a solve's history."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltacontrol.theory.control.work import metered
from deltacontrol.theory.linear.linearisation import Linearisation
from deltacontrol.theory.solvers import MSA, Iterate, solve
from tests.theory.problems import residual_network


def test_what_a_rollout_a_gradient_and_products_count() -> None:
    problem = residual_network()
    u, horizon = problem.zero_controls(), problem.dynamics.horizon
    with metered() as outer:
        with metered() as meter:
            problem.rollout(u)
        assert meter.steps == horizon
        with metered() as meter:
            problem.evaluate(u)
        assert meter.steps == 2 * horizon
        with metered() as meter:
            lin = Linearisation.of(problem, u)
            lin.adjoint(lin.tangent(u)[-1])
        assert meter.steps == 3 * horizon
    assert outer.steps == 6 * horizon
    problem.rollout(u)
    assert outer.steps == 6 * horizon


def test_history_counts_two_sweeps_a_gradient_also_across_an_interrupt(tmp_path: Path) -> None:
    problem, checkpoint = residual_network(), tmp_path / "solve.safetensors"
    start = problem.zero_controls()

    def interrupt(iterate: Iterate) -> None:
        if iterate.iteration == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(
            problem,
            MSA(0.1),
            start,
            max_steps=5,
            tol=0.0,
            callback=interrupt,
            checkpoint=checkpoint,
        )
    solution = solve(problem, MSA(0.1), start, max_steps=5, tol=0.0, checkpoint=checkpoint)
    assert solution.history["sweeps"].tolist() == pytest.approx([2, 4, 6, 8, 10, 12])
