"""The blocks of a Transformer in continuous depth."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from deltacontrol.deltas import LoRA, attach
from deltacontrol.deltas.dynamics.transformer import TransformerDynamics
from deltacontrol.theory.control.costs import SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.systems import Segment
from deltacontrol.theory.depth.continuous import ContinuousDepth
from deltacontrol.theory.errors import InputError
from tests.deltas.zoo import batch_of, move

Build = Callable[..., PreTrainedModel]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["constant", pytest.param("linear", marks=pytest.mark.slow)])
def test_refined_blocks_tend_to_the_adjoint_of_the_differential_equation(
    build: Build, weights
) -> None:
    model = build("bert")
    batch = batch_of(model)
    controlled = move(attach(model, LoRA(rank=2)))
    whole = TransformerDynamics(controlled, batch)
    u = whole.controls()
    with torch.no_grad():
        states = ControlProblem(whole, SquaredErrorCost(torch.zeros(1)), whole.x0).rollout(u)
    blocks = Segment(whole, 1, whole.horizon - 1)
    x0, inner = states[1], u[1:-1]
    cost = SquaredErrorCost(torch.zeros_like(x0))
    depth = ContinuousDepth(blocks, weights=weights, rtol=1e-7, atol=1e-9)
    limit = depth.evaluate(cost, x0, inner)
    errors = []
    for factor in (8, 16):
        refined = depth.refine(factor, "midpoint")
        problem = ControlProblem(refined, refined.cost(cost), x0)
        found = problem.evaluate(refined.lift(inner))
        pairs = (
            (found.states[-1], limit.states[-1]),
            (found.costates[0], limit.costates[0]),
            (torch.cat(refined.restrict(found.gradient)), torch.cat(limit.gradient)),
        )
        errors.append([float((a - b).norm() / b.norm()) for a, b in pairs])
    controlled.detach()
    for coarse, fine in zip(*errors, strict=True):
        assert 3.3 < coarse / fine < 4.7, errors  # order 2, hence the same limit


def test_the_input_and_the_readout_are_refused(build: Build) -> None:
    model = build("bert")
    controlled = attach(model, LoRA(rank=2))
    dynamics = TransformerDynamics(controlled, batch_of(model))
    u = dynamics.controls()
    with pytest.raises(InputError, match="take the Segment of"):
        ContinuousDepth(dynamics).rollout(dynamics.x0, u)
    last = dynamics.horizon - 1
    with torch.no_grad():
        x = ControlProblem(dynamics, SquaredErrorCost(torch.zeros(1)), dynamics.x0).rollout(u)[last]
    with pytest.raises(InputError, match="step 0 maps a state of shape"):
        ContinuousDepth(Segment(dynamics, last)).rollout(x, u[last:])
    controlled.detach()
