"""Extended MSA on whole Transformers, whose attention it differentiates twice."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedModel

from deltacontrol.deltas import LoRA, attach
from deltacontrol.deltas.dynamics.transformer import control_problem
from deltacontrol.theory.solvers import solve
from deltacontrol.theory.solvers.emsa import ExtendedMSA, step_change
from deltacontrol.theory.solvers.minimisers import InnerLBFGS
from tests.deltas.zoo import batch_of, move

Build = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("family", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("attention", [pytest.param("eager", marks=pytest.mark.slow), "sdpa"])
def test_it_lowers_the_loss_of_lora(build: Build, family: str, attention: str) -> None:
    model = build(family, attention=attention)
    batch = batch_of(model) | {"labels": torch.tensor([0, 1, 0])}
    controlled = move(attach(model, LoRA(rank=2)))
    problem = control_problem(controlled, batch, weight_decay=1e-2)
    u = problem.dynamics.controls()
    assert all(map(torch.equal, problem.initial_controls(), u))
    solution = solve(problem, ExtendedMSA(1.0, InnerLBFGS(3)), u, max_steps=4, tol=1e-9)
    history = solution.history["objective"].tolist()
    assert len(history) == 5 and all(b < a for a, b in pairwise(history))
    now = problem.evaluate(u)
    for t, u_t in enumerate(u):
        x, p = now.states[t], now.costates[t + 1]
        change = step_change(problem, t, x, p, u_t, u_t)
        assert float(change.squares) == 0.0 and float(change.hamiltonian) == 0.0
        if not u_t.numel():
            continue
        leaf = u_t.clone().requires_grad_()
        change = step_change(problem, t, x, p, u_t, leaf)
        (gradient,) = torch.autograd.grad(change.hamiltonian + change.squares, leaf)
        # The squares are flat here, so that the gradient is that of the Hamiltonian, and of J.
        torch.testing.assert_close(gradient, now.gradient[t], rtol=1e-9, atol=1e-12)
    controlled.detach()
