"""Systems that are wrong in one place: each turns the verdict of a claim, on a tiny setting.

Every row of `MUTANTS` names what is made wrong and the claim that must notice. A verdict that no
mutant turns would judge nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

from deltacontrol.experiments.runs.store import RunStore, configuration
from deltacontrol.experiments.runs.sweep import run
from deltacontrol.theory.claims import Verdict
from deltacontrol.theory.judging import judge
from tests import tiny_model

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


def _kernel_of_another_layer(patch: Patch) -> None:
    """The inner products of the second block's gradients in the place of the first one's."""
    from deltacontrol.experiments.measures import kernel_regime

    right = kernel_regime.tangent_kernel

    def wrong(model: Any, parameters: Any, *more: Any) -> Any:
        found = right(model, {n: p for n, p in parameters.items() if ".layers.1." in n}, *more)
        other = {name: name.replace(".layers.0.", ".layers.1.") for name in parameters}
        return dataclasses.replace(found, parts={n: found.parts[m] for n, m in other.items()})

    patch.setattr(kernel_regime, "tangent_kernel", wrong)


def _adjoint_of_reversed_coordinates(patch: Patch) -> None:
    """P' v in the reverse order, which all gradients in a subspace pass."""
    from deltacontrol.theory.dimension.projections.base import _TransposeProduct as Adjoint

    right = Adjoint.forward
    patch.setattr(Adjoint, "forward", staticmethod(lambda v, P: right(v, P).flip(-1)))


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


def turned(
    module: Any,
    mutate: Callable[[Patch], None],
    patch: Patch,
    records: Callable[[], Callable[[Any], Any] | None] = lambda: None,
) -> bool:
    """Whether a part of the claim that holds does so no longer; its runs are run anew."""
    held = [part.verdict for part in judge(module.CLAIM, records()).parts]
    assert Verdict.HOLDS in held
    for value in vars(module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    mutate(patch)
    found = [part.verdict for part in judge(module.CLAIM, records()).parts]
    return any(a is Verdict.HOLDS is not b for a, b in zip(held, found, strict=True))


@pytest.mark.parametrize("wrong", MUTANTS)
def test_a_mutant_turns_a_claim(wrong: str, tiny: Tiny, monkeypatch: Patch) -> None:
    mutate, name, constants = MUTANTS[wrong]
    assert turned(tiny(name, **constants), mutate, monkeypatch)


@pytest.mark.slow
def test_a_kernel_of_the_wrong_layer_turns_claim_13(
    tiny: Tiny, language_model: str, monkeypatch: Patch
) -> None:
    """Steps so small that the margins follow the right kernel, and at a tiny alpha none does."""
    module = tiny(
        "13_tangent_kernel", MODEL=language_model, SEEDS=range(3), SHOTS=4, UNSEEN=4, TOKENS=8,
        RANK=4, STEPS=2, STRETCH=0.05, SHORT=0.01, SMALL=0.02,
    )  # fmt: skip
    monkeypatch.setattr(
        module, "CLAIM", dataclasses.replace(module.CLAIM, parts=module.CLAIM.parts[:1])
    )
    assert turned(module, _kernel_of_another_layer, monkeypatch)


@pytest.mark.slow
def test_a_broken_adjoint_turns_claim_16(tiny: Tiny, tmp_path: Path, monkeypatch: Patch) -> None:
    """Part c alone differentiates through a projection: a and b are solved without gradients.

    The features of the head fall off, so that directions of curvature are not alike.
    """
    from deltacontrol.experiments.studies.threshold import grid
    from deltacontrol.experiments.studies.threshold.measurement import ModelThreshold

    places = tiny_model.write(tmp_path, classes=3)
    model: Any = BertModel.from_pretrained(places["model"])
    with torch.no_grad():
        for value in model.pooler.dense.parameters():
            value /= torch.arange(1.0, 17.0).view(-1, *[1] * (value.ndim - 1))
    model.save_pretrained(places["model"])
    problems = [
        ModelThreshold(
            **places, deltas=("head",), rows=24, max_length=12, targets=(0.9, 0.8), draws=10,
            dimensions=(4, 6, 8, 10, 12), subspaces=6, steps=40, projection="dense", seed=seed,
        )
        for seed in (0, 100, 200, 300)
    ]  # fmt: skip
    monkeypatch.setattr(grid, "experiments", lambda _: problems)
    few = {"LEAST": 0.0, "RESOLUTION": 0.05, "FLAT": 60, "FLAT_SEEDS": range(3), "FLAT_DRAWS": 30}
    module = tiny("16_subspace_threshold", **few)
    part_c = dataclasses.replace(module.CLAIM, parts=module.CLAIM.parts[2:])
    monkeypatch.setattr(module, "CLAIM", part_c)
    folders = iter((tmp_path / "right", tmp_path / "wrong"))

    def records() -> Callable[[Any], Any]:
        store = RunStore(next(folders))
        found = {configuration(e): run(e, store, progress=False) for e in problems}
        return lambda experiment: found[configuration(experiment)]

    assert turned(module, _adjoint_of_reversed_coordinates, monkeypatch, records)
