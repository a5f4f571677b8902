"""Claim 35 on few problems and a tiny model, and a training of which it is false."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltacontrol.theory.claims import Verdict
from deltacontrol.theory.judging import judge

from .conftest import Tiny

FEW = {"DRAWS": range(4), "STARTS": range(2), "LAYER": 1, "HEAD_ROWS": 64, "REAL_STEPS": 100}


def test_claim_35_rank_deficient_ends_are_global(tiny: Tiny) -> None:
    module = tiny("35_lora_minima", **FEW)
    found = judge(replace(module.CLAIM, parts=module.CLAIM.parts[:1])).part("a")
    assert found.verdict is Verdict.HOLDS and found.control.value > 1e-3


def test_claim_35_does_not_hold_at_a_saddle(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny("35_lora_minima", **FEW)
    right = module._normal

    def of_no_rank(seed: int, rank: int) -> torch.Tensor:
        """A = B = 0 in the narrow training, which gradients never leave."""
        return right(seed, rank) * (rank == module.SIZE)

    monkeypatch.setattr(module, "_normal", of_no_rank)
    evidence = module._deficient_ends(0.0)
    assert evidence.value > 1e-3 and not module.CLAIM.parts[0].threshold.passes(evidence.value)


def test_claim_35_tells_ends_that_were_not_trained(tiny: Tiny) -> None:
    module = tiny("35_lora_minima", **FEW)
    kinds = module._between(module.LARGE).details
    assert sum(kinds[k] for k in ("low-rank and global", "high-rank and large", "between")) == 2
    assert module._between(0.0, trained=False).value == 1
    assert module._between(module.LARGE, trained=False).value == 0
    early = module._larger(
        lambda seed: module._trained(seed, module.NARROW, module.LARGE, 0.0, 2), range(4), False
    )
    assert early.value == 1 and min(early.details["norms over those of the global minima"]) > 1
