"""Solvers on Transformers: tiny ones of random weights, and MiniLM's real blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from deltacontrol.deltas import DeltaModel, HeadTuning, LoRA, attach
from deltacontrol.deltas.dynamics.transformer import TransformerDynamics, control_problem
from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.solvers import (
    DDP,
    ILQR,
    GaussNewton,
    NewtonCG,
    Shooting,
    Solver,
    Status,
    solve,
)
from tests.deltas.zoo import batch_of, move

Build = Callable[..., PreTrainedModel]


def end_to_end_residual(controlled: DeltaModel, problem: ControlProblem, u: Controls) -> float:
    """The norm of the gradient by autograd through the model's own forward pass."""
    dynamics = problem.dynamics
    assert isinstance(dynamics, TransformerDynamics)
    dynamics.load_controls(u)
    loss = problem.cost.terminal(dynamics.logits())
    for t, control in enumerate(dynamics.live_controls()):
        loss = loss + problem.cost.running(t, dynamics.x0, control)
    found = torch.autograd.grad(loss, list(controlled.trainable().values()))
    return float(torch.cat([g.reshape(-1) for g in found]).norm())


@pytest.mark.parametrize(
    ("family", "solver", "converges"),
    [
        pytest.param("bert", NewtonCG(), True, id="bert-newton-cg", marks=pytest.mark.slow),
        pytest.param("bert", DDP(), True, id="bert-ddp", marks=pytest.mark.slow),
        pytest.param("gpt2", GaussNewton(), False, id="gpt2-gauss-newton", marks=pytest.mark.slow),
        pytest.param("gpt2", NewtonCG(), True, id="gpt2-newton-cg", marks=pytest.mark.slow),
        pytest.param("gpt2", DDP(), True, id="gpt2-ddp", marks=pytest.mark.slow),
        pytest.param("bert", GaussNewton(), False, id="bert-gauss-newton", marks=pytest.mark.slow),
        pytest.param("bert", ILQR(), False, id="bert-ilqr", marks=pytest.mark.slow),
        pytest.param("gpt2", ILQR(), False, id="gpt2-ilqr", marks=pytest.mark.slow),
    ],
)
def test_lora_on_a_tiny_transformer(
    build: Build, family: str, solver: Solver, converges: bool
) -> None:
    """From where L-BFGS is near an optimum; the methods without second derivatives only descend."""
    model = build(family)
    controlled = move(attach(model, LoRA(rank=1), HeadTuning()))
    batch = batch_of(model) | {"labels": torch.tensor([0, 1, 1])}
    problem = control_problem(controlled, batch, weight_decay=0.02)
    near = solve(problem, Shooting(), problem.dynamics.controls(), max_steps=999, tol=1e-4)
    solution = solve(problem, solver, near.controls, max_steps=12, tol=1e-9)
    residual = end_to_end_residual(controlled, problem, solution.controls)
    controlled.detach()
    assert near.status is Status.CONVERGED, near.message
    assert (solution.status is Status.CONVERGED) or not converges, solution.message
    assert residual == pytest.approx(solution.residual.norm, rel=1e-6, abs=1e-12)
    assert solution.objective <= near.objective


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "converges"), [(GaussNewton(), False), (NewtonCG(), True)], ids=["GN", "Newton"]
)
def test_lora_on_real_blocks(minilm_l6: str, solver: Solver, converges: bool) -> None:
    """Nearly separated examples have little Gauss-Newton curvature, so that GN only descends."""
    from deltacontrol.experiments.measures.identities import end_to_end_gradient
    from deltacontrol.experiments.setting import Setting

    setting = Setting(
        minilm_l6, "movie", deltas=[LoRA(rank=4)], train_rows=4, max_length=12, dtype="float64"
    )
    problem = setting.control_problem(weight_decay=1e-2)
    start = problem.dynamics.controls()  # type: ignore[attr-defined]
    solution = solve(problem, solver, start, max_steps=60, tol=1e-6)
    expected = Status.CONVERGED if converges else Status.MAX_STEPS
    assert solution.status is expected, solution.message
    assert solution.objective < 0.1 * float(problem.objective(start))
    reference = torch.cat(end_to_end_gradient(problem, solution.controls)).norm()
    assert float(reference) == pytest.approx(solution.residual.norm, rel=1e-3, abs=1e-10)
