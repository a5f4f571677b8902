"""Problems whose states have several parts, and their gradients end to end."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from torch import Tensor

from deltacontrol.deltas import DeltaModel
from deltacontrol.deltas.dynamics.transformer import TransformerDynamics
from deltacontrol.theory.control.costs import SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem
from tests.deltas.zoo import gradients

Build = Callable[..., hf.PreTrainedModel]
TWO_AND_TWO = {
    "t5-seq2seq": {"num_layers": 2, "num_decoder_layers": 2},
    "bart": {"encoder_layers": 2, "decoder_layers": 2},
}
# What cannot even be attached, and why.
REFUSED = {
    ("t5-seq2seq", "bitfit"): "has no bias",
    ("t5-seq2seq", "head"): "lm_head.weight is tied to shared.weight",
    ("t5-seq2seq", "ladder"): "has two stacks of blocks",
    ("bart", "ladder"): "has two stacks of blocks",
}


def model_of(build: Build, family: str) -> hf.PreTrainedModel:
    return build(family, **TWO_AND_TWO.get(family, {}))


def problem_of(controlled: DeltaModel, batch: dict[str, Tensor]) -> ControlProblem:
    """The squared distance of the logits to a target."""
    dynamics = TransformerDynamics(controlled, batch)
    shape = dynamics.logits().shape
    target = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return ControlProblem(dynamics, SquaredErrorCost(target), dynamics.x0)


def end_to_end(controlled: DeltaModel, problem: ControlProblem) -> list[Tensor]:
    """The gradient by autograd through the model's own forward pass, in the order of the stages."""
    dynamics = problem.dynamics
    loss = problem.cost.terminal(dynamics.logits())
    trained = controlled.trainable()
    found = dict(zip(trained, gradients(loss, trained.values()), strict=True))
    return [found[n] for t in range(dynamics.horizon) for n in dynamics.control_names(t)]
