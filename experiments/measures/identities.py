"""Pontryagin's gradient of a real fine-tuning against automatic differentiation.

The problem is that of `deltacontrol.experiments.setting.Setting.control_problem`, in float64. Along
the costates p_t of controls u, for every stage t,

    ∇_{u_t} H_t(x_t, u_t, p_{t+1}) = ∂J/∂u_t,

whose right-hand side `end_to_end_gradient` takes from the model's own forward pass.
"""

from __future__ import annotations

import torch

from deltacontrol.deltas.dynamics.transformer import TransformerDynamics
from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.errors import InputError


def end_to_end_gradient(problem: ControlProblem, controls: Controls) -> Controls:
    """∂J/∂u_t by automatic differentiation of the model's own forward pass.

    The model's controls are set to ``controls``. This is the reference for the costates: it
    shares the cost with them, but neither the stages nor the backward sweep.

    Raises:
        InputError: the problem is not one of a model with deltas.
    """
    dynamics = problem.dynamics
    if not isinstance(dynamics, TransformerDynamics):
        raise InputError(
            f"the dynamics are {type(dynamics).__name__}; expected those of a model with deltas, "
            "as deltacontrol.deltas.dynamics.transformer.control_problem makes them"
        )
    dynamics.load_controls(controls)
    live = dynamics.live_controls()
    loss = problem.cost.terminal(dynamics.logits())
    for t, u in enumerate(live):
        loss = loss + problem.cost.running(t, dynamics.x0, u)
    parameters = dynamics.delta_model.trainable()
    names = [dynamics.control_names(t) for t in range(dynamics.horizon)]
    flat = [parameters[name] for stage in names for name in stage]
    found = torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True)
    gradients = iter(found)
    return tuple(
        torch.cat([next(gradients).reshape(-1) for _ in stage]) if stage else u.new_zeros(0)
        for stage, u in zip(names, live, strict=True)
    )


def identity_difference(problem: ControlProblem, controls: Controls) -> float:
    """‖∇_u H - ∂J/∂u‖ / ‖∂J/∂u‖ over all stages, at these controls."""
    reference = torch.cat(end_to_end_gradient(problem, controls))
    return float((torch.cat(problem.gradient(controls)) - reference).norm() / reference.norm())


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
