"""Claims of what a delta can reach, run on a tiny setting: ranks, kernels, solution spaces."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from deltacontrol.theory.claims import Verdict
from deltacontrol.theory.judging import judge

from .conftest import Tiny

NARROW = {"WIDTH": 4, "DEPTHS": (1, 2), "MISSING": (2, 4), "SEEDS": (0,), "INPUTS": 30}


@pytest.mark.parametrize(
    ("missed", "verdict"), [(0, Verdict.HOLDS), (2, Verdict.INCONCLUSIVE), (8, Verdict.FAILS)]
)
def test_claim_11_the_construction_at_its_rank_and_one_below(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, missed: int, verdict: Verdict
) -> None:
    claim = tiny("11_lora_rank_threshold", **NARROW, TRAINED=2, EXACT_INPUTS=5)

    def trained(case: Any, rank: int, *, linear: bool) -> float:
        """Misses so many of the eight seeds at the threshold, and all below it."""
        miss = rank < claim._threshold(case) or (not linear and case.seed < 10 + missed)
        return 0.1 if miss else 1e-3

    monkeypatch.setattr(claim, "_trained", trained)
    outcome = judge(claim.CLAIM)
    assert outcome.prediction == {
        f"{depth} for 1, missing rank {missing}, seed 0": math.ceil(missing / depth)
        for depth in (1, 2)
        for missing in (2, 4)
    }
    exists, found = outcome.part("a"), outcome.part("b")
    assert exists.verdict is Verdict.HOLDS
    assert exists.evidence.value == 0.0  # in fractions there is no rounding
    assert exists.evidence.cases == 4 and exists.evidence.assumption_met
    assert max(exists.evidence.details["errors in float64"].values()) < 1e-9
    assert exists.passing is not None and exists.passing.cases == 2  # of missing rank 2
    assert exists.control.value > 1e-4
    # None of eight leaves the share between 0 and 0.37, all between 0.63 and 1.
    assert found.evidence.value == 1 - missed / 8 and found.control.value == 0.0
    assert found.passing is not None and found.passing.value == 1.0
    assert found.verdict is verdict


def test_claim_11_training_misses_products_of_too_low_a_rank(tiny: Tiny) -> None:
    """The nearest product that two maps of rank one less reach is away from the target's."""
    claim = tiny("11_lora_rank_threshold", **NARROW, ITERATIONS=300)
    case = claim._case(2, 4, 0)
    assert claim._threshold(case) == 2
    assert claim._trained(case, 1, linear=True) > claim.REACHED
    assert claim._trained(case, 2, linear=True) < claim.REACHED


