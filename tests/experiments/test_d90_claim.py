"""Claim 15: bounds on a dimension count on either side, and tasks are drawn again."""

from __future__ import annotations

import math
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest


def made_record(truth: float, baseline: float = 0.8) -> Any:
    """The record of a search over 100, 1000 and 10,000 whose curve reaches 0.72 at the truth."""
    rows = [
        {
            "dimension": d,
            "performance": 0.72 + 0.2 * math.log10(d / truth) + 0.001 * seed,
            "used": True,
        }
        for d in (100, 1000, 10_000)
        for seed in (-1, 1)
    ]
    result = {"baseline": [baseline] * 2, "chance": 0.2, "confidence": 0.9, "text": f"{truth:g}"}
    return SimpleNamespace(
        id=f"{round(truth):x}",
        curve=lambda: pd.DataFrame(rows).astype({"dimension": "Int64"}),
        config={"share": 0.9},
        result=result,
    )


@pytest.fixture
def claim() -> Any:
    return import_module("deltacontrol.experiments.claims.15_d90_falls")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (3000.0, 300.0, (-1.0, -1.0)),
        # More than the largest: at least that, and at most all of the model's numbers.
        (1e9, 300.0, (math.log10(300 / 2e8), math.log10(300 / 10_000))),
        (3000.0, 1e-9, (math.log10(1 / 3000), math.log10(100 / 3000))),  # less than the smallest
        (1e-9, 300.0, (math.log10(300 / 100), math.log10(300))),
        (3000.0, 1e9, (math.log10(10_000 / 3000), math.log10(2e8 / 3000))),
    ],
)
def test_claim_15_takes_bounds_on_either_side(
    before: float, after: float, expected: tuple[float, float], claim: Any
) -> None:
    pair = made_record(before), made_record(after)
    assert [np.median(end) for end in claim._log_ratios(pair)] == pytest.approx(expected, abs=0.02)
    found = claim._over_tasks({"a": pair, "b": pair})
    assert found.bounds() == pytest.approx(expected, abs=0.1)
    assert found.value == pytest.approx(expected[1], abs=0.02)  # against the claim
    assert found.interval.unit == "task" and found.interval.count == 2
    assert f"{before:g} to {after:g}" in found.details["by task, each by its own target"]["a"]


def test_claim_15_draws_tasks_again(claim: Any) -> None:
    falls = made_record(3000.0), made_record(300.0)
    rises = made_record(300.0), made_record(3000.0)
    found = claim._over_tasks({"a": falls, "b": falls, "c": rises})
    assert found.value == pytest.approx(-1 / 3, abs=0.02)
    low, high = found.bounds()
    assert low == pytest.approx(-1, abs=0.05) and high == pytest.approx(1, abs=0.05)


def test_claim_15_tells_both_targets(claim: Any) -> None:
    """By its own target the second needs ten times as much; by that of the first, the same."""
    pair = made_record(300.0), made_record(300.0, baseline=0.92 / 0.9)
    pairs = {"a": pair, "b": pair}
    own = claim._over_tasks(pairs, seed=1)
    assert own.bounds() == pytest.approx((1.0, 1.0), abs=0.05)
    common = claim._over_tasks(pairs, seed=1, common=True)
    assert common.value == pytest.approx(0.0, abs=0.02)
    low, high = common.bounds()
    assert low < 0 < high


def test_claim_15_finds_nothing_where_nothing_differs(claim: Any) -> None:
    record = made_record(300.0)
    found = claim._over_tasks({"a": (record, record), "b": (record, record)}, seed=1)
    low, high = found.bounds()
    assert low < 0 < high and abs(found.value) < 0.01
    first, _ = claim._draws(record)
    assert not (first == claim._draws(record, seed=1)[0]).all()
    assert (first == claim._draws(record)[0]).all()


def test_the_control_of_claim_15_passes_where_the_answer_is_known(claim: Any) -> None:
    low, high = claim._passes({}, None).bounds()
    assert low == pytest.approx(-1, abs=0.1) and high == pytest.approx(-1, abs=0.1)
