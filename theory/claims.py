"""Claims: a statement, a prediction, a measurement, a threshold, a negative control.

The threshold is part of the claim, hence fixed before anything is measured. A claim is judged in
four steps that never look ahead:

1. ``predict()`` computes numbers without training;
2. ``measure(prediction)`` gives the `Evidence`, one number to be held against the `Threshold`;
3. ``negative_control(prediction)`` measures again with an assumption broken on purpose: a check
   with any power must fail there;
4. the `Verdict` follows:

   =======================================================  ======================
   assumption of the statement not met in the measurement   ``assumption_not_met``
   measured number, or the control's, is not a number       ``inconclusive``
   measured number is infinite                              ``inconclusive``
   the negative control passes the threshold too            ``inconclusive``
   the measured number passes the threshold                 ``holds``
   otherwise                                                ``fails``
   =======================================================  ======================

A claim that rests on recorded runs names them in ``runs``. Its three functions then take, as their
last argument, a function that gives the record of each of these runs, so that the claim is judged
anew from records alone.

The module does not import torch.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError, unknown

__all__ = ["Claim", "Evidence", "Outcome", "Records", "Threshold", "Verdict", "judge", "verdict_of"]

Prediction = Mapping[str, Any]
Records = Callable[[Any], Any]  # from an experiment to its record

_OPERATORS: dict[str, Callable[[float, Any], bool]] = {
    "<=": lambda value, bound: value <= bound,
    "<": lambda value, bound: value < bound,
    ">=": lambda value, bound: value >= bound,
    ">": lambda value, bound: value > bound,
    "within": lambda value, bounds: bounds[0] <= value <= bounds[1],
}


class Verdict(StrEnum):
    """What the evidence says about a claim."""

    HOLDS = "holds"
    FAILS = "fails"
    INCONCLUSIVE = "inconclusive"
    ASSUMPTION_NOT_MET = "assumption_not_met"

    @property
    def text(self) -> str:
        """The verdict as words."""
        return self.value.replace("_", " ")


@typed
@dataclass(frozen=True)
class Threshold:
    """The condition that a measured number must meet, written before it is measured.

    Attributes:
        op: ``"<="``, ``"<"``, ``">="``, ``">"`` or ``"within"``.
        value: the bound, or for ``"within"`` the pair of a lower and an upper bound.
        description: which number is meant, such as ``"relative difference of the gradients"``.

    Raises:
        InputError: for an unknown operator, or a value that does not fit it.

    Example:
        >>> Threshold("<=", 1e-12, "relative difference").passes(3e-16)
        True
    """

    op: str
    value: float | tuple[float, float]
    description: str

    def __post_init__(self) -> None:
        """Check the operator and its bound."""
        if self.op not in _OPERATORS:
            raise unknown("threshold operator", self.op, _OPERATORS)
        bounds = self.value if isinstance(self.value, tuple | list) else (self.value,)
        if len(bounds) != (2 if self.op == "within" else 1):
            raise InputError(
                f"threshold {self.op!r} does not take the value {self.value!r}; 'within' takes a "
                "pair (low, high), the others one number"
            )
        plain = tuple(float(bound) for bound in bounds)
        object.__setattr__(self, "value", plain if self.op == "within" else plain[0])

    def passes(self, value: float) -> bool:
        """Whether the number meets the condition; NaN never does."""
        return bool(_OPERATORS[self.op](value, self.value))

    def __str__(self) -> str:
        """The condition as words."""
        if isinstance(self.value, tuple):
            return f"{self.description} within [{self.value[0]:g}, {self.value[1]:g}]"
        return f"{self.description} {self.op} {self.value:g}"


@dataclass(frozen=True)
class Evidence:
    """One measured number and what stands behind it.

    Attributes:
        value: the number that the threshold judges.
        details: further numbers, words or lists, kept in the record.
        assumption_met: whether the statement's assumptions held in this measurement.
        note: a sentence for the reader.
        spread: a lower and an upper bound for the value, such as over seeds.
    """

    value: float
    details: Mapping[str, Any] = field(default_factory=dict)
    assumption_met: bool = True
    note: str = ""
    spread: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Turn numbers of numpy and torch into those of Python."""
        object.__setattr__(self, "value", float(self.value))
        object.__setattr__(self, "details", _plain(self.details))
        object.__setattr__(self, "assumption_met", bool(self.assumption_met))
        if self.spread is not None:
            low, high = self.spread
            object.__setattr__(self, "spread", (float(low), float(high)))


@dataclass(frozen=True)
class Claim:
    """A statement of theory with the experiment that can refute it.

    Attributes:
        id: the number on the scoreboard.
        name: a short name, used in file names and on the command line.
        title: a few words for a table.
        statement: the statement, with its assumptions.
        source: the publication, with the number of the equation or theorem.
        threshold: the condition on the measured number.
        predict: computes numbers without training.
        measure: measures, given the prediction.
        negative_control: measures with an assumption broken, given the prediction.
        runs: the experiments whose records the claim rests on. With it, ``predict(records)``,
            ``measure(prediction, records)`` and ``negative_control(prediction, records)`` take a
            function from an experiment to its record; they read nothing else that was measured.
        notebook: the file in ``proofs_notebooks`` that derives it; a user's claim needs none.
    """

    id: int
    name: str
    title: str
    statement: str
    source: str
    threshold: Threshold
    predict: Callable[..., Prediction]
    measure: Callable[..., Evidence]
    negative_control: Callable[..., Evidence]
    runs: Callable[[], Sequence[Any]] | None = None
    notebook: str = ""


