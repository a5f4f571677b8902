"""Pontryagin's identities on the real pre-trained model, in float64."""

import pytest
import torch

from deltacontrol.deltas import parse
from deltacontrol.experiments.measures.problems import fixed_problem, perturbed
from deltacontrol.experiments.studies.pontryagin.trace import PontryaginTrace
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers import MSA, solve

DELTAS = ("lora", "houlsby", "prefix", "prompt", "bitfit")


@pytest.mark.parametrize("name", DELTAS)
def test_costates_give_the_gradient_of_the_real_model(minilm_l6: str, name: str) -> None:
    fixed = fixed_problem(
        (parse(name),), model=minilm_l6, num_examples=2, max_length=8, weight_decay=1e-3
    )
    controls = perturbed(fixed.dynamics.controls(), 0.1)
    assert fixed.dynamics.replay_error == 0.0
    assert fixed.identity_difference(controls) <= 1e-12
    stale = fixed.problem.gradient(perturbed(controls, 0.01, seed=1))
    exact = torch.cat(fixed.end_to_end_gradient(controls))
    assert (torch.cat(stale) - exact).norm() / exact.norm() > 1e-6


def test_msa_with_a_gradient_step_is_gradient_descent_on_the_real_model(minilm_l6: str) -> None:
    fixed = fixed_problem((parse("lora"),), model=minilm_l6, num_examples=2, max_length=8)
    start = perturbed(fixed.dynamics.controls(), 0.1)
    iterates: list[torch.Tensor] = []
    solve(
        fixed.problem,
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
        gradient = fixed.end_to_end_gradient(descent)
        descent = tuple(u - 0.05 * g for u, g in zip(descent, gradient, strict=True))


@pytest.mark.parametrize("optimiser", ["lbfgs", "adamw"])
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
