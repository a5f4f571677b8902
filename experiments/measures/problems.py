"""A fine-tuning on fixed examples as one deterministic optimal-control problem.

    J(u) = mean loss of the examples + λ/2 Σ_t ‖u_t‖²

in float64 and without dropout, on a packaged or local model and a task's first training rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deltacontrol.deltas import Delta, HeadTuning, attach
from deltacontrol.deltas.dynamics.transformer import TransformerDynamics, control_problem
from deltacontrol.experiments import models, tasks
from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from deltacontrol.deltas.model import DeltaModel


@dataclass(frozen=True, eq=False)
class FixedProblem:
    """The problem, and the model that it is made of.

    Attributes:
        problem: the control problem; its dynamics act on ``controlled``.
        controlled: the model with its controls.
    """

    problem: ControlProblem
    controlled: DeltaModel

    @property
    def dynamics(self) -> TransformerDynamics:
        """The problem's dynamics."""
        dynamics = self.problem.dynamics
        assert isinstance(dynamics, TransformerDynamics)
        return dynamics

    def end_to_end_gradient(self, controls: Controls) -> Controls:
        """∂J/∂u_t by automatic differentiation of the model's own forward pass.

        The model's controls are set to ``controls``. This is the reference for the costates: it
        shares the cost with them, but neither the stages nor the backward sweep.
        """
        dynamics = self.dynamics
        dynamics.load_controls(controls)
        live = dynamics.live_controls()
        loss = self.problem.cost.terminal(dynamics.logits())
        for t, u in enumerate(live):
            loss = loss + self.problem.cost.running(t, dynamics.x0, u)
        parameters = self.controlled.trainable()
        names = [dynamics.control_names(t) for t in range(dynamics.horizon)]
        flat = [parameters[name] for stage in names for name in stage]
        found = torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True)
        gradients = iter(found)
        return tuple(
            torch.cat([next(gradients).reshape(-1) for _ in stage]) if stage else u.new_zeros(0)
            for stage, u in zip(names, live, strict=True)
        )

    def identity_difference(self, controls: Controls) -> float:
        """‖∇_u H - ∂J/∂u‖ / ‖∂J/∂u‖ over all stages, at these controls."""
        reference = torch.cat(self.end_to_end_gradient(controls))
        return float((torch.cat(self.problem.gradient(controls)) - reference).norm()
                     / reference.norm())  # fmt: skip


def fixed_problem(
    deltas: Sequence[Delta],
    *,
    model: str = "minilm-l6",
    task: str = "movie",
    num_examples: int = 8,
    max_length: int = 24,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> FixedProblem:
    """Attach deltas, and the head where none trains it, and take a task's first training rows.

    Args:
        deltas: what acts on the model.
        model: as in `deltacontrol.experiments.models.load`.
        task: a classification task.
        num_examples: how many rows.
        max_length: tokens of a row at most.
        weight_decay: λ.
        seed: of the head and the controls.

    Raises:
        InputError: the task is no classification, or what loading and attaching raise.
    """
    data = tasks.load(task)
    if data.kind != "classification":
        raise InputError(f"{task} is a {data.kind} task; expected a classification.")
    base, tokenizer = models.load(
        model, kind="classification", num_labels=len(data.labels), seed=seed, dtype="float64"
    )
    head = () if any(delta.trains_head for delta in deltas) else (HeadTuning(),)
    controlled = attach(base, *deltas, *head, seed=seed)
    rows = data.train.head(num_examples)
    batch = tokenizer(
        list(rows["text"]),
        truncation=True,
        max_length=max_length,
        padding=True,
        return_tensors="pt",
    )
    labels = torch.tensor(rows["label"].to_numpy())
    problem = control_problem(controlled, {**batch, "labels": labels}, weight_decay=weight_decay)
    return FixedProblem(problem, controlled)


def perturbed(controls: Controls, relative: float, seed: int = 0) -> Controls:
    """The controls with Gaussian noise of the relative size given, per stage.

    A stage that is zero gets noise of standard deviation ``relative``.
    """
    generator = torch.Generator().manual_seed(seed)
    noisy = []
    for u in controls:
        scale = float(u.square().mean().sqrt()) if u.numel() else 0.0
        noise = torch.randn(u.shape, generator=generator, dtype=u.dtype).to(u.device)
        noisy.append(u + relative * (scale or 1.0) * noise)
    return tuple(noisy)
