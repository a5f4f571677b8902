"""Claim 27 on a tiny setting, and expansions with which it is false."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.reduced import AffineDynamics, ReducedDynamics
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.judging import judge

from .conftest import Tiny

SMALL = {"HEAD_ROWS": 64, "EXAMPLES": 3}


def test_claim_27_holds_with_cross_terms_alone(tiny: Tiny) -> None:
    module = tiny("27_riccati_response", **SMALL)
    outcome = judge(replace(module.CLAIM, parts=module.CLAIM.parts[:1]))
    assert outcome.holds
    part = outcome.part("a")
    assert part.evidence.assumption_met and part.evidence.value < 0.1 < part.control.value
    assert part.passing is not None and part.passing.value < 0.01


def test_claim_27_sees_an_expansion_elsewhere(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny("27_riccati_response", **SMALL)
    right = module._expanded

    def elsewhere(problem: ControlProblem, controls: tuple[torch.Tensor, ...]) -> object:
        other = right(problem, tuple(0.5 * u for u in controls))
        return replace(right(problem, controls), model=other.model)

    monkeypatch.setattr(module, "_expanded", elsewhere)
    evidence = module._at_the_radius(cross=True)
    assert evidence.value > 0.1 and not evidence.assumption_met


@pytest.mark.slow
def test_the_error_falls_in_proportion_with_cross_terms_alone(tiny: Tiny) -> None:
    module = tiny("27_riccati_response", **SMALL | {"EXAMPLES": 2})
    assert module._slopes(cross=True).value > 0.9
    assert abs(module._slopes(cross=False).value) < 0.2


def test_affine_steps_are_the_expansion_of_a_reduced_system() -> None:
    random = torch.Generator().manual_seed(0)
    A, B, P = (torch.randn(3, k, generator=random, dtype=torch.float64) for k in (3, 3, 2))
    whole, o = LinearDynamics.constant(3, A, B), torch.ones(3, dtype=torch.float64)
    reduced = ReducedDynamics(whole, 1, [o, o], [P, P])
    assert reduced.horizon == 2 and reduced.control_sizes == (2, 2)
    cost = QuadraticCost.constant(2, Q=A @ A.mT, R=(P.mT @ P), Qf=A.mT @ A)
    problem = ControlProblem(reduced, cost, o)
    u = (torch.ones(2, dtype=torch.float64), -torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(reduced.step(0, o, u[0]), A @ o + B @ (o + P @ u[0]))
    affine = AffineDynamics(problem.rollout(u), u, [A, A], [B @ P, B @ P])
    other = tuple(3 * v for v in u)
    again = replace(problem, dynamics=affine, x0=2 * o)
    expected = replace(problem, x0=2 * o).rollout(other)
    torch.testing.assert_close(again.rollout(other), expected)
    with pytest.raises(InputError, match="expected one"):
        AffineDynamics(problem.rollout(u), u, [A], [B @ P, B @ P])
    with pytest.raises(InputError, match="bases"):
        ReducedDynamics(whole, 1, [o], [P, P])
