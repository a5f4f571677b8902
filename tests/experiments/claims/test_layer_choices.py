"""Claim 32 on a tiny model: kernels of what is trained, and systems of which it is false."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from deltacontrol.deltas import LoRA, attach
from deltacontrol.experiments.measures.kernel_regime import kernel_of
from deltacontrol.experiments.measures.margins import MarginData
from deltacontrol.experiments.measures.tuning.layer_choices import Choices, condition_number
from deltacontrol.experiments.setting import Setting
from deltacontrol.theory.claims import Verdict
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.judging import judge

from .conftest import Tiny

SETS = ((0,), (1,), (0, 1))


@pytest.fixture
def claim(tiny: Tiny, places: dict[str, str]) -> Callable[..., Any]:
    few = {"LAYER_SETS": SETS, "HEAD_ROWS": 64, "ROWS": 5, "STEPS": 4}
    few["TASKS"] = (places["task"],) * 5
    return lambda **constants: tiny("32_kernel_condition", **few | constants)


@pytest.fixture(scope="module")
def data(places: dict[str, str]) -> MarginData:
    setting = Setting(
        places["model"], places["task"], train_rows=5, test_rows=0, order="shuffled", max_length=8,
        head="ridge", head_rows=40,
    )  # fmt: skip
    return MarginData.of(setting)


def test_a_condition_number_is_that_of_the_eigenvalues() -> None:
    basis = torch.linalg.qr(torch.arange(16.0).reshape(4, 4).double().sin()).Q
    K = (basis * torch.tensor([8.0, 4.0, 2.0, 0.5], dtype=torch.float64)) @ basis.mT
    assert condition_number(K) == pytest.approx(16.0)
    assert condition_number(torch.ones(3, 3)) == pytest.approx(1e12)


def test_the_kernel_is_that_of_what_is_trained(data: MarginData) -> None:
    lora = LoRA(rank=2, layers=(0, 1))
    found = Choices.of(data, lora, SETS, steps=3, rate=1e-2, seed=0)
    controlled = attach(data.model, lora, seed=0).eval()
    try:
        whole = condition_number(kernel_of(data, controlled.double()).total())
    finally:
        controlled.float()
        controlled.detach()
    alone = attach(data.model, LoRA(rank=2, layers=(1,)), seed=0).eval()
    try:
        assert alone.num_trainable == found.counts[1]
    finally:
        alone.detach()
    assert found.conditions[2] == pytest.approx(whole, rel=1e-9)
    assert found.counts[2] == found.counts[0] + found.counts[1]
    # A layer that is not trained adds nothing: the losses of the choices differ.
    assert len(set(found.losses)) == 3 and max(found.losses) < found.start


def test_the_model_is_left_as_it_was(data: MarginData) -> None:
    before = {n: p.clone() for n, p in data.model.named_parameters()}
    Choices.of(data, LoRA(rank=2, layers=(0, 1)), SETS, steps=1, rate=1e-2, seed=0)
    after = dict(data.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(p, after[n]) and p.dtype is after[n].dtype for n, p in before.items())


def test_a_choice_without_lora_is_refused(data: MarginData) -> None:
    with pytest.raises(InputError, match="no tensor in the layers"):
        Choices.of(data, LoRA(rank=2, layers=(0,)), ((1,),), steps=1, rate=1e-2, seed=0)


def test_claim_32_is_not_judged_where_nothing_is_learnt(claim: Callable[..., Any]) -> None:
    outcome = judge(claim(RATE=0.0).CLAIM)
    assert {part.verdict for part in outcome.parts} == {Verdict.ASSUMPTION_NOT_MET}


def test_claim_32_orders_known_kernels_and_sees_wrong_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = import_module("deltacontrol.experiments.claims.32_kernel_condition")
    known = [module._known(i) for i in range(6)]
    own = [module._own()] * 6
    assert module._ordered(known, own).value == pytest.approx(1.0)
    assert module._above(known, own).bounds()[0] > 0
    passing = module._ordered(known, [module._neighbours()] * 6)
    assert module.ORDERED <= passing.value < 1.0
    drawn = module._ordered(known, [module._drawn(i) for i in range(6)])
    assert drawn.bounds()[1] < module.ORDERED
    assert module._above(known, [module._drawn(i) for i in range(6)]).value < 0.2
    # The mutated system: an entry of a kernel is no condition number.
    module._known.cache_clear()
    measured = "deltacontrol.experiments.measures.tuning.layer_choices.condition_number"
    monkeypatch.setattr(measured, lambda K: float(K[0, 1]))
    wrong = [module._known(i) for i in range(6)]
    assert not module._ordered(wrong, own).value >= module.ORDERED
    module._known.cache_clear()
