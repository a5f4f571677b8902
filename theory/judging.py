"""How a claim is judged, and the judged claim.

A part of a claim is judged in steps that never look ahead:

1. ``predict()`` computes numbers without training;
2. ``measure(prediction)`` gives the `Evidence`: one number with its interval, and the assumptions
   of the statement that were checked;
3. ``negative_control(prediction)`` measures again with one assumption broken on purpose, all else
   equal; ``passing_control(prediction)`` runs that same control in a case in which nothing is
   broken, or in which breaking it does no harm: it shows that the control can pass;
4. the `Verdict` follows from whole intervals:

   =========================================================  ======================
   an assumption of the statement was not met                 ``assumption_not_met``
   a number is no number, or the measured one is infinite     ``inconclusive``
   the control's interval is not wholly on the bad side       ``inconclusive``
   the passing case's interval is not wholly on the good one  ``inconclusive``
   a number is on another side than its interval              ``inconclusive``
   no such case is known                                      ``inconclusive``
   the measured interval is wholly on the good side           ``holds``
   the measured interval is wholly on the bad side            ``fails``
   otherwise                                                  ``inconclusive``
   =========================================================  ======================

Intervals are of 95 %. The parts of one claim are judged together by Holm's step-down rule: with k
parts that have intervals, the clearest is judged at 1 - 0.05/k, the next at 1 - 0.05/(k - 1), and
so on, until one cannot be told, after which none is (Holm, Scandinavian Journal of Statistics 6(2),
1979). Each error then has a chance of at most 2.5 % in each direction for the whole claim.

The module does not import torch.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from deltacontrol.theory.claims import Claim, Part, Records, Threshold, Verdict
from deltacontrol.theory.errors import InputError, unknown
from deltacontrol.theory.evidence import CONFIDENCE, Evidence, plain

__all__ = ["Judgement", "Outcome", "holm", "judge", "judgements", "needed", "verdict_of"]

FARTHEST = 1e6  # half widths of an interval to a bound, beyond which no number of units is named


@dataclass(frozen=True)
class Judgement:
    """A judged part, as it is stored.

    Attributes:
        name: the part's. Also title, threshold and on are the part's.
        evidence: the measurement.
        control: the measurement with an assumption broken.
        passing: the control in a case in which it must pass, or None.
        confidence: at which the interval was judged, by Holm's rule.
        verdict: what follows.
        reason: why, in one sentence.
    """

    name: str
    title: str
    threshold: Threshold
    on: str
    evidence: Evidence
    control: Evidence
    passing: Evidence | None
    confidence: float
    verdict: Verdict
    reason: str

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Judgement:
        """From plain values."""
        passing = record["passing"]
        rest = {
            **record,
            "threshold": Threshold(**record["threshold"]),
            "evidence": Evidence(**record["evidence"]),
            "control": Evidence(**record["control"]),
            "passing": None if passing is None else Evidence(**passing),
            "verdict": Verdict(record["verdict"]),
        }
        return cls(**rest)


@dataclass(frozen=True, repr=False)
class Outcome:
    """A judged claim, as it is stored.

    Attributes:
        id: the claim's number. Also name, title, statement, source and notebook are the claim's.
        prediction: what `Claim.predict` gave.
        parts: each part's measurement, control and verdict.
        runs: ids of the runs that the numbers were computed from.
        code: digest of the code that measured; None where it is not known.
    """

    id: int
    name: str
    title: str
    statement: str
    source: str
    notebook: str
    prediction: Mapping[str, Any]
    parts: tuple[Judgement, ...]
    runs: tuple[str, ...] = ()
    code: str | None = None

    def __post_init__(self) -> None:
        """Take lists, as JSON has them."""
        object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "runs", tuple(self.runs))

    @property
    def holds(self) -> bool:
        """Whether every part holds."""
        return all(part.verdict is Verdict.HOLDS for part in self.parts)

    @property
    def text(self) -> str:
        """The verdicts in words, such as ``a holds, b fails``."""
        return ", ".join(f"{part.name} {part.verdict.text}".strip() for part in self.parts)

    def part(self, name: str = "") -> Judgement:
        """A part by its name.

        Raises:
            InputError: there is none of that name.
        """
        found = {part.name: part for part in self.parts}
        if name not in found:
            raise unknown(f"part of claim {self.id}", name, found)
        return found[name]

    def __repr__(self) -> str:
        """One line: the number, the title, the verdicts."""
        return f"Outcome({self.id}, {self.title!r}: {self.text})"

    def _repr_html_(self) -> str:
        head = f"<tr><th>claim</th><td>{self.id}. {html.escape(self.title)}</td></tr>"
        head += f"<tr><th>statement</th><td>{html.escape(self.statement)}</td></tr>"
        for part in self.parts:
            rows = {
                f"condition {part.name}".strip(): str(part.threshold),
                "measured": part.evidence.text,
                "negative control": part.control.text,
                "verdict": f"{part.verdict.text}: {part.reason}",
            }
            for name, text in rows.items():
                head += f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
        return f"<table>{head}</table>"

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries for JSON; numbers that are not finite become words such as "nan"."""
        return _json({f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Outcome:
        """The inverse of `to_dict`.

        Raises:
            InputError: if an entry is missing or unexpected.
        """
        try:
            parts = [Judgement.from_dict(part) for part in record["parts"]]
            return cls(**{**record, "parts": parts})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"this is not the record of a judged claim: {error}") from error


def judge(claim: Claim, records: Records | None = None) -> Outcome:
    """Predict, measure, run the controls, and give the verdicts.

    Args:
        claim: What is judged.
        records: From each of the claim's runs to its record.

    Raises:
        InputError: the claim rests on runs, and no records were given.
    """
    if claim.runs is not None and records is None:
        raise InputError(f"claim {claim.id} rests on runs; hand over their records to judge it")
    given = () if claim.runs is None else (records,)
    prediction = plain(claim.predict(*given))
    found = []
    for part in claim.parts:
        passing = None if part.passing_control is None else part.passing_control(prediction, *given)
        pieces = part.measure(prediction, *given), part.negative_control(prediction, *given)
        for name, piece in zip(("measure", "negative_control"), pieces, strict=True):
            _require_evidence(claim, name, piece)
        if part.passing_control is not None:
            _require_evidence(claim, "passing_control", passing)
        found.append((*pieces, passing))
    return Outcome(
        id=claim.id,
        name=claim.name,
        title=claim.title,
        statement=claim.statement,
        source=claim.source,
        notebook=claim.notebook,
        prediction=prediction,
        parts=judgements(claim.parts, found),
    )


def _require_evidence(claim: Claim, name: str, piece: object) -> None:
    if not isinstance(piece, Evidence):
        raise InputError(
            f"{name} of claim {claim.id} gives a {type(piece).__name__}; expected an Evidence, "
            "such as Evidence.mean(values, unit) or Evidence(value)"
        )


def judgements(
    parts: Sequence[Part], found: Sequence[tuple[Evidence, Evidence, Evidence | None]]
) -> tuple[Judgement, ...]:
    """The verdicts of all parts, from what was measured: evidence, control and passing case."""
    levels = holm([(p.threshold, e) for p, (e, _, _) in zip(parts, found, strict=True)])
    judged = []
    for part, pieces, level in zip(parts, found, levels, strict=True):
        verdict, reason = verdict_of(part.threshold, *pieces, confidence=level)
        judged.append(
            Judgement(
                part.name, part.title, part.threshold, part.on, *pieces, level, verdict, reason
            )
        )
    return tuple(judged)


def holm(found: Sequence[tuple[Threshold, Evidence]]) -> list[float]:
    """The confidence at which each part is judged, by Holm's step-down rule."""
    levels = [CONFIDENCE] * len(found)
    errors = {
        i: _least_error(threshold, evidence)
        for i, (threshold, evidence) in enumerate(found)
        if evidence.interval is not None
    }
    allowed, errors_told = 0.0, True
    for rank, (i, error) in enumerate(sorted(errors.items(), key=lambda item: item[1])):
        if errors_told:
            allowed = (1 - CONFIDENCE) / (len(errors) - rank)
        errors_told = error <= allowed
        levels[i] = 1 - allowed
    return levels


def _least_error(threshold: Threshold, evidence: Evidence) -> float:
    """The least α at whose confidence 1 - α the interval lies wholly on one side; 1 if at none."""
    low, high = 1e-9, 1 - 1e-9  # of the confidence; the wider the interval the less it tells
    if threshold.side(*evidence.bounds(low)) == "both":
        return 1.0
    if threshold.side(*evidence.bounds(high)) != "both":
        return 1 - high
    for _ in range(60):
        middle = (low + high) / 2
        if threshold.side(*evidence.bounds(middle)) == "both":
            high = middle
        else:
            low = middle
    return 1 - low


def verdict_of(
    threshold: Threshold,
    evidence: Evidence,
    control: Evidence,
    passing: Evidence | None,
    *,
    confidence: float = CONFIDENCE,
) -> tuple[Verdict, str]:
    """The verdict that a measurement and its controls give, and why."""
    unsure = Verdict.INCONCLUSIVE
    if not evidence.assumption_met:
        missed = [name for name, met in evidence.assumptions.items() if not met]
        return Verdict.ASSUMPTION_NOT_MET, "not met here: " + "; ".join(missed)
    if not math.isfinite(evidence.value):
        return unsure, f"the measurement gave {evidence.value:.3g}"
    if math.isnan(control.value):
        return unsure, "the negative control gave no number"
    if _side(threshold, control) != "bad":
        told = "passes too" if threshold.passes(control.value) else "cannot be told from passing"
        return unsure, f"the negative control {told} ({control.text}): the check has no power"
    if passing is None:
        return unsure, "no case is known in which the negative control passes"
    if _side(threshold, passing) != "good":
        reason = f"the control does not pass where it should ({passing.text}): it may never pass"
        return unsure, reason
    side = _side(threshold, evidence, confidence)
    told = f"measured {evidence.text_at(confidence)}, required {threshold}"
    if side == "both":
        return unsure, f"{told}{needed(threshold, evidence, confidence)}"
    return (Verdict.HOLDS if side == "good" else Verdict.FAILS), told


def _side(threshold: Threshold, evidence: Evidence, confidence: float = CONFIDENCE) -> str:
    """On which side a number lies with its whole interval, which need not contain it."""
    side = threshold.side(*evidence.bounds(confidence))
    return side if side == threshold.side(evidence.value, evidence.value) else "both"


def needed(threshold: Threshold, evidence: Evidence, confidence: float = CONFIDENCE) -> str:
    """How many units would decide, in words, if the value stayed where it is."""
    if evidence.interval is None:
        return ""
    low, high = evidence.bounds(confidence)
    distance = threshold.distance(evidence.value)
    half = max(high - evidence.value, evidence.value - low)
    if not distance > 0 or not math.isfinite(half):
        return "; no number of units would decide at this value"
    times = half / distance
    if not times < FARTHEST:
        return "; no number of units would decide at this value"
    count = math.ceil(evidence.interval.count * times**2)
    if count <= evidence.interval.count:  # the number is beside its own interval
        return ""
    return f"; about {count} of the unit {evidence.interval.unit!r} would decide"


def _json(value: Any) -> Any:
    if isinstance(value, Evidence):
        value = value.to_dict()
    if isinstance(value, Threshold | Judgement):
        value = dict(vars(value))
    if isinstance(value, Verdict):
        return value.value
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
