"""Claim 1: the gradient of fine-tuning is the control gradient of the Hamiltonian."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

MODEL, TASK = "minilm-l6", "movie"
EXAMPLES, TOKENS = 8, 24
DELTAS = ("lora", "houlsby", "prefix", "prompt", "bitfit")


def _predict() -> dict[str, Any]:
    """Zero: the identity is exact, so only rounding may show."""
    return {"relative_difference": 0.0}


def _problems():
    from deltacontrol.experiments.measures.identities import perturbed
    from deltacontrol.experiments.setting import Setting

    for name in DELTAS:
        setting = Setting(
            MODEL, TASK, deltas=[name], train_rows=EXAMPLES, max_length=TOKENS, dtype="float64"
        )
        problem: Any = setting.control_problem(weight_decay=1e-3)
        # Away from the start, where LoRA's and the adapter's second factors are zero.
        yield name, problem, perturbed(problem.dynamics.controls(), 0.1)


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """Costates against autograd through the model's own forward pass, every delta."""
    from deltacontrol.experiments.measures.identities import identity_difference

    found = {name: identity_difference(problem, u) for name, problem, u in _problems()}
    return Evidence.worst(found, note="MiniLM-L6 in float64, 8 snippets of movie; a case a delta")


def _elsewhere(distance: float) -> dict[str, float]:
    """The same with the costates of controls that are so far away, relatively."""
    import torch

    from deltacontrol.experiments.measures.identities import end_to_end_gradient, perturbed

    found = {}
    for name, problem, u in _problems():
        other = perturbed(u, distance, seed=1) if distance else u
        costates = problem.evaluate(other).costates
        states = problem.rollout(u)
        gradient = []
        for t, control in enumerate(u):
            leaf = control.clone().requires_grad_()
            value = problem.hamiltonian(t, states[t].detach(), leaf, costates[t + 1])
            (found_gradient,) = torch.autograd.grad(
                value, leaf, allow_unused=True, materialize_grads=True
            )
            gradient.append(found_gradient)
        reference = torch.cat(end_to_end_gradient(problem, u))
        found[name] = float((torch.cat(gradient) - reference).norm() / reference.norm())
    return found


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """Costates of another trajectory: the controls they belong to are 1 % away."""
    note = "costates of controls that are 1 % away; the delta that comes closest"
    return Evidence.worst(_elsewhere(0.01), least=True, note=note)


def _passing_control(prediction: Mapping[str, Any]) -> Evidence:
    """The same computation, step by step, with the costates of the controls themselves."""
    return Evidence.worst(_elsewhere(0.0), note="the same sum of steps with the right costates")


CLAIM = Claim(
    id=1,
    name="costate-gradient",
    title="Fine-tuning's gradient is the Hamiltonian's",
    statement="∂J/∂u_t = ∇_u H_t(x_t, u_t, p_{t+1}) along the costates, for every layer and delta",
    source="Bryson & Ho 1975, Section 2.2; Li, Chen, Tai, E, JMLR 18(165), 2018",
    notebook="01_costate_gradient",
    threshold=Threshold(
        "<=", 1e-12, "relative difference to autograd through the whole model, float64"
    ),
    predict=_predict,
    measure=_measure,
    negative_control=_negative_control,
    passing_control=_passing_control,
    on="real model, untrained",
)