def test_claim_11_a_changed_layer_is_not_exact(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias that is off by 2⁻²⁰ shows, and a rank above the allowed one is refused."""
    claim = tiny("11_lora_rank_threshold", WIDTH=4, INPUTS=20, EXACT_INPUTS=5)
    case = claim._case(2, 4, 0)
    right = claim._passed

    def off(changed: Any, bias: Any, states: Any, radius: float) -> Any:
        return right(changed, bias + claim._exact([[2.0**-20]] * 4), states, radius)

    monkeypatch.setattr(claim, "_passed", off)
    assert 0 < claim._exact_error(case, 2) < 1e-4


@pytest.mark.slow
def test_claim_12_the_predicted_rank_against_one_below(tiny: Tiny) -> None:
    claim = tiny(
        "12_no_spurious_minima",
        EXAMPLES=2,
        TOKENS=8,
        HEAD_ROWS=32,
        PLACES=(("attention.value", 1),),
        LOSSES=("logistic",),
        SHARES=(0.1,),
        SIZES=(0.0, 3.0),
        SEEDS=range(3),
        REAL_STEPS=60,
    )
    outcome = judge(claim.CLAIM)
    assert outcome.prediction["rank"] == 2  # 1·2/2 is not above the two examples, 2·3/2 is
    linear, real = outcome.part("a"), outcome.part("b")
    assert linear.evidence.cases == 6 and linear.control.cases == 3  # the large starts alone
    assert linear.evidence.value <= claim.GAP and linear.evidence.assumption_met
    # The convex program bounds from below: no end is below it by more than rounding.
    for evidence in (linear.evidence, linear.control, linear.passing):
        assert evidence is not None
        assert min(v for name, v in evidence.details.items() if " size " in name) > -1e-9
    assert [e.details["rank"] for e in (linear.control, linear.evidence)] == [1, 2]
    above = linear.control.details["starts that end above the bound"]
    assert (above > 0) == (linear.control.value > claim.GAP)
    assert (linear.verdict is Verdict.HOLDS) == (above > 0)
    assert real.evidence.interval is not None and real.evidence.interval.count == 3
    assert 0 <= real.evidence.value < 1


def test_claim_12_an_end_above_the_bound_is_seen(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that stops early is no stationary point, and says so."""
    claim = tiny(
        "12_no_spurious_minima",
        EXAMPLES=2,
        TOKENS=8,
        HEAD_ROWS=32,
        PLACES=(("attention.value", 1),),
        LOSSES=("logistic",),
        SHARES=(0.1,),
        SIZES=(3.0,),
        SEEDS=range(1),
    )
    problem = claim._linear(claim.PLACES[0], "logistic", 0.1)
    right = claim._linear_ends({"rank": 2}, 0, False, "")
    assert right.value <= claim.GAP and right.assumption_met
    end = claim._end(claim.PLACES[0], "logistic", 0.1, 3.0, 2, 0)
    worse = end.objective + 1e-3 * (problem.start - end.bound)
    early = replace(end, objective=worse, gradient=0.1)
    monkeypatch.setattr(claim, "_end", lambda *_: early)
    found = claim._linear_ends({"rank": 2}, 0, False, "")
    assert found.value == pytest.approx(1e-3, rel=1e-3) and not found.assumption_met


@pytest.mark.slow
def test_claim_13_short_steps_leave_the_kernel_in_proportion(
    tiny: Tiny, language_model: str
) -> None:
    """The verdict is one of pre-trained weights; what is measured, of any: errors are O(change)."""
    few = {"MODEL": language_model, "SEEDS": (0, 1), "SHOTS": 4, "UNSEEN": 4, "TOKENS": 8}
    runs = []
    for stretch in (0.1, 0.02):
        claim = tiny("13_tangent_kernel", **few, RANK=4, STEPS=1, STRETCH=stretch, SHORT=1e-3)
        outcome = judge(claim.CLAIM)
        assert [part.name for part in outcome.parts] == ["a", "b", "c", "d", "e"]
        run = outcome.part("a").evidence.details["seed 0"]
        assert run["steps"] == 1 and run["predicted"] < run["start"]
        for part, number in (("a", "error"), ("b", "drift"), ("c", "drift")):
            evidence, passing = outcome.part(part).evidence, outcome.part(part).passing
            values = [evidence.details[f"seed {seed}"][number] for seed in (0, 1)]
            # ERROR and DRIFT are one number; the geometric mean over it, in octaves.
            over = math.prod(values) ** 0.5 / claim.DRIFT
            assert evidence.value == pytest.approx(math.log2(over))
            assert passing is not None
            assert passing.value < outcome.part(part).control.value
        (_, kept), *_ = outcome.part("d").evidence.details.values()
        assert 2**kept * claim.DRIFT == pytest.approx(run["drift"])
        runs.append(run)
    for name in ("error", "drift"):
        assert runs[1][name] == pytest.approx(runs[0][name] / 5, rel=0.3)
    # With an A that acts on one coordinate the kernels differ; with half of them, less.
    distances = outcome.part("e")
    assert distances.passing is not None
    assert 0 < distances.evidence.value < distances.control.value
    assert distances.passing.value < distances.control.value


def test_claim_13_a_run_that_is_lost_counts_as_a_bound(tiny: Tiny) -> None:
    claim = tiny("13_tangent_kernel")
    assert claim._octaves(0.5, 0.25) == 1
    assert {claim._octaves(x, 0.25) for x in (math.inf, math.nan, 1e9)} == {10.0}
