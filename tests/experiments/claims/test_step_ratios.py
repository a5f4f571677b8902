"""Claim 14b on records written by hand, and that its records train B at the rate that they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run
from deltacontrol.experiments.studies.learning_rates.ranks import RankRates
from deltacontrol.theory.judging import judge

from .conftest import Tiny

Best = Callable[[int, int, float], float]  # of width, rank and multiplier, log2 of the best ratio


def records(best: Best, *, falls: float = 1.0, rate: float = -7.0) -> Callable[[Any], Any]:
    """Log losses that are parabolas in log ratio and in log rate."""

    def record(experiment: RankRates) -> Any:
        rows, width = [], int(experiment.model.rpartition("-")[2])
        for exponent in experiment.exponents:
            for rank in experiment.ranks:
                multiplier = experiment.scaled(rank, exponent)
                cell = {"rank": rank, "multiplier": multiplier}
                middle = best(width, rank, multiplier)
                for ratio in experiment.step_ratios:
                    for of_a in experiment.rates:
                        log = (math.log2(ratio) - middle) ** 2 + (math.log2(of_a) - rate) ** 2
                        loss = math.exp(-falls + min(0.01 * log, falls))
                        pair = cell | {"step_ratio": ratio, "rate": of_a, "loss": loss}
                        rows += [pair | {"step": s + 1} for s in range(experiment.steps)]
        return SimpleNamespace(curve=lambda: pd.DataFrame(rows).drop_duplicates())

    return record


def predicted(width: int, rank: int, multiplier: float) -> float:
    return math.log2(width / (rank * multiplier)) + 1.0


@pytest.fixture
def claim(tiny: Tiny) -> Any:
    return tiny("14_lora_step_ratio", SERIES=(("rt", 0), ("trec6", 1), ("rt", 2)))


def outcome_of(claim: Any, made: Any) -> Any:
    return judge(replace(claim.CLAIM, parts=claim.CLAIM.parts[1:]), made).parts[0]


def test_ratios_that_grow_as_the_width_hold(claim: Any) -> None:
    part = outcome_of(claim, records(predicted))
    assert part.verdict.value == "holds"
    assert part.evidence.value == pytest.approx(1.0) and part.passing.value == pytest.approx(1.0)
    assert part.control.value == pytest.approx(0.0, abs=1e-9)
    # Vertices of parabolas, read off exactly.
    ratios = part.evidence.details["log2 of the best ratio by width"]["rt, seed 0"]
    assert ratios == pytest.approx([predicted(w, claim.RANK, 4.0) for w in claim.FAMILY])


def test_ratios_that_stay_fail(claim: Any) -> None:
    """The rank's part alone: without the width's it falls where the rank grows."""
    part = outcome_of(claim, records(lambda w, r, s: predicted(128, r, s)))
    assert part.verdict.value == "inconclusive"  # what has to pass does not, either
    assert part.evidence.value == pytest.approx(0.0, abs=1e-9)
    assert not part.threshold.passes(part.evidence.value)


@pytest.mark.parametrize(
    ("made", "missed"),
    [
        (records(lambda w, r, s: 11.0), "the grid holds the best rates"),  # at the end of ratios
        (records(predicted, rate=-13.0), "the grid holds the best rates"),  # at the end of rates
        (records(predicted, falls=0.05), "training lowers the loss"),
    ],
)
def test_what_the_records_have_to_be(claim: Any, made: Any, missed: str) -> None:
    part = outcome_of(claim, made)
    assert part.verdict.value == "assumption_not_met"
    assert [n for n, met in part.evidence.assumptions.items() if not met] == [missed]


def test_b_has_the_ratio_of_rates(places: Any, tmp_path: Path) -> None:
    """A rate of A so small that B alone moves: then the product of both decides the losses."""
    study = RankRates(
        **places, ranks=(2,), exponents=(1.0,), reference=2, rates=(1e-10, 1e-8),
        step_ratios=(1e6, 1e8), rows=16, head_rows=32, max_length=8, batch_size=4, steps=4,
    )  # fmt: skip
    record = run(study, RunStore(tmp_path), progress=False)
    assert record is not None and record.result["num_trainings"] == 4
    found = record.curve().groupby(["step_ratio", "rate"])["loss"].apply(list)
    assert found[1e8, 1e-10] == pytest.approx(found[1e6, 1e-8], rel=1e-5)
    assert found[1e6, 1e-10] != pytest.approx(found[1e8, 1e-10], rel=1e-5)