@dataclass(frozen=True, repr=False)
class Outcome:
    """A judged claim, as it is stored.

    Attributes:
        id: the claim's number. Also name, title, statement, source and notebook are the claim's.
        threshold: the condition that was fixed beforehand.
        prediction: what `Claim.predict` gave.
        evidence: the measurement.
        control: the measurement with an assumption broken.
        verdict: what follows.
        reason: why, in one sentence.
        runs: ids of the runs that the numbers were computed from.
        code: digest of the code that measured; None where it is not known.
    """

    id: int
    name: str
    title: str
    statement: str
    source: str
    notebook: str
    threshold: Threshold
    prediction: Mapping[str, Any]
    evidence: Evidence
    control: Evidence
    verdict: Verdict
    reason: str
    runs: tuple[str, ...] = ()
    code: str | None = None

    def __post_init__(self) -> None:
        """Take a list of runs, as JSON has it."""
        object.__setattr__(self, "runs", tuple(self.runs))

    def __repr__(self) -> str:
        """One line: the number, the title, the verdict and its reason."""
        return f"Outcome({self.id}, {self.title!r}: {self.verdict.text}; {self.reason})"

    def _repr_html_(self) -> str:
        rows = {
            "claim": f"{self.id}. {self.title}",
            "statement": self.statement,
            "condition": str(self.threshold),
            "measured": f"{self.evidence.value:.3g}",
            "negative control": f"{self.control.value:.3g}",
            "verdict": self.verdict.text,
        }
        cells = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
            for name, text in rows.items()
        )
        return f"<table>{cells}</table>"

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries for JSON; numbers that are not finite become words such as "nan"."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("threshold", "evidence", "control"):
            record[name] = dict(vars(record[name]))
        return _json({**record, "verdict": self.verdict.value})

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Outcome:
        """The inverse of `to_dict`.

        Raises:
            InputError: if an entry is missing or unexpected.
        """
        try:
            threshold, evidence, control = (
                dict(record[name]) for name in ("threshold", "evidence", "control")
            )
            rest = {
                **record,
                "threshold": Threshold(**threshold),
                "evidence": Evidence(**evidence),
                "control": Evidence(**control),
                "verdict": Verdict(record["verdict"]),
            }
            return cls(**rest)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"this is not the record of a judged claim: {error}") from error


def judge(claim: Claim, records: Records | None = None) -> Outcome:
    """Predict, measure, run the negative control, and give the verdict.

    Args:
        claim: What is judged.
        records: From each of the claim's runs to its record.

    Raises:
        InputError: the claim rests on runs, and no records were given.
    """
    if claim.runs is not None and records is None:
        raise InputError(f"claim {claim.id} rests on runs; hand over their records to judge it")
    given = () if claim.runs is None else (records,)
    prediction = _plain(claim.predict(*given))
    evidence = claim.measure(prediction, *given)
    control = claim.negative_control(prediction, *given)
    verdict, reason = verdict_of(claim.threshold, evidence, control)
    return Outcome(
        id=claim.id,
        name=claim.name,
        title=claim.title,
        statement=claim.statement,
        source=claim.source,
        notebook=claim.notebook,
        threshold=claim.threshold,
        prediction=prediction,
        evidence=evidence,
        control=control,
        verdict=verdict,
        reason=reason,
    )


def verdict_of(threshold: Threshold, evidence: Evidence, control: Evidence) -> tuple[Verdict, str]:
    """The verdict that a measurement and its negative control give, and why."""
    value = f"{evidence.value:.3g}"
    if not evidence.assumption_met:
        reason = evidence.note or "an assumption of the statement did not hold here"
        return Verdict.ASSUMPTION_NOT_MET, reason
    if not math.isfinite(evidence.value):
        return Verdict.INCONCLUSIVE, f"the measurement gave {value}"
    if math.isnan(control.value):
        return Verdict.INCONCLUSIVE, "the negative control gave no number"
    if threshold.passes(control.value):
        reason = f"the negative control passes too ({control.value:.3g}), so the check has no power"
        return Verdict.INCONCLUSIVE, reason
    if threshold.passes(evidence.value):
        return Verdict.HOLDS, f"measured {value}, required {threshold}"
    return Verdict.FAILS, f"measured {value}, required {threshold}"


def _plain(value: Any) -> Any:
    """Numbers, words, lists and dictionaries of Python; numpy and torch values are unwrapped."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    raise InputError(
        f"a claim's details hold a {type(value).__name__}; use numbers, words, lists or mappings"
    )


def _json(value: Any) -> Any:
    if isinstance(value, Threshold | Evidence):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
