"""Steering a Transformer's outputs by feedback on its hidden states.

For each example of a batch the remaining layers are linearised along its own forward pass, and a
few outputs z (a logit, a margin between two) are led to a target at the least effort,

    1/2 (z - target)' W (z - target) + r/2 Σ_t ‖u_t‖²,     u_t added to the state x_t.

The exact regulator of that model costs one backward pass for each output
(`deltacontrol.theory.feedback.steering`):

    found = steer(model, batch, margin, target=torch.tensor([4.0]))
    found.initial, found.predicted, found.achieved        # (batch, outputs) each

The outputs of the linear model are ``predicted``; those of the Transformer under the law are
``achieved``. ``rounds > 1`` linearises again along the steered pass (damped Gauss-Newton).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltacontrol.deltas.feedback.laws import Model, StateTaps, attended, in_evaluation_mode, run
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.feedback.steering import OutputSteering

Output = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Steered:
    """What steering did to a batch.

    Attributes:
        law: the feedback law of the last round; `deltacontrol.deltas.feedback.laws.attach_feedback`
        attaches it.
        initial: the outputs without control, (batch, k).
        predicted: what the linear model of the last round promises, (batch, k).
        achieved: the outputs of the model under the law, (batch, k).
        energy: Σ_t ‖u_t‖² of each example, (batch,).
        relative: the largest ‖u_t‖/‖x_t‖ over the sites, of each example, (batch,).
        logits: the model's logits under the law.
    """

    law: OutputSteering
    initial: Tensor
    predicted: Tensor
    achieved: Tensor
    energy: Tensor
    relative: Tensor
    logits: Tensor


def steer(
    model: Model,
    batch: Mapping[str, Any],
    output: Output,
    target: Tensor,
    *,
    weight: float | Tensor = math.inf,
    control_cost: float = 1.0,
    positions: Tensor | None = None,
    site: str = "state",
    rounds: int = 1,
    damping: float = 0.5,
) -> Steered:
    """Steer a batch and report what the outputs became.

    Args:
        model: the model, in evaluation mode, with or without deltas; its examples must not
            interact (no statistics over the batch).
        batch: the model's arguments.
        output: from the logits to the outputs (batch, k), differentiable.
        target: (k,) or (batch, k).
        weight: W; infinity asks for the target exactly.
        control_cost: r.
        positions: where the control may act, (batch, tokens); by default on all tokens of the text.
            Padding is never moved.
        site: which states; see `deltacontrol.deltas.feedback.laws`.
        rounds: linearise so many times.
        damping: how much of the last round's control each later round keeps, in [0, 1).

    Raises:
        InputError: the model is in training mode, a shape does not fit, ``rounds`` is not positive,
            or the outputs do not react to the states.
    """
    in_evaluation_mode(model)
    if rounds < 1:
        raise InputError(f"rounds is {rounds}; expected at least 1.")
    initial, controls, steered = None, None, None
    for _ in range(rounds):
        law, z = _law(
            model, batch, output, target, weight, control_cost, positions, site, controls, damping
        )
        initial = z if initial is None else initial
        steered = _run_under(model, batch, law, site)
        controls = steered[1]
    assert initial is not None and steered is not None
    logits, controls, states = steered
    sizes = [u.flatten(1).norm(dim=1) for u in controls]
    relative = [s / x.flatten(1).norm(dim=1) for s, x in zip(sizes, states, strict=True)]
    return Steered(
        law=law,
        initial=initial,
        predicted=law.predicted,
        achieved=_outputs(output, logits),
        energy=torch.stack(sizes).square().sum(0),
        relative=torch.stack(relative).amax(0),
        logits=logits,
    )


def _law(
    model: Model,
    batch: Mapping[str, Any],
    output: Output,
    target: Tensor,
    weight: float | Tensor,
    control_cost: float,
    positions: Tensor | None,
    site: str,
    controls: list[Tensor] | None,
    damping: float,
) -> tuple[OutputSteering, Tensor]:
    """One forward pass with the present controls, and a backward pass for each output."""
    taps = StateTaps(model, site)
    states: dict[int, Tensor] = {}
    leaves: dict[int, Tensor] = {}

    def add(t: int, x: Tensor) -> Tensor:
        u = torch.zeros_like(x) if controls is None else controls[t].clone()
        states[t], leaves[t] = x.detach(), u.detach().requires_grad_()
        return x + leaves[t]

    taps.put(add)
    try:
        with torch.enable_grad():
            z = _outputs(output, _logits(run(model, batch)))
            steps = range(len(taps.paths))
            missed = [taps.paths[t] for t in steps if t not in leaves]
            if missed:
                raise InputError(f"the forward pass does not reach {', '.join(missed)}.")
            sweeps = [
                torch.autograd.grad(
                    z[:, j].sum(),
                    [leaves[t] for t in steps],
                    retain_graph=j + 1 < z.shape[1],
                    allow_unused=True,
                    materialize_grads=True,
                )
                for j in range(z.shape[1])
            ]
    finally:
        taps.remove()
    law = OutputSteering.of(
        [torch.stack([sweep[t] for sweep in sweeps], dim=1) for t in steps],
        [states[t] for t in steps],
        z.detach(),
        target.to(z),
        weight=weight,
        control_cost=control_cost,
        masks=[_mask(batch, positions, states[t]) for t in steps],
        controls=controls,
        damping=0.0 if controls is None else damping,
    )
    return law, z.detach()


def _mask(batch: Mapping[str, Any], positions: Tensor | None, state: Tensor) -> Tensor:
    mask = attended(batch, state)
    if positions is not None:
        if positions.shape != mask.shape:
            raise InputError(
                f"positions has shape {tuple(positions.shape)}; expected {tuple(mask.shape)}, one "
                "entry for each token."
            )
        mask = mask & positions.bool()
    return mask.unsqueeze(-1)


def _run_under(
    model: Model, batch: Mapping[str, Any], law: OutputSteering, site: str
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits, controls and states of a pass under the law."""
    states: list[Tensor] = []
    controls: list[Tensor] = []

    def correct(t: int, x: Tensor) -> Tensor:
        u = law.correction(t, x)
        assert u is not None
        states.append(x)
        controls.append(u)
        return x + u

    taps = StateTaps(model, site)
    taps.put(correct)
    try:
        with torch.no_grad():
            logits = _logits(run(model, batch))
    finally:
        taps.remove()
    return logits, controls, states


def _logits(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


def _outputs(output: Output, logits: Tensor) -> Tensor:
    z = output(logits)
    if z.ndim != 2 or len(z) != len(logits):
        raise InputError(
            f"the outputs have shape {tuple(z.shape)}; expected (batch, k) = ({len(logits)}, k): "
            "index the logits so that the examples stay first, such as logits[:, 1:2]."
        )
    return z
