"""Claim 23 on a tiny setting: what a delta loses to full fine-tuning, and its bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltacontrol.theory.claims import Verdict
from deltacontrol.theory.judging import judge

from .conftest import Tiny

DELTAS = ("lora:rank=1", "bitfit", "last-layers")


def _claim(tiny: Tiny, places: dict[str, str], **more: Any) -> Any:
    sizes = {"SEEDS": (0, 1), "NUM_EXAMPLES": 8, "LENGTH": 8, "STEPS": 20, "FULL_RATE": 3e-3}
    return tiny("23_solution_space_gap", DELTAS=DELTAS, TASKS=(places["task"],), **(sizes | more))


def test_claim_23_the_gap_is_below_slope_times_distance(tiny: Tiny, places: dict[str, str]) -> None:
    claim = _claim(tiny, places)
    outcome = judge(claim.CLAIM)
    part = outcome.part("a")
    assert part.verdict is Verdict.HOLDS
    trainings = claim._trainings().values()
    assert len(trainings) == 2 and part.evidence.cases == 2 * len(DELTAS)
    ratios = []
    for training in trainings:
        assert training.gradient <= claim.LARGEST_GRADIENT and min(training.gaps.values()) >= 0
        assert training.back.losses[-1] == pytest.approx(training.untrained, rel=1e-5)
        for text, segment in training.segments.items():
            # F rises from θ⁺ to the nearest point by the integral of its slope.
            assert segment.losses[-1] - segment.losses[0] <= segment.bound()
            assert segment.losses[0] == pytest.approx(training.optimum, rel=1e-4)
            assert 0.1 < segment.distance <= training.back.distance * (1 + 1e-6)
            assert segment.slopes[0] < 0.2 * max(segment.slopes)
            ratios.append(training.gaps[text] / segment.bound())
    assert part.evidence.value == pytest.approx(max(ratios))
    for letter in "bcd":
        # What reaches nothing but the start is bounded by no less than the start's loss.
        assert outcome.part(letter).control.value > 1 > outcome.part(letter).passing.value


def test_claim_23_is_not_judged_away_from_a_minimiser(tiny: Tiny, places: dict[str, str]) -> None:
    claim = _claim(tiny, places, SEEDS=(0,), FULL_STEPS=1)
    evidence = claim.CLAIM.parts[0].measure(claim._predict())
    assert list(evidence.assumptions.values()) == [False, False]


def test_claim_23_full_fine_tuning_is_next_to_itself(tiny: Tiny, places: dict[str, str]) -> None:
    """LoRA of full rank on a matrix leaves nothing of that matrix's update."""
    from deltacontrol.deltas import FullFineTuning, LoRA, attach
    from deltacontrol.experiments.setting import Setting

    claim = tiny("23_solution_space_gap")
    base = Setting(places["model"], places["task"]).base
    start = {n: p.detach().clone() for n, p in base.named_parameters()}
    best = {n: p + 0.1 * torch.randn_like(p) for n, p in start.items()}
    for delta, names in (
        (LoRA(rank=16, sites=("attention.query",), layers=(1,)), ["attention.self.query.weight"]),
        (FullFineTuning(), list(best)),
    ):
        controlled = attach(base, delta)
        nearest = claim._nearest(controlled, start, best)
        controlled.detach()
        for name, value in nearest.items():
            reached = any(name.endswith(n) for n in names) and (len(names) > 1 or "layer.1" in name)
            expected = best[name] if reached else start[name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
