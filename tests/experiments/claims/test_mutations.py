"""Systems that are wrong in one place: each turns the verdict of a claim, on a tiny setting.

The table of mutants is the list below. A claim whose verdict no mutant turns would judge nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deltacontrol.theory.claims import Verdict
from deltacontrol.theory.judging import Outcome, judge

from .conftest import Tiny

Patch = pytest.MonkeyPatch
FEW = {"EXAMPLES": 3, "TOKENS": 6}
DELTAS = ("lora:rank=2", "bitfit")


def _wrong_costate_sign(patch: Patch) -> None:
    from deltacontrol.theory.control.problem import ControlProblem

    right = ControlProblem.evaluate

    def evaluate(problem: Any, u: Any) -> Any:
        import dataclasses

        found = right(problem, u)
        flipped = [-p if p.is_floating_point() else p for p in found.costates]
        gradient = []
        for t, control in enumerate(u):
            leaf = control.detach().clone().requires_grad_()
            value = problem.hamiltonian(t, found.states[t].detach(), leaf, flipped[t + 1])
            (g,) = torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)
            gradient.append(g)
        return dataclasses.replace(found, costates=flipped, gradient=tuple(gradient))

    patch.setattr(ControlProblem, "evaluate", evaluate)
    patch.setattr(ControlProblem, "gradient", lambda problem, u: evaluate(problem, u).gradient)


def _shifted_state(patch: Patch) -> None:
    from deltacontrol.theory.control.problem import ControlProblem

    right = ControlProblem.hamiltonian

    def hamiltonian(problem: Any, t: int, x: Any, u: Any, p: Any) -> Any:
        moved = x + 1e-3 * x.std() if x.is_floating_point() else x
        return right(problem, t, moved, u, p)

    patch.setattr(ControlProblem, "hamiltonian", hamiltonian)


def _cross_term_dropped_in_riccati(patch: Patch) -> None:
    from deltacontrol.theory.solvers import layerwise

    right = layerwise.riccati
    patch.setattr(
        layerwise, "riccati", lambda A, B, Q, R, Qf, N=None, **more: right(A, B, Q, R, Qf, **more)
    )


def _prefix_gate_dropped(patch: Patch) -> None:
    from importlib import import_module

    module = import_module("deltacontrol.experiments.claims.10_prefix_gated_adapter")
    right = module._adapter

    def adapter(controlled: Any) -> Any:
        change, gate = right(controlled)
        return change, torch.zeros_like(gate)

    patch.setattr(module, "_adapter", adapter)


def _wrong_linear_adjoint(patch: Patch) -> None:
    from deltacontrol.theory.linear.linearisation import Linearisation

    right = Linearisation.adjoint_step

    def adjoint_step(linear: Any, t: int, q: Any) -> Any:
        state, control = right(linear, t, q)
        return 0.99 * state, control

    patch.setattr(Linearisation, "adjoint_step", adjoint_step)
