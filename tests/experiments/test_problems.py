"""Pontryagin's identities on the real pre-trained model, in float64."""

from typing import Any

import pytest
import torch

from deltacontrol.experiments.measures.identities import (
    end_to_end_gradient,
    identity_difference,
    perturbed,
)
from deltacontrol.experiments.setting import Setting
from deltacontrol.experiments.studies.pontryagin.trace import PontryaginTrace
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers import MSA, solve

DELTAS = ["lora", "prefix"]
DELTAS += [pytest.param(n, marks=pytest.mark.slow) for n in ("houlsby", "prompt", "bitfit")]


def problem_of(model: str, name: str, weight_decay: float = 0.0) -> Any:
    setting = Setting(model, "movie", deltas=[name], train_rows=2, max_length=8, dtype="float64")
    return setting.control_problem(weight_decay=weight_decay)


@pytest.mark.parametrize("name", DELTAS)
@pytest.mark.one_in(2)
def test_costates_give_the_gradient_of_the_real_model(minilm_l6: str, name: str) -> None:
    problem = problem_of(minilm_l6, name, weight_decay=1e-3)
    controls = perturbed(problem.dynamics.controls(), 0.1)
    assert problem.dynamics.replay_error == 0.0
    assert identity_difference(problem, controls) <= 1e-12
    stale = problem.gradient(perturbed(controls, 0.01, seed=1))
    exact = torch.cat(end_to_end_gradient(problem, controls))
    assert (torch.cat(stale) - exact).norm() / exact.norm() > 1e-6


@pytest.mark.slow
def test_msa_with_a_gradient_step_is_gradient_descent_on_the_real_model(minilm_l6: str) -> None:
    problem = problem_of(minilm_l6, "lora")
    start = perturbed(problem.dynamics.controls(), 0.1)
    iterates: list[torch.Tensor] = []
    solve(
        problem,
        MSA(0.05),
        start,
        max_steps=3,
        tol=0.0,
        callback=lambda iterate: iterates.append(torch.cat(iterate.controls)),
    )
    descent = start
    for found in iterates:
        expected = torch.cat(descent)
        assert (found - expected).norm() <= 1e-12 * expected.norm()
        gradient = end_to_end_gradient(problem, descent)
        descent = tuple(u - 0.05 * g for u, g in zip(descent, gradient, strict=True))


@pytest.mark.parametrize("optimiser", ["lbfgs", pytest.param("adamw", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_trace_records_every_stage(minilm_l6: str, tmp_path, optimiser: str) -> None:
    from deltacontrol.experiments.runs.experiment import Workspace

    trace = PontryaginTrace(
        model=minilm_l6, optimiser=optimiser, num_examples=2, max_length=6, steps=3
    )
    outcome = trace.execute(Workspace(tmp_path, progress=False))
    curve = outcome.curve
    assert list(curve["iteration"]) == [0, 1, 2, 3]
    squares = sum(curve[f"residual_{name}"] ** 2 for name in outcome.result["stages"])
    assert (squares**0.5 - curve["residual"]).abs().max() <= 1e-12
    assert curve["objective"].iloc[-1] < curve["objective"].iloc[0]
    assert outcome.result["identity_relative_difference"] <= 1e-12
    assert outcome.result["status"] == "max_steps"


def test_wrong_traces_are_refused() -> None:
    with pytest.raises(InputError, match="nearest: lbfgs"):
        PontryaginTrace(optimiser="lbfg")
    with pytest.raises(InputError, match="at least 1"):
        PontryaginTrace(num_examples=0)
