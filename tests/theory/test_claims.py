"""Verdicts of claims, and records that survive JSON."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from deltacontrol.theory.claims import Claim, Evidence, Outcome, Threshold, Verdict, judge
from deltacontrol.theory.errors import InputError

SMALL = Threshold("<=", 1e-12, "relative difference")


def claim(
    evidence: Evidence, control: Evidence | None = None, threshold: Threshold = SMALL
) -> Claim:
    broken = Evidence(0.3) if control is None else control
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
        negative_control=lambda prediction: broken,
    )


@pytest.mark.parametrize(
    ("evidence", "control", "verdict", "words"),
    [
        (Evidence(1e-15), Evidence(0.3), Verdict.HOLDS, "relative difference <= 1e-12"),
        (Evidence(1e-3), Evidence(0.3), Verdict.FAILS, "measured 0.001"),
        (Evidence(1e-15), Evidence(1e-14), Verdict.INCONCLUSIVE, "no power"),
        (Evidence(1e-3), Evidence(1e-14), Verdict.INCONCLUSIVE, "no power"),
        (Evidence(math.nan), Evidence(0.3), Verdict.INCONCLUSIVE, "nan"),
        (Evidence(-math.inf), Evidence(0.3), Verdict.INCONCLUSIVE, "-inf"),
        (Evidence(1e-15), Evidence(math.nan), Verdict.INCONCLUSIVE, "gave no number"),
        (Evidence(1e-15), Evidence(math.inf), Verdict.HOLDS, "measured 1e-15"),
        (
            Evidence(1e-15, assumption_met=False, note="the layer is not linear"),
            Evidence(0.3),
            Verdict.ASSUMPTION_NOT_MET,
            "the layer is not linear",
        ),
        (
            Evidence(math.nan, assumption_met=False),
            Evidence(1e-14),
            Verdict.ASSUMPTION_NOT_MET,
            "assumption",
        ),
        (
            Evidence(1e-15),
            Evidence(0.3, assumption_met=False),
            Verdict.HOLDS,
            "measured",
        ),
    ],
)
def test_verdict(evidence: Evidence, control: Evidence, verdict: Verdict, words: str) -> None:
    outcome = judge(claim(evidence, control))
    assert outcome.verdict is verdict
    assert words in outcome.reason


def test_measurement_and_control_get_the_prediction() -> None:
    seen = []

    def measure(prediction: object) -> Evidence:
        seen.append(prediction)
        return Evidence(0.0)

    judged = judge(
        replace(
            claim(Evidence(0.0)),
            predict=lambda: {"slope": np.float64(2.0), "many": torch.arange(2)},
            measure=measure,
            negative_control=lambda p: (seen.append(p), Evidence(1.0))[1],
        )
    )
    assert seen == [{"slope": 2.0, "many": [0, 1]}] * 2
    assert judged.prediction == seen[0]


def test_a_claim_on_runs_is_a_function_of_their_records() -> None:
    records = {"first": 0.25, "second": 0.75}
    on_runs = replace(
        claim(Evidence(0.0), threshold=Threshold("<=", 0.5, "number")),
        predict=lambda of: {"sum": sum(map(of, records))},
        measure=lambda prediction, of: Evidence(of("first") * prediction["sum"]),
        negative_control=lambda prediction, of: Evidence(of("second")),
        runs=lambda: list(records),
    )
    judged = judge(on_runs, records.__getitem__)
    assert (judged.evidence.value, judged.control.value) == (0.25, 0.75)
    assert judged.prediction == {"sum": 1.0} and judged.verdict is Verdict.HOLDS
    with pytest.raises(InputError, match="rests on runs"):
        judge(on_runs)


def test_outcomes_print_in_a_line_and_as_a_table() -> None:
    outcome = replace(judge(claim(Evidence(1e-15))), runs=("a", "b"), code="c")
    assert repr(outcome).startswith("Outcome(1, 'Costate gradient': holds; measured 1e-15")
    assert "<th>verdict</th><td>holds</td>" in outcome._repr_html_()
    again = Outcome.from_dict(json.loads(json.dumps(outcome.to_dict())))
    assert again == outcome and again.runs == ("a", "b") and again.code == "c"


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
    threshold = Threshold(op, value, "number")
    assert threshold.passes(inside)
    assert not threshold.passes(outside)
    assert not threshold.passes(math.nan)
    assert str(threshold).startswith("number ")


@pytest.mark.parametrize(
    ("op", "value"), [("=<", 1.0), ("<=", (0.0, 1.0)), ("within", 1.0), ("within", (1.0,))]
)
def test_bad_thresholds_are_refused(op: str, value: object) -> None:
    with pytest.raises(InputError, match="[Tt]hreshold"):
        Threshold(op, value, "number")


def test_outcomes_survive_strict_json() -> None:
    outcome = judge(
        claim(
            Evidence(
                np.float32(0.7),
                details={"seeds": (0, 1), "loss": torch.tensor(0.5), "name": "movie", "none": None},
                note="three seeds",
                spread=(0.6, np.float64(0.8)),
            ),
            Evidence(math.inf),
            Threshold("within", (0.5, 2.0), "ratio"),
        )
    )
    text = json.dumps(outcome.to_dict(), allow_nan=False)
    again = Outcome.from_dict(json.loads(text))
    assert again == outcome
    assert again.to_dict() == outcome.to_dict()
    assert again.control.value == math.inf and again.threshold.value == (0.5, 2.0)
    assert again.evidence.spread == (0.6, 0.8)


def test_numbers_that_are_not_finite_are_written_as_words() -> None:
    record = judge(claim(Evidence(math.nan, details={"losses": [1.0, math.inf]}))).to_dict()
    assert record["evidence"]["value"] == "nan"
    assert record["evidence"]["details"] == {"losses": [1.0, "inf"]}
    assert math.isnan(Outcome.from_dict(record).evidence.value)


@pytest.mark.parametrize("change", [{"verdict": "maybe"}, {"extra": 1}, {"evidence": {}}])
def test_broken_records_are_refused(change: dict[str, object]) -> None:
    record = judge(claim(Evidence(0.0))).to_dict()
    with pytest.raises(InputError, match="not the record of a judged claim"):
        Outcome.from_dict({**record, **change})


def test_details_must_be_plain() -> None:
    with pytest.raises(InputError, match="object"):
        Evidence(0.0, details={"x": object()})


def test_verdicts_are_words() -> None:
    assert [v.text for v in Verdict] == ["holds", "fails", "inconclusive", "assumption not met"]


def test_claims_and_errors_do_not_import_torch() -> None:
    modules = "deltacontrol.theory.claims, deltacontrol.theory.errors"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
