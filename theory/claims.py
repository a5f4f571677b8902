"""Claims: a statement, a prediction, a measurement with its interval, a threshold, a control.

The threshold is part of the claim, hence fixed before anything is measured. What can differ is a
*part* of a claim, with a verdict of its own: `deltacontrol.theory.judging` has the rules.

A claim that rests on recorded runs names them in ``runs``. Its functions then take, as their last
argument, a function that gives the record of each of these runs, so that the claim is judged anew
from records alone.

The module does not import torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, get_args

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError, unknown
from deltacontrol.theory.evidence import Evidence

__all__ = ["Claim", "Evidence", "Part", "Prediction", "Records", "Threshold", "Verdict"]

Prediction = Mapping[str, Any]
Records = Callable[[Any], Any]  # from an experiment to its record
Measurement = Callable[..., Evidence]
Ground = Literal["exact problem", "random network", "real model, untrained", "real fine-tuning"]
_NAME = re.compile(r"\w[\w-]{0,79}")
GROUNDS: tuple[str, ...] = get_args(Ground)

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
        plain_bounds = tuple(float(bound) for bound in bounds)
        if plain_bounds[0] > plain_bounds[-1]:
            raise InputError(
                f"threshold {self.op!r} has the value {self.value!r}, which no number can meet; "
                "expected the lower bound before the upper one"
            )
        object.__setattr__(self, "value", plain_bounds if self.op == "within" else plain_bounds[0])

    def passes(self, value: float) -> bool:
        """Whether the number meets the condition; NaN never does."""
        return bool(_OPERATORS[self.op](value, self.value))

    def side(self, low: float, high: float) -> Literal["good", "bad", "both"]:
        """On which side an interval lies wholly; one with an end that is NaN is on both."""
        if math.isnan(low) or math.isnan(high):
            return "both"
        ends = self.passes(low), self.passes(high)
        if all(ends):
            return "good"
        if any(ends):
            return "both"
        # Of a pair of bounds both ends may be outside, one on each side.
        across = isinstance(self.value, tuple) and low < self.value[0] and high > self.value[1]
        return "both" if across else "bad"

    def distance(self, value: float) -> float:
        """How far a number is from the nearest bound."""
        bounds = self.value if isinstance(self.value, tuple) else (self.value,)
        return min(abs(value - bound) for bound in bounds)

    @property
    def condition(self) -> str:
        """The bound alone, such as ``<= 0.25``."""
        if isinstance(self.value, tuple):
            return f"within [{self.value[0]:g}, {self.value[1]:g}]"
        return f"{self.op} {self.value:g}"

    def __str__(self) -> str:
        """The condition as words."""
        return f"{self.description} {self.condition}"


@dataclass(frozen=True)
class Part:
    """What of a claim has a verdict of its own.

    Attributes:
        name: a letter; empty for a claim of one part.
        title: a few words for a table.
        threshold: the condition on the measured number.
        measure: measures, given the prediction.
        negative_control: measures with one assumption broken, given the prediction.
        passing_control: the control in a case in which it must pass; None where none is known.
        on: what was measured: an exact problem, a random network, a real model or fine-tuning.
    """

    name: str
    title: str
    threshold: Threshold
    measure: Measurement
    negative_control: Measurement
    passing_control: Measurement | None
    on: Ground

    def __post_init__(self) -> None:
        """Check the ground."""
        if self.on not in GROUNDS:
            raise unknown("ground of a claim", self.on, GROUNDS)


@dataclass(frozen=True)
class Claim:
    """A statement of theory with the experiment that can refute it.

    Attributes:
        id: the number on the scoreboard.
        name: a short name, used in file names and on the command line.
        title: a few words for a table.
        statement: the statement, with its assumptions.
        source: the publication, with the number of the equation or theorem.
        predict: computes numbers without training.
        parts: what is judged, each part by itself.
        runs: the experiments whose records the claim rests on. With it, ``predict(records)``,
            ``measure(prediction, records)`` and the controls take a function from an experiment to
            its record; they read nothing else that was measured.
        notebook: the file in ``proofs_notebooks`` that derives it; a user's claim needs none.
        revised: why the check is another one than that of an earlier result; empty if it is not.
        threshold: of a claim of one part, as all that follows, in the place of ``parts``.
        measure: see `Part`.
        negative_control: see `Part`.
        passing_control: see `Part`.
        on: see `Part`.

    Raises:
        InputError: it has no part, or two of one name, or its own name is none of a file.
    """

    id: int
    name: str
    title: str
    statement: str
    source: str
    predict: Callable[..., Prediction]
    parts: tuple[Part, ...] = ()
    runs: Callable[[], Sequence[Any]] | None = None
    notebook: str = ""
    revised: str = ""
    threshold: Threshold | None = None
    measure: Measurement | None = None
    negative_control: Measurement | None = None
    passing_control: Measurement | None = None
    on: Ground = "exact problem"

    def __post_init__(self) -> None:
        """Make the one part, and check the names."""
        if not _NAME.fullmatch(self.name):
            raise InputError(
                f"the name of claim {self.id} is {self.name!r}, which names files; expected at "
                "most 80 letters, digits, - and _, such as my-idea"
            )
        if not self.parts:
            one = self.threshold, self.measure, self.negative_control
            if any(piece is None for piece in one):
                raise InputError(
                    f"claim {self.id} has no parts, and threshold, measure or negative_control is "
                    "missing; expected parts, or all three"
                )
            part = Part("", self.title, *one, self.passing_control, self.on)  # type: ignore[arg-type]
            object.__setattr__(self, "parts", (part,))
        names = [part.name for part in self.parts]
        if len(set(names)) != len(names):
            raise InputError(f"claim {self.id} has parts of one name: {names}")
