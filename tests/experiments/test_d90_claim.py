"""Claim 15: bounds on a dimension count on either side, and tasks are drawn again."""

from __future__ import annotations

import math
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from deltacontrol.experiments.studies.d90 import changes


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
    ends = [np.median(end) for end in changes.weighted(pair, changes.RATIO)]
    assert ends == pytest.approx(expected, abs=0.02)
    found = changes.over_tasks({"a": pair, "b": pair})
    assert found.bounds() == pytest.approx(expected, abs=0.1)
    assert found.value == pytest.approx(expected[1], abs=0.02)  # against the claim
    assert found.interval.unit == "task" and found.interval.count == 2
    assert f"{before:g} to {after:g}" in found.details["by task, each by its own target"]["a"]


def test_claim_15_draws_tasks_again(claim: Any) -> None:
    falls = made_record(3000.0), made_record(300.0)
    rises = made_record(300.0), made_record(3000.0)
    found = changes.over_tasks({"a": falls, "b": falls, "c": rises})
    assert found.value == pytest.approx(-1 / 3, abs=0.02)
    low, high = found.bounds()
    assert low == pytest.approx(-1, abs=0.05) and high == pytest.approx(1, abs=0.05)


def test_claim_15_tells_both_targets(claim: Any) -> None:
    """By its own target the second needs ten times as much; by that of the first, the same."""
    pair = made_record(300.0), made_record(300.0, baseline=0.92 / 0.9)
    pairs = {"a": pair, "b": pair}
    own = changes.over_tasks(pairs, seed=1)
    assert own.bounds() == pytest.approx((1.0, 1.0), abs=0.05)
    common = changes.over_tasks(pairs, seed=1, common=True)
    assert common.value == pytest.approx(0.0, abs=0.02)
    low, high = common.bounds()
    assert low < 0 < high


def test_claim_15_finds_nothing_where_nothing_differs(claim: Any) -> None:
    record = made_record(300.0)
    found = changes.over_tasks({"a": (record, record), "b": (record, record)}, seed=1)
    low, high = found.bounds()
    assert low < 0 < high and abs(found.value) < 0.01
    first, _ = changes.draws_of(record)
    assert not (first == changes.draws_of(record, seed=1)[0]).all()
    assert (first == changes.draws_of(record)[0]).all()


def test_the_control_of_claim_15_passes_where_the_answer_is_known(claim: Any) -> None:
    low, high = claim._passes({}, None).bounds()
    assert low == pytest.approx(-1, abs=0.1) and high == pytest.approx(-1, abs=0.1)


# -- sizes of one family ---------------------------------------------------------------------------


def family(d90: tuple[float, ...], **result: Any) -> Any:
    """Records in which each size has this d90 on every task."""
    from deltacontrol.experiments.studies.d90 import grid
    from deltacontrol.experiments.training.pretraining.experiment import Pretraining

    def records(experiment: Any) -> Any:
        i = next(i for i, w in enumerate(grid.WIDTHS) if str(w) in experiment.label)
        if isinstance(experiment, Pretraining):
            known = {"num_total": 10 ** (5 + i / 3), "loss": 5.0 - i / 10}
            return SimpleNamespace(result=known)
        record = made_record(d90[i], result.get("baselines", (0.8,) * 4)[i])
        record.result |= {"target": 0.72}
        record.config |= {"steps": 60, "batch_size": 16, "baseline_seeds": 8}
        return record

    return records


def test_claim_15_has_the_slope_over_sizes(claim: Any) -> None:
    found = claim._family_slope({}, family((6000.0, 3000.0, 1500.0, 750.0)))
    slope = -math.log10(2) * 3
    assert found.value == pytest.approx(slope, abs=0.05)
    assert found.bounds() == pytest.approx((slope, slope), abs=0.15)
    assert found.interval.count == 6 and all(found.assumptions.values())
    passes = claim._family_passes({}, None)
    assert passes.bounds() == pytest.approx((-1, -1), abs=0.1)


def test_bounds_of_a_slope_go_in_by_the_signs_of_its_weights(claim: Any) -> None:
    """The smallest model needs more than was searched, the next less: steepest and least steep."""
    records = made_record(1e9), made_record(1e-9), made_record(1000.0)
    weights = (-1.0, 0.5, 0.5)
    ends = [np.median(end) for end in changes.weighted(records, weights)]
    most, least = math.log10(2e8), math.log10(10_000)
    assert ends == pytest.approx((-most + 0.5 * 0 + 0.5 * 3, -least + 0.5 * 2 + 0.5 * 3), abs=0.03)


def test_a_target_of_its_own_is_harder_for_what_learns_more(claim: Any) -> None:
    """The same curves: by one target nothing falls, by their own a better size needs more."""
    records = family((1000.0,) * 4, baselines=(0.8, 0.84, 0.88, 0.92))
    low, high = claim._family_own_targets({}, records).bounds()
    assert low > 0.5
    one = claim._family_slope({}, records)
    assert one.value == pytest.approx(0.0, abs=0.05)
    # A size that does not reach the target of the smallest has no d90 by it.
    weak = claim._family_slope({}, family((1000.0,) * 4, baselines=(0.8, 0.7, 0.8, 0.8)))
    assert [name for name, met in weak.assumptions.items() if not met] == [
        "full fine-tuning of every size reaches the target on every task"
    ]
