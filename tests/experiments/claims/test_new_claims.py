"""Claims 36 and 37 on a tiny setting, and systems of which they are false."""

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


def test_claim_37_the_bound_holds_and_a_wrong_linear_model_breaks_it(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"EXAMPLES": 3, "TOKENS": 6, "DELTAS": ("bitfit",), "SEEDS": range(2), "STEPS": 12}
    module = tiny("37_function_space_bound", **few)
    pairs = module._pairs()
    assert all(p.lost <= 2 * p.epsilon for p in pairs.values())
    assert all(p.gained > 0 for p in pairs.values())
    value, gradient = module._Objectives.of("bitfit", 0).close(torch.zeros(1).double().new_zeros(
        len(module._Objectives.of("bitfit", 0).start)
    ))  # fmt: skip
    real, real_gradient = module._Objectives.of("bitfit", 0).real(torch.zeros_like(gradient))
    assert value == pytest.approx(real, rel=1e-12)  # both agree at the start, to first order
    assert (gradient - real_gradient).norm() <= 1e-9 * real_gradient.norm()
    module._pairs.cache_clear()
    # A linear model whose adjoint has the wrong sign walks away from its minimiser.
    right = module._Objectives.close
    monkeypatch.setattr(
        module._Objectives, "close", lambda own, z: (right(own, z)[0], -right(own, z)[1])
    )
    assert not module._said("bitfit").assumption_met
