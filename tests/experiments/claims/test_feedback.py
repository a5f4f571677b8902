"""Claim 36 on a tiny setting, and a system of which it is false."""

from __future__ import annotations

import pytest
import torch

from deltacontrol.theory.claims import Verdict
from deltacontrol.theory.judging import judge

from .conftest import Tiny


def test_claim_36_the_linear_parts_hold_and_the_real_one_is_judged(tiny: Tiny) -> None:
    module = tiny("36_integral_feedback", SEEDS=range(3), CALIBRATION=8, STEERED=6, TOKENS=6)
    outcome = judge(module.CLAIM)
    assert [outcome.part(name).verdict for name in "ab"] == [Verdict.HOLDS] * 2
    real = outcome.part("c").evidence
    assert real.interval is not None and real.interval.unit == "text"
    # Texts that are alike have alike sums of errors: exchanging them changes nothing.
    batch = real.details["with the proportional law"]
    assert batch > 0 and outcome.part("c").passing is not None


def test_claim_36_fails_where_the_disturbance_grows(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny("36_integral_feedback", SEEDS=range(3))

    def growing(A, d, proportional, integral):
        x, total = torch.zeros_like(d), torch.zeros_like(d)
        for step in range(module.STEPS):
            total = total + x
            x = A @ (x - proportional * x - integral * total) + d * step
        return x

    monkeypatch.setattr(module, "_end", growing)
    assert judge(module.CLAIM).part("a").verdict is Verdict.FAILS
