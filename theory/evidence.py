"""Evidence: a measured number, the interval that its replication gives, and what was assumed.

A number is replicated over a *unit*, such as seeds, tasks, draws or rows, which is named. Its
interval is taken over that unit:

    ==============  =====================================================================
    ``t``           the mean of n independent values; Student's t with n - 1 degrees
    ``geometric``   the geometric mean of n positive values; Student's t of their logarithms
    ``bootstrap``   any statistic of the units, which are drawn again with replacement; quantiles
                    of the draws, as much further out as Student's are for so few units
    ``binomial``    a share of successes; Clopper & Pearson, Biometrika 26(4), 1934
    ==============  =====================================================================

The quantiles of a bootstrap of n units lie too far inside, as if spread were divided by n and the
normal law held: at a false bound a quarter of all samples of two passes instead of one in forty.
They are therefore taken at the levels Φ(-√(n/(n-1)) t_{n-1}) (Hesterberg, The American Statistician
69(4), 2015, "expanded percentiles"); fewer than five units are not drawn again at all.

What an interval keeps is enough to give it at any confidence, so that several parts of one claim
can be judged together. A number without an interval is exact: the largest error, say, over a stated
number of cases.

The module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

from deltacontrol.theory.errors import InputError, unknown

__all__ = ["CONFIDENCE", "Evidence", "Interval", "units"]

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 4000
QUANTILES = 801  # of the bootstrap's draws that are kept
LEAST_ROWS = 5  # that are drawn again
_PLURALS = {"corpus": "corpora"}  # of units whose plural is no s


def units(count: int, unit: str) -> str:
    """How many of a unit, in words.

    Example:
        >>> units(1, "corpus"), units(6, "corpus"), units(5, "seed")
        ('1 corpus', '6 corpora', '5 seeds')
    """
    return f"{count} {_PLURALS.get(unit, f'{unit}s') if count > 1 else unit}"


@dataclass(frozen=True)
class Interval:
    """What is needed to give the interval of a number at any confidence.

    Attributes:
        method: how the interval follows, see the module.
        unit: what was replicated, such as ``"seed"``.
        count: how many of them.
        data: the values of the units (``t``, ``geometric``), evenly spaced quantiles of the draws
            (``bootstrap``), or the number of successes alone (``binomial``).

    Raises:
        InputError: for an unknown method, or too few units.
    """

    method: Literal["t", "geometric", "bootstrap", "binomial"]
    unit: str
    count: int
    data: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the method and the number of units."""
        if self.method not in _ENDS:
            raise unknown("interval", self.method, _ENDS)
        object.__setattr__(self, "data", tuple(float(x) for x in self.data))
        least = 1 if self.method == "binomial" else 2
        if self.count < least or not self.data:
            raise InputError(
                f"an interval by {self.method} over {self.count} of the unit {self.unit!r}; "
                f"expected at least {least}"
            )
        if wrong := self._wrong():
            raise InputError(f"an interval by {self.method} over {self.unit!r}: {wrong}")

    def _wrong(self) -> str:
        """What does not fit together in the data; empty where all does."""
        numbers = self.data
        if self.method in ("t", "geometric") and len(numbers) != self.count:
            return f"{len(numbers)} values of {self.count} units; expected one a unit"
        if self.method == "geometric" and not all(0 < x < math.inf for x in numbers):
            return "a value is not positive and finite; expected such values alone"
        if self.method == "binomial" and not (
            len(numbers) == 1 and numbers[0].is_integer() and 0 <= numbers[0] <= self.count
        ):
            return f"{numbers} successes of {self.count}; expected one whole number up to that"
        if self.method == "bootstrap" and any(not low <= high for low, high in pairwise(numbers)):
            return "its quantiles do not rise; expected sorted numbers"
        return ""

    def at(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Lower and upper end at a confidence between 0 and 1; NaN where the data are."""
        if not 0 < confidence < 1:
            raise InputError(f"the confidence is {confidence}; expected a number between 0 and 1")
        return _ENDS[self.method](self, confidence)

    def detectable(self, confidence: float = CONFIDENCE) -> float:
        """The distance from a bound that such a design tells four times of five.

        By the normal law, ``(z_{1-α/2} + z_{0.8}) · se`` with the standard error that the width of
        the interval at the confidence ``1 - α`` amounts to.
        """
        from scipy.stats import norm

        low, high = self.at(confidence)
        z = float(norm.ppf((1 + confidence) / 2))
        return (high - low) / 2 * (1 + float(norm.ppf(POWER)) / z)


def _student(interval: Interval, confidence: float) -> tuple[float, float]:
    from scipy.stats import t

    values, n = interval.data, interval.count
    mean = sum(values) / n
    error = math.hypot(*(x - mean for x in values)) / math.sqrt((n - 1) * n)
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * error
    return mean - half, mean + half


def _logarithms(interval: Interval, confidence: float) -> tuple[float, float]:
    logs = tuple(math.log(x) for x in interval.data)
    low, high = _student(replace(interval, method="t", data=logs), confidence)
    return _exp(low), _exp(high)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _percentiles(interval: Interval, confidence: float) -> tuple[float, float]:
    import numpy as np
    from scipy.stats import norm, t

    n = interval.count
    tail = float(norm.cdf(-math.sqrt(n / (n - 1)) * t.ppf((1 + confidence) / 2, n - 1)))
    levels = np.linspace(0, 1, len(interval.data))
    ends = np.interp([tail, 1 - tail], levels, interval.data)
    return float(ends[0]), float(ends[1])


def _clopper_pearson(interval: Interval, confidence: float) -> tuple[float, float]:
    from scipy.stats import binomtest

    found = binomtest(round(interval.data[0]), interval.count)
    low, high = found.proportion_ci(confidence, method="exact")
    return float(low), float(high)


_ENDS: dict[str, Callable[[Interval, float], tuple[float, float]]] = {
    "t": _student,
    "geometric": _logarithms,
    "bootstrap": _percentiles,
    "binomial": _clopper_pearson,
}


@dataclass(frozen=True)
class Evidence:
    """One measured number and what stands behind it.

    Attributes:
        value: the number that the threshold judges.
        interval: over what it was replicated; None for an exact number.
        cases: of how many cases an exact number is the worst.
        details: further numbers, words or lists, kept in the record.
        assumptions: the assumptions of the statement, in words, and whether each was met.
        note: a sentence for the reader.
    """

    value: float
    interval: Interval | None = None
    cases: int = 1
    details: Mapping[str, Any] = field(default_factory=dict)
    assumptions: Mapping[str, bool] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        """Turn numbers of numpy and torch into those of Python."""
        object.__setattr__(self, "value", float(self.value))
        object.__setattr__(self, "details", plain(self.details))
        met = {str(name): bool(value) for name, value in self.assumptions.items()}
        object.__setattr__(self, "assumptions", met)
        if isinstance(self.interval, Mapping):  # as a record has it
            object.__setattr__(self, "interval", Interval(**self.interval))

    @classmethod
    def worst(
        cls, errors: Mapping[str, float], *, least: bool = False, note: str = "", **more: Any
    ) -> Evidence:
        """The largest of the numbers of some cases, or the least; exact, without an interval.

        A case that is not a number makes the whole one.
        """
        if not errors:
            raise InputError("there is no case; expected at least one number")
        values = [float(x) for x in errors.values()]
        value = math.nan if any(map(math.isnan, values)) else (min if least else max)(values)
        details = {**errors, **more.pop("details", {})}
        return cls(value, cases=len(values), details=details, note=note, **more)

    @classmethod
    def mean(cls, values: Sequence[float], unit: str, **more: Any) -> Evidence:
        """The mean of independent values, one a unit, with Student's interval."""
        kept = tuple(float(x) for x in values)
        if len(kept) < 2:
            raise InputError(f"{len(kept)} values of the unit {unit!r}; an interval needs two")
        return cls(sum(kept) / len(kept), Interval("t", unit, len(kept), kept), **more)

    @classmethod
    def geometric_mean(cls, values: Sequence[float], unit: str, **more: Any) -> Evidence:
        """The geometric mean of independent positive values, with Student's interval of the logs.

        For errors and ratios, of which one may be many times another.
        """
        kept = tuple(float(x) for x in values)
        if len(kept) < 2 or not all(0 < x < math.inf for x in kept):
            raise InputError(
                f"{len(kept)} values of the unit {unit!r}, at least {min(kept, default=math.nan)}; "
                "a geometric mean with an interval needs two or more positive finite numbers"
            )
        value = math.exp(sum(map(math.log, kept)) / len(kept))
        return cls(value, Interval("geometric", unit, len(kept), kept), **more)

    @classmethod
    def share(cls, successes: int, count: int, unit: str, **more: Any) -> Evidence:
        """A share of successes with its exact interval."""
        if count < 1 or not 0 <= successes <= count or successes != int(successes):
            raise InputError(
                f"{successes} successes of {count}; expected a whole number of 0 to {count}, and "
                "at least one case"
            )
        interval = Interval("binomial", unit, count, (float(successes),))
        return cls(successes / count, interval, **more)

    @classmethod
    def resampled(
        cls,
        statistic: Callable[..., float],
        columns: Sequence[Sequence[Any]],
        unit: str,
        *,
        seed: int = 0,
        resamples: int = RESAMPLES,
        **more: Any,
    ) -> Evidence:
        """A statistic of units that have one entry in each column, with its bootstrap interval.

        Args:
            statistic: of the columns; draws for which it is no number are left out.
            columns: sequences of equal length, one entry a unit; units are drawn whole.
            unit: what a row of the columns is.
            seed: of the draws.
            resamples: number of the draws.
            **more: further fields.

        Raises:
            InputError: the columns differ in length, have fewer than five rows, or half of the
                draws give no number.
        """
        import numpy as np

        arrays = [np.asarray(column) for column in columns]
        count = len(arrays[0])
        if any(len(array) != count for array in arrays) or count < LEAST_ROWS:
            sizes = [len(array) for array in arrays]
            raise InputError(
                f"columns of {sizes} rows; expected equal numbers, of at least {LEAST_ROWS}: of "
                "fewer a bootstrap gives no interval"
            )
        random = np.random.default_rng(seed)
        rows = random.integers(0, count, (resamples, count))
        draws = np.array([float(statistic(*(a[r] for a in arrays))) for r in rows])
        return cls.of_draws(statistic(*arrays), draws, unit, count, **more)

    @classmethod
    def of_draws(cls, value: float, draws: Any, unit: str, count: int, **more: Any) -> Evidence:
        """A number and draws of it from the distribution that replication gives it."""
        import numpy as np

        draws = np.asarray(draws, float)
        if len(draws) < 2:
            raise InputError(
                f"{len(draws)} draws of the unit {unit!r} give no interval: what they are drawn "
                "from was not repeated; add trainings, seeds or whatever the unit is"
            )
        told = np.sort(draws[~np.isnan(draws)])
        if 2 * len(told) < len(draws) or len(told) < 2:
            raise InputError(
                f"{len(draws) - len(told)} of {len(draws)} draws are no numbers: the statistic is "
                "not defined on most samples; take more units"
            )
        # The nearest draws, not means between them: draws may be infinite.
        places = np.linspace(0, len(told) - 1, min(QUANTILES, len(told))).round().astype(int)
        return cls(value, Interval("bootstrap", unit, count, tuple(told[places])), **more)

    @property
    def assumption_met(self) -> bool:
        """Whether every assumption held."""
        return all(self.assumptions.values())

    def bounds(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """The interval; twice the value where the number is exact."""
        return (self.value, self.value) if self.interval is None else self.interval.at(confidence)

    @property
    def text(self) -> str:
        """The number, its interval and what was replicated, in a few words."""
        return self.text_at(CONFIDENCE)

    def text_at(self, confidence: float) -> str:
        """The same at another confidence, which is then named."""
        if self.interval is None:
            cases = f", worst of {self.cases} cases" if self.cases > 1 else ""
            return f"{self.value:.3g}{cases}"
        low, high = self.bounds(confidence)
        told = units(self.interval.count, self.interval.unit)
        at = "" if math.isclose(confidence, CONFIDENCE) else f" at {100 * confidence:.3g} %"
        return f"{self.value:.3g} [{low:.3g}, {high:.3g}]{at}, {told}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; `Evidence(**...)` is the inverse."""
        return {
            **vars(self),
            "interval": None if self.interval is None else dict(vars(self.interval)),
        }


def plain(value: Any) -> Any:
    """Numbers, words, lists and dictionaries of Python; numpy and torch values are unwrapped.

    Raises:
        InputError: there is something else in it.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    raise InputError(
        f"a claim's details hold a {type(value).__name__}; use numbers, words, lists or mappings"
    )
