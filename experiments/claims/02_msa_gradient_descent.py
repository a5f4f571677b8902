"""Claim 2: the method of successive approximations with a gradient step is gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltacontrol.theory.claims import Claim, Evidence, Threshold

MODEL, TASK = "minilm-l6", "movie"
EXAMPLES, TOKENS = 6, 20
ITERATIONS = 20
STEP_SIZE = 0.1


def _problem() -> tuple[Any, Any]:
    from deltacontrol.experiments.measures.identities import perturbed
    from deltacontrol.experiments.setting import Setting

    setting = Setting(
        MODEL, TASK, deltas=["lora:rank=8"], train_rows=EXAMPLES, max_length=TOKENS,
        dtype="float64",
    )  # fmt: skip
    problem: Any = setting.control_problem(weight_decay=1e-3)
    return problem, perturbed(problem.dynamics.controls(), 0.1)


def _gradient_descent(problem: Any, start: Any) -> list[Any]:
    """torch.optim.SGD on the model's own parameters, loss by its own forward pass."""
    import torch

    dynamics = problem.dynamics
    dynamics.load_controls(start)
    optimiser = torch.optim.SGD(dynamics.delta_model.controls.parameters(), lr=STEP_SIZE)
    iterates = [dynamics.controls()]
    for _ in range(ITERATIONS):
        optimiser.zero_grad()
        loss = problem.cost.terminal(dynamics.logits())
        for t, u in enumerate(dynamics.live_controls()):
            loss = loss + problem.cost.running(t, dynamics.x0, u)
        loss.backward()
        optimiser.step()
        iterates.append(dynamics.controls())
    return iterates


def _distances(first: list[Any], second: list[Any]) -> tuple[dict[str, float], float]:
    """The relative distance of each iterate after the start, and how far the controls moved."""
    import torch

    pairs = [(torch.cat(a), torch.cat(b)) for a, b in zip(first, second, strict=True)]
    found = {f"iterate {i}": float((a - b).norm() / b.norm()) for i, (a, b) in enumerate(pairs)}
    del found["iterate 0"]  # the start is the same by construction
    return found, float((pairs[-1][1] - pairs[0][1]).norm() / pairs[0][1].norm())


def _measure(prediction: Mapping[str, Any]) -> Evidence:
    """MSA by costates against SGD by autograd, all iterates."""
    from deltacontrol.theory.solvers import MSA, solve

    problem, start = _problem()
    iterates: list[Any] = []
    solution = solve(
        problem,
        MSA(STEP_SIZE),
        start,
        max_steps=ITERATIONS,
        tol=0.0,
        callback=lambda iterate: iterates.append(iterate.controls),
    )
    found, moved = _distances(iterates, _gradient_descent(problem, start))
    history = solution.history["objective"].tolist()
    return Evidence.worst(
        found,
        details={"moved": moved, "objective_start": history[0], "objective_end": history[-1]},
        assumptions={"the controls move, so that iterates can differ": moved > 1e-6},
        note="MiniLM-L6 with LoRA in float64, 6 snippets of movie; a case an iterate",
    )


def _layer_by_layer(share: float) -> tuple[dict[str, float], float]:
    """Distances to gradient descent of updates that are made one layer after the other.

    The states that a layer sees are those of earlier layers whose updates were made to this share,
    the costates are those of the controls before any update.
    """
    import torch

    problem, start = _problem()
    controls = list(start)
    iterates = [tuple(controls)]
    for _ in range(ITERATIONS):
        costates = problem.evaluate(tuple(controls)).costates
        x = problem.x0
        for t, control in enumerate(controls):
            leaf = control.clone().requires_grad_()
            value = problem.hamiltonian(t, x, leaf, costates[t + 1])
            (gradient,) = torch.autograd.grad(
                value, leaf, allow_unused=True, materialize_grads=True
            )
            controls[t] = control - STEP_SIZE * gradient
            with torch.no_grad():
                x = problem.dynamics.step(t, x, control + share * (controls[t] - control))
        iterates.append(tuple(controls))
    return _distances(iterates, _gradient_descent(problem, start))


def _negative_control(prediction: Mapping[str, Any]) -> Evidence:
    """Not along one trajectory: a layer sees states that the earlier layers' updates changed."""
    found, moved = _layer_by_layer(1.0)
    note = "states of the updated controls, costates of the old ones; the closest iterate"
    return Evidence.worst(found, least=True, details={"moved": moved}, note=note)


def _passing_control(prediction: Mapping[str, Any]) -> Evidence:
    """The same loop over the layers, along the states of the controls before the update."""
    found, moved = _layer_by_layer(0.0)
    note = "the same loop, along the states of the old controls"
    return Evidence.worst(found, details={"moved": moved}, note=note)


CLAIM = Claim(
    id=2,
    name="msa-gradient-descent",
    title="MSA with a gradient step is gradient descent",
    statement=(
        "u_t ← u_t - η ∇_u H_t along one trajectory gives the iterates of gradient descent on J"
    ),
    source="Li, Chen, Tai, E, JMLR 18(165), 2018, Section 3",
    notebook="02_msa_gradient_descent",
    threshold=Threshold("<=", 1e-12, "largest relative distance of the iterates, float64"),
    predict=dict,
    measure=_measure,
    negative_control=_negative_control,
    passing_control=_passing_control,
    on="real model, untrained",
)
