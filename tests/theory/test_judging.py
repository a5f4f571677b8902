"""Verdicts of claims by whole intervals, Holm's rule over parts, and records that survive JSON."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from deltacontrol.theory.claims import Claim, Part, Threshold, Verdict
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.evidence import Evidence, Interval
from deltacontrol.theory.judging import Outcome, holm, judge, needed, verdict_of

SMALL = Threshold("<=", 1e-12, "relative difference")
BELOW_ONE = Threshold("<=", 1.0, "ratio")
WRONG, RIGHT = Evidence(0.3), Evidence(1e-15)


def claim(evidence: Evidence, control: Evidence = WRONG, threshold: Threshold = SMALL) -> Claim:
    return Claim(
        id=1,
        name="costate-gradient",
        title="Costate gradient",
        statement="The gradient is that of the Hamiltonian along the costates.",
        source="standard",
        notebook="proofs_notebooks/01_costate_gradient.py",
        threshold=threshold,
        predict=lambda: {"expected": 0.0},
        measure=lambda prediction: evidence,
        negative_control=lambda prediction: control,
        passing_control=lambda prediction: RIGHT,
        on="exact problem",
    )


def around(center: float, half: float, n: int = 6) -> Evidence:
    """Evidence whose 95 % interval is ``center ± half``."""
    raw = np.linspace(-1, 1, n)
    low, high = Evidence.mean(raw.tolist(), "seed").bounds()
    return Evidence.mean((center + raw * 2 * half / (high - low)).tolist(), "seed")


@pytest.mark.parametrize(
    ("evidence", "control", "verdict", "words"),
    [
        (Evidence(1e-15), WRONG, Verdict.HOLDS, "relative difference <= 1e-12"),
        (Evidence(1e-3), WRONG, Verdict.FAILS, "measured 0.001"),
        (Evidence(1e-15), Evidence(1e-14), Verdict.INCONCLUSIVE, "no power"),
        (Evidence(1e-3), Evidence(1e-14), Verdict.INCONCLUSIVE, "no power"),
        (Evidence(math.nan), WRONG, Verdict.INCONCLUSIVE, "nan"),
        (Evidence(-math.inf), WRONG, Verdict.INCONCLUSIVE, "-inf"),
        (Evidence(1e-15), Evidence(math.nan), Verdict.INCONCLUSIVE, "gave no number"),
        (Evidence(1e-15), Evidence(math.inf), Verdict.HOLDS, "measured 1e-15"),
        (
            Evidence(1e-15, assumptions={"linear": True, "at a minimum": False}),
            WRONG,
            Verdict.ASSUMPTION_NOT_MET,
            "not met here: at a minimum",
        ),
        (
            Evidence(math.nan, assumptions={"linear": False}),
            Evidence(1e-14),
            Verdict.ASSUMPTION_NOT_MET,
            "linear",
        ),
    ],
)
def test_exact_numbers(evidence: Evidence, control: Evidence, verdict: Verdict, words: str) -> None:
    found = judge(claim(evidence, control)).part()
    assert found.verdict is verdict and words in found.reason


@pytest.mark.parametrize(
    ("evidence", "control", "verdict", "words"),
    [
        (around(0.5, 0.4), around(3, 1), Verdict.HOLDS, "measured 0.5 [0.1, 0.9], 6 seeds"),
        (around(2.0, 0.9), around(3, 1), Verdict.FAILS, "measured 2"),
        (around(0.79, 0.4), around(3, 1), Verdict.INCONCLUSIVE, "about 22 of the unit 'seed'"),
        (around(1.2, 0.4), around(3, 1), Verdict.INCONCLUSIVE, "would decide"),
        (around(1.0, 0.4), around(3, 1), Verdict.INCONCLUSIVE, "no number of units"),
        (around(0.5, 0.4), around(3, 2.5), Verdict.INCONCLUSIVE, "cannot be told from passing"),
        (around(0.5, 0.4), around(0.4, 0.1), Verdict.INCONCLUSIVE, "passes too"),
    ],
)
def test_the_whole_interval_decides(
    evidence: Evidence, control: Evidence, verdict: Verdict, words: str
) -> None:
    found = verdict_of(BELOW_ONE, evidence, control, Evidence(0.0))
    assert found[0] is verdict and words in found[1]


def test_a_control_that_may_never_pass_decides_nothing() -> None:
    told = verdict_of(BELOW_ONE, around(0.5, 0.1), around(3, 1), None)
    assert told[0] is Verdict.INCONCLUSIVE and "no case is known" in told[1]
    told = verdict_of(BELOW_ONE, around(0.5, 0.1), around(3, 1), around(0.9, 0.3))
    assert told[0] is Verdict.INCONCLUSIVE and "may never pass" in told[1]


def test_an_interval_across_both_bounds_is_on_neither_side() -> None:
    within = Threshold("within", (1.0, 2.0), "slope")
    assert within.side(1.2, 1.8) == "good"
    assert within.side(2.5, 3.0) == within.side(0.1, 0.9) == "bad"
    assert within.side(0.5, 2.5) == within.side(0.5, 1.5) == "both"
    assert within.side(math.nan, 1.5) == "both"


def parts(evidence: Sequence[Evidence]) -> Claim:
    one = claim(evidence[0])
    made = [
        Part("abcdef"[i], f"part {i}", BELOW_ONE, lambda p, e=e: e, lambda p: Evidence(9.0),
             lambda p: Evidence(0.0), "real fine-tuning")
        for i, e in enumerate(evidence)
    ]  # fmt: skip
    return replace(one, parts=tuple(made))


def test_parts_have_verdicts_of_their_own() -> None:
    outcome = judge(parts([around(0.5, 0.1), around(2.0, 0.1), Evidence(0.5)]))
    assert outcome.text == "a holds, b fails, c holds" and not outcome.holds
    assert outcome.part("b").confidence == pytest.approx(0.975)
    with pytest.raises(InputError, match="part of claim 1"):
        outcome.part("x")


def test_holm_is_the_step_down_rule_on_p_values() -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        found = [
            Evidence.mean((1.0 + random.normal(s, 0.3, 5)).tolist(), "seed")
            for s in random.normal(0, 0.5, 4)
        ]
        levels = holm([(BELOW_ONE, e) for e in found])
        sides = [BELOW_ONE.side(*e.bounds(level)) for e, level in zip(found, levels, strict=True)]
        p = [stats.ttest_1samp(e.interval.data, 1.0).pvalue for e in found if e.interval]
        rejected, order = [False] * 4, np.argsort(p)
        for rank, place in enumerate(order):
            if p[place] > 0.05 / (4 - rank):
                break
            rejected[place] = True
        assert [side != "both" for side in sides] == rejected


def test_one_part_is_judged_at_95_percent_and_exact_ones_do_not_count() -> None:
    assert holm([(BELOW_ONE, around(0.5, 0.1)), (BELOW_ONE, Evidence(0.1))])[0] == pytest.approx(
        0.95
    )
    assert holm([]) == []


def test_the_number_of_units_that_would_decide_grows_with_the_square_of_the_ratio() -> None:
    assert "about 22" in needed(BELOW_ONE, around(0.79, 0.4))  # 6 (0.4 / 0.21)²
    assert needed(BELOW_ONE, Evidence(0.5)) == ""


def test_measurement_and_controls_get_the_prediction() -> None:
    seen = []

    def seeing(value: float):
        return lambda prediction: (seen.append(prediction), Evidence(value))[1]

    judged = judge(
        replace(
            claim(Evidence(0.0)),
            parts=(),
            predict=lambda: {"slope": np.float64(2.0), "many": torch.arange(2)},
            measure=seeing(0.0),
            negative_control=seeing(1.0),
            passing_control=seeing(0.0),
        )
    )
    assert seen == [{"slope": 2.0, "many": [0, 1]}] * 3
    assert judged.prediction == seen[0]


def test_a_claim_on_runs_is_a_function_of_their_records() -> None:
    records = {"first": 0.25, "second": 0.75}
    on_runs = replace(
        claim(Evidence(0.0), threshold=Threshold("<=", 0.5, "number")),
        parts=(),
        predict=lambda of: {"sum": sum(map(of, records))},
        measure=lambda prediction, of: Evidence(of("first") * prediction["sum"]),
        negative_control=lambda prediction, of: Evidence(of("second")),
        passing_control=lambda prediction, of: Evidence(of("first")),
        runs=lambda: list(records),
    )
    judged = judge(on_runs, records.__getitem__)
    assert (judged.part().evidence.value, judged.part().control.value) == (0.25, 0.75)
    assert judged.prediction == {"sum": 1.0} and judged.holds
    with pytest.raises(InputError, match="rests on runs"):
        judge(on_runs)


def test_outcomes_print_and_survive_strict_json() -> None:
    outcome = replace(
        judge(parts([around(0.5, 0.1), Evidence(math.inf, details={"loss": torch.tensor(0.5)})])),
        runs=("a", "b"),
        code="c",
    )
    assert repr(outcome) == "Outcome(1, 'Costate gradient': a holds, b inconclusive)"
    assert "<th>verdict</th>" in outcome._repr_html_()
    text = json.dumps(outcome.to_dict(), allow_nan=False)
    assert Outcome.from_dict(json.loads(text)) == outcome


def test_records_of_something_else_are_refused() -> None:
    record = judge(claim(Evidence(0.0))).to_dict()
    for change in ({"parts": [{}]}, {"colour": 1}):
        with pytest.raises(InputError, match="not the record"):
            Outcome.from_dict({**record, **change})


def test_a_claim_needs_parts_of_different_names_on_a_known_ground() -> None:
    made = parts([Evidence(0.5)] * 2)
    with pytest.raises(InputError, match="one name"):
        replace(made, parts=(made.parts[0], made.parts[0]))
    with pytest.raises(InputError, match="has no parts"):
        replace(claim(Evidence(0.0)), parts=(), threshold=None)
    with pytest.raises(InputError, match="ground"):
        replace(made.parts[0], on="paper")


def test_numbers_that_are_not_finite_are_written_as_words() -> None:
    evidence = Evidence(math.nan, details={"losses": [1.0, math.inf]})
    record = judge(claim(evidence)).to_dict()["parts"][0]
    assert record["evidence"]["value"] == "nan"
    assert record["evidence"]["details"] == {"losses": [1.0, "inf"]}
    assert math.isnan(Evidence(**record["evidence"]).value)


@pytest.mark.parametrize(
    ("op", "value", "inside", "outside"),
    [
        ("<=", 1.0, 1.0, 1.1),
        ("<", 1.0, 0.9, 1.0),
        (">=", 1.0, 1.0, 0.9),
        (">", 1.0, 1.1, 1.0),
        ("within", (0.5, 2.0), 2.0, 2.1),
    ],
)
def test_thresholds(op: str, value: object, inside: float, outside: float) -> None:
    threshold = Threshold(op, value, "number")  # type: ignore[arg-type]
    assert threshold.passes(inside) and not threshold.passes(outside)
    assert not threshold.passes(math.nan)
    assert str(threshold) == f"number {threshold.condition}"


@pytest.mark.parametrize(
    ("op", "value"), [("=<", 1.0), ("<=", (0.0, 1.0)), ("within", 1.0), ("within", (1.0,))]
)
def test_bad_thresholds_are_refused(op: str, value: object) -> None:
    with pytest.raises(InputError, match="[Tt]hreshold"):
        Threshold(op, value, "number")  # type: ignore[arg-type]


def test_verdicts_are_words() -> None:
    assert [v.text for v in Verdict] == ["holds", "fails", "inconclusive", "assumption not met"]


def test_nothing_here_imports_torch() -> None:
    modules = ", ".join(f"deltacontrol.theory.{m}" for m in ("claims", "evidence", "judging"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_number_beside_its_own_interval_decides_nothing() -> None:
    """A biased bootstrap can have all of its draws below a bound that the number exceeds."""
    threshold = Threshold("<=", 1.0, "x")
    beside = Evidence(1.5, Interval("bootstrap", "x", 9, (0.1, 0.2, 0.3)))
    good, bad = Evidence(0.0), Evidence(9.0)
    assert verdict_of(threshold, beside, bad, good)[0] is Verdict.INCONCLUSIVE
    assert verdict_of(threshold, good, bad, beside)[0] is Verdict.INCONCLUSIVE
    other = Evidence(0.5, Interval("bootstrap", "x", 9, (1.1, 1.2, 1.3)))
    assert verdict_of(threshold, good, other, good)[0] is Verdict.INCONCLUSIVE


def test_a_reason_names_the_confidence_that_decided() -> None:
    found = Evidence.mean([0.1, 0.2, 0.3], "seed")
    one = verdict_of(Threshold("<=", 1.0, "x"), found, Evidence(9.0), Evidence(0.0))
    two = verdict_of(
        Threshold("<=", 1.0, "x"), found, Evidence(9.0), Evidence(0.0), confidence=0.975
    )
    assert "%" not in one[1] and "at 97.5 %" in two[1]


def test_a_threshold_that_nothing_meets_is_refused() -> None:
    with pytest.raises(InputError, match="no number can meet"):
        Threshold("within", (0.2, -0.2), "x")


def test_a_number_next_to_its_bound_names_no_number_of_units() -> None:
    found = Evidence.mean([5e-324, 1.0, -1.0], "seed")
    assert "no number of units" in needed(Threshold("<=", 0.0, "x"), found)
