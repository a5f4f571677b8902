"""Systems that are wrong in one place: each turns the verdict of a claim, on a tiny setting.

Every row of `MUTANTS` names what is made wrong and the claim that must notice. A verdict that no
mutant turns would judge nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from deltacontrol.theory.claims import Verdict
from deltacontrol.theory.judging import judge

from .conftest import Tiny

Patch = pytest.MonkeyPatch
CLAIMS = "deltacontrol.experiments.claims"
TWO = {"DELTAS": ("lora:rank=2", "bitfit"), "EXAMPLES": 3, "TOKENS": 6}
FEW = {"EXAMPLES": 3, "TOKENS": 6}


def _by(costate: Callable[[Any], Any], state: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """Controls' gradients from changed costates and at changed states."""

    def mutate(patch: Patch) -> None:
        from deltacontrol.theory.control.problem import ControlProblem

        right = ControlProblem.evaluate

        def evaluate(problem: Any, u: Any) -> Any:
            found, gradient = right(problem, u), []
            costates = [costate(p) if p.is_floating_point() else p for p in found.costates]
            for t, control in enumerate(u):
                x = found.states[t].detach()
                leaf = control.detach().clone().requires_grad_()
                value = problem.hamiltonian(
                    t, state(x) if x.is_floating_point() else x, leaf, costates[t + 1]
                )
                (g,) = torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)
                gradient.append(g)
            return dataclasses.replace(found, gradient=tuple(gradient))

        patch.setattr(ControlProblem, "evaluate", evaluate)
        patch.setattr(ControlProblem, "gradient", lambda p, u: evaluate(p, u).gradient)

    return mutate


def _riccati_without_feedback(patch: Patch) -> None:
    """H_ux = 0 in the recursion: no step reacts to the states before it."""
    from deltacontrol.theory.lq import LQPolicy
    from deltacontrol.theory.solvers import layerwise

    right = layerwise.riccati

    class Blind:
        def __init__(self, policy: LQPolicy) -> None:
            self.policy = policy

        def simulate(self, x0: Any) -> Any:
            found = self.policy.simulate(x0)
            return found._replace(controls=self.policy.feedforward)

    patch.setattr(layerwise, "riccati", lambda *a, **k: Blind(right(*a, **k)))


def _ddp_keeps_its_cross_terms(patch: Patch) -> None:
    from deltacontrol.theory.solvers import quadratic_model

    right = quadratic_model.sweep
    patch.setattr(quadratic_model, "sweep", lambda model, cross=True, **more: right(model, **more))


def _prefix_without_its_gate(patch: Patch) -> None:
    module = import_module(f"{CLAIMS}.10_prefix_gated_adapter")
    right = module._adapter
    patch.setattr(module, "_adapter", lambda c: (right(c)[0], torch.zeros_like(right(c)[1])))


def _gramian_of_exchanged_outputs(patch: Patch) -> None:
    """W with its rows and columns in the reverse order."""
    from deltacontrol.theory.linear.output_map import OutputMap

    right = OutputMap.weighted
    patch.setattr(OutputMap, "weighted", lambda own, part=None: right(own, part).flip(0))


#          what is wrong                       how                                the claim
MUTANTS = {
    "the costate has the wrong sign": (
        _by(lambda p: -p, lambda x: x), "01_costate_gradient", TWO),
    "the state is shifted": (
        _by(lambda p: p, lambda x: x + 1e-3 * x.std()), "01_costate_gradient", TWO),
    "MSA moves along the wrong costate": (
        _by(lambda p: 1.001 * p, lambda x: x), "02_msa_gradient_descent", FEW | {"ITERATIONS": 3}),
    "the cross term is dropped in Riccati": (
        _riccati_without_feedback, "07_gauss_newton_layerwise", {"DAMPINGS": (0.1,)}),
    "the cross term is kept in DDP": (
        _ddp_keeps_its_cross_terms, "05_ddp_backpropagation", {"ITERATIONS": 1}),
    "the prefix has no gate": (
        _prefix_without_its_gate, "10_prefix_gated_adapter",
        FEW | {"LENGTHS": (2,), "SEEDS": (0,)}),
    "the Gramian is transposed": (
        _gramian_of_exchanged_outputs, "19_minimum_energy",
        FEW | {"DELTAS": ("lora:rank=2", "houlsby:bottleneck=4", "bitfit"), "SEEDS": (0, 1),
               "LINEAR_SEEDS": (0, 1), "STEPS": 5}),
}  # fmt: skip


@pytest.mark.parametrize("wrong", MUTANTS)
def test_a_mutant_turns_a_claim(wrong: str, tiny: Tiny, monkeypatch: Patch) -> None:
    mutate, name, constants = MUTANTS[wrong]
    module = tiny(name, **constants)
    held = [part.verdict for part in judge(module.CLAIM).parts]
    assert Verdict.HOLDS in held
    for value in vars(module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    mutate(monkeypatch)
    turned = [part.verdict for part in judge(module.CLAIM).parts]
    assert any(a is Verdict.HOLDS is not b for a, b in zip(held, turned, strict=True))
