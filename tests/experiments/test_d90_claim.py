"""Claim 15: bounds on a dimension count against the claim."""

from __future__ import annotations

import math
from importlib import import_module
from types import SimpleNamespace
from typing import Any

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


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (3000.0, 300.0, -1.0),
        (1e9, 300.0, math.log10(300 / 10_000)),  # more than the largest: at least that
        (3000.0, 1e-9, math.log10(100 / 3000)),  # less than the smallest: at most that
        (1e-9, 300.0, math.log10(300)),  # a bound that says nothing but d >= 1
        (3000.0, 1e9, math.inf),
    ],
)
def test_claim_15_takes_bounds_on_the_side_against_it(
    before: float, after: float, expected: float
) -> None:
    claim: Any = import_module("deltacontrol.experiments.claims.15_d90_falls")
    middle, (low, high), details = claim._log_ratio(
        {"a": (made_record(before), made_record(after))}
    )
    assert low <= middle <= high
    if math.isinf(expected):
        assert middle == high == expected
    else:
        assert middle == pytest.approx(expected, abs=0.02) and high - low < 0.1
    assert details == {"a": f"{before:g} to {after:g}"}


def test_claim_15_tells_both_targets() -> None:
    """By its own target the second needs ten times as much; by that of the first, the same."""
    claim: Any = import_module("deltacontrol.experiments.claims.15_d90_falls")
    pairs = {"a": (made_record(300.0), made_record(300.0, baseline=0.92 / 0.9))}
    own, (_, _), _ = claim._log_ratio(pairs, seed=1)
    common, (low, high), details = claim._log_ratio(pairs, common=True, seed=1)
    assert own == pytest.approx(1.0, abs=0.02)
    assert common == pytest.approx(0.0, abs=0.02) and low < 0 < high
    assert details == {"a": "300 to 300"}


def test_claim_15_finds_nothing_where_nothing_differs() -> None:
    claim: Any = import_module("deltacontrol.experiments.claims.15_d90_falls")
    record = made_record(300.0)
    middle, (low, high), _ = claim._log_ratio({"a": (record, record)}, seed=1)
    assert low < 0 < high and abs(middle) < 0.01
    first = claim._draws(record, before=True)
    assert not (first == claim._draws(record, before=True, seed=1)).all()
    assert (first == claim._draws(record, before=True)).all()
