"""Claim 37 on a tiny setting, and a linear model of which it is false."""

from __future__ import annotations

import pytest
import torch

from .conftest import Tiny


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
