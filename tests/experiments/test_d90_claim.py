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
    result |= {"dimensions": [100, 10_000]}
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
    assert f"{before:g} to {after:g}" in found.details["by task, d90 as searched"]["a"]


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

PARAMETERS = (1e5, 10 ** (5 + 1 / 3), 10 ** (5 + 2 / 3), 1e6)
WEAK = 0.25  # a full fine-tuning that is hardly above guessing, 0.2


def family(
    d90: tuple[float, ...],
    baselines: tuple[float, ...] = (0.8,) * 4,
    losses: tuple[float, ...] = (5.0, 4.9, 4.8, 4.7),
    weak: tuple[str, ...] = (),
) -> Any:
    """Records in which each size has this d90 on every task, at the target 0.72."""
    from deltacontrol.experiments.studies.d90 import grid
    from deltacontrol.experiments.training.pretraining.experiment import Pretraining

    models = [f"family/encoder-{width}" for width in grid.WIDTHS]

    def records(experiment: Any) -> Any:
        if isinstance(experiment, Pretraining):
            i = grid.WIDTHS.index(experiment.width)
            known = {"num_total": PARAMETERS[i], "loss": losses[i], "unigram_loss": 6.8}
            return SimpleNamespace(result=known)
        i = models.index(experiment.model)
        baseline = baselines[0] if experiment.baseline_model else baselines[i]
        baseline = WEAK if experiment.task in weak else baseline
        record = made_record(d90[i], baseline)
        record.result |= {"target": 0.9 * baseline, "dimensions": [100, 10_000]}
        record.config |= {"steps": 60, "batch_size": 16, "baseline_seeds": 8}
        return record

    return records


def unmet(found: Any) -> list[str]:
    return [name.partition(",")[0] for name, met in found.assumptions.items() if not met]


def slope_of(claim: Any, records: Any) -> Any:
    return claim._family_slope(claim._predict(records), records)


def test_claim_15_has_the_slope_over_sizes(claim: Any) -> None:
    found = slope_of(claim, family((6000.0, 3000.0, 1500.0, 750.0)))
    slope = -math.log10(2) * 3
    assert found.value == pytest.approx(slope, abs=0.05)
    assert found.bounds() == pytest.approx((slope, slope), abs=0.15)
    assert found.interval.count == 5 and not unmet(found)
    passes = claim._family_passes({}, None)
    assert passes.bounds() == pytest.approx((-1, -1), abs=0.1) and passes.interval.count == 5
    # BERT and RoBERTa, base and large, on two tasks each.
    published = [math.log10(b / a) for a, b in claim.PUBLISHED_SIZES]
    of = [math.log10(b / a) for a, b in claim.PUBLISHED_PARAMETERS]
    expected = np.mean([p / q for p, q in zip(published, of, strict=True)])
    assert found.details["published slope, base to large"] == pytest.approx(expected)


def test_bounds_of_a_change_go_in_by_the_signs_of_its_weights() -> None:
    """The first model needs more than was searched, the second less."""
    records = made_record(1e9), made_record(1e-9), made_record(1000.0)
    weights = (-1.0, 0.5, 0.5)

    def ends(**more: Any) -> list[float]:
        return [float(np.median(end)) for end in changes.weighted(records, weights, **more)]

    rest = 0.5 * 3
    assert ends() == pytest.approx((-math.log10(2e8) + rest, -4 + 0.5 * 2 + rest), abs=0.03)
    known = ends(most=(1e6, 1e6, 1e6))  # no model needs more than it has
    assert known == pytest.approx((-6 + rest, -4 + 0.5 * 2 + rest), abs=0.03)


def test_a_search_that_trained_nothing_may_have_any_dimension() -> None:
    record = made_record(1000.0)
    record.result["dimensions"] = []
    low, high = changes.draws_of(record, most=1e6)
    assert (low == 1).all() and (high == 1e6).all() and len(low) == len(high) > 1000


def test_a_target_of_its_own_is_harder_for_what_learns_more(claim: Any) -> None:
    """The same curves: by one target nothing falls, by their own a better size needs more."""
    records = family((1000.0,) * 4, baselines=(0.8, 0.84, 0.88, 0.92))
    low, high = claim._family_own_targets({}, records).bounds()
    assert low > 0.5
    assert slope_of(claim, records).value == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize(
    ("records", "missing"),
    [
        (family((1000.0,) * 4, baselines=(0.8, 0.7, 0.8, 0.8)), "full fine-tuning of every size"),
        (family((1000.0,) * 4, losses=(5.0, 4.9, 4.95, 4.7)), "pre-training learns more than"),
        (family((1000.0,) * 4, losses=(6.9, 6.7, 6.6, 6.5)), "pre-training learns more than"),
        (family((1000.0,) * 4, weak=("bbc", "r8")), "the smallest model has room above"),
        (family((1000.0,) * 4, weak=("bbc", "r8", "20ng", "intensity")), "the smallest model has"),
    ],
)
def test_what_the_family_has_to_be(claim: Any, records: Any, missing: str) -> None:
    found = slope_of(claim, records)
    assert any(name.startswith(missing) for name in unmet(found))


def test_a_task_near_guessing_does_not_count(claim: Any) -> None:
    found = slope_of(claim, family((6000.0, 3000.0, 1500.0, 750.0), weak=("bbc",)))
    assert not unmet(found) and found.interval.count == 4
    assert found.details["left out, the smallest model is near guessing"] == ["bbc"]
