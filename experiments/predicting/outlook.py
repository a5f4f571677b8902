"""What is foretold of several methods in one situation: their order, rates, ranks, time, memory."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from deltacontrol.deltas.editing.sites import SiteMap
from deltacontrol.experiments.predicting.base import Predictor, Score
from deltacontrol.experiments.predicting.candidate import Candidate, Trial
from deltacontrol.experiments.predicting.rates import ENDS, RateEstimate, rate_estimate
from deltacontrol.experiments.predicting.situation import Situation
from deltacontrol.experiments.predicting.weight_gradients import useful_rank
from deltacontrol.theory.errors import InputError

TIMED_STEPS = 3


@dataclass(frozen=True)
class Standing:
    """The place of a method, 1 for the best.

    Attributes:
        place: by the scores.
        low: 5 % quantile of the places on rows that are drawn again; None where the predictor does
            not say.
        high: 95 % quantile, likewise.
        first: share of the draws in which it is the best.
    """

    place: int
    low: int | None = None
    high: int | None = None
    first: float | None = None


def standings(scores: Sequence[Score]) -> list[Standing]:
    """Places by value; methods without one come last, and equal ones in the order given.

    Example:
        >>> a, b = Score(0.4, 1.0, draws=(0.4, 0.6)), Score(0.5, 1.0, draws=(0.5, 0.5))
        >>> standings([b, a])
        [Standing(place=2, low=1, high=2, first=0.5), Standing(place=1, low=1, high=2, first=0.5)]
    """
    places = _places(np.array([[score.value for score in scores]]))[0]
    told = [i for i, score in enumerate(scores) if not math.isnan(score.value)]
    counts = {len(scores[i].draws) for i in told}
    if len(counts) != 1 or counts == {0}:
        return [Standing(int(place)) for place in places]
    drawn = _places(np.array([scores[i].draws for i in told]).T)
    found = [Standing(int(place)) for place in places]
    for column, i in enumerate(told):
        low, high = np.quantile(drawn[:, column], ENDS, method="nearest")
        first = float((drawn[:, column] == 1).mean())
        found[i] = Standing(int(places[i]), int(low), int(high), first)
    return found


def _places(values: np.ndarray) -> np.ndarray:
    """Of each row, 1 for its least value; NaN last."""
    order = np.argsort(np.where(np.isnan(values), np.inf, values), axis=1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(1, values.shape[1] + 1)[None], axis=1)
    return places


@dataclass(frozen=True, eq=False)
class Prospect:
    """One method with all that is told of it.

    Attributes:
        candidate: the method.
        scores: by predictor.
        standing: its place by the predictor that orders.
        rate: of AdamW.
        trial: time and memory of a step.
    """

    candidate: Candidate
    scores: Mapping[str, Score]
    standing: Standing
    rate: RateEstimate
    trial: Trial

    @property
    def layers(self) -> dict[int, float]:
        """Of each layer, the share of the squared gradient of the deltas; the largest first."""
        shares: dict[int, float] = {}
        for name, energy in self.candidate.start.energies.items():
            place = self.candidate.places[name]
            if place.layer is not None and not place.in_head:
                shares[place.layer] = shares.get(place.layer, 0.0) + energy
        total = sum(shares.values()) or 1.0
        ordered = sorted(shares, key=lambda layer: -shares[layer])
        return {layer: shares[layer] / total for layer in ordered}


@dataclass(frozen=True, eq=False)
class Outlook:
    """All that is foretold.

    Attributes:
        situation: of which.
        by: the predictor that orders.
        prospects: the best first.
        left_out: methods of which nothing is told, and why.
        useful: rank that holds most of the gradient at the best method's sites; None where it
            has no rank, or the model no such sites.
    """

    situation: Situation
    by: str
    prospects: tuple[Prospect, ...]
    left_out: Mapping[str, str]
    useful: int | None = None


@dataclass(eq=False)
class Foresight:
    """Measures methods one by one, as long as there is time, and orders them.

    Args:
        situation: shared.
        predictors: by name; the one that orders among them.
        by: its name.
        budget: parameters that a method may have at most.
        ends: when the time is over, on the clock of `time.monotonic`.
    """

    situation: Situation
    predictors: Mapping[str, Predictor]
    by: str
    budget: int | None = None
    ends: float = math.inf
    left_out: dict[str, str] = field(default_factory=dict, init=False)
    _measured: dict[str, tuple[Candidate, Trial]] = field(default_factory=dict, init=False)
    _longest: float = field(default=0.0, init=False)

    def measure(self, text: str) -> bool:
        """Linearise and time one method; whether it was done.

        A method that cannot act on the model, is beyond the budget, or would not end in time is
        left out, with the reason.

        Raises:
            InputError: the text is no delta, or the situation cannot be had.
        """
        candidate, began = Candidate(self.situation, text), time.monotonic()
        _ = self.situation.base
        if time.monotonic() + self._longest > self.ends:
            self.left_out[text] = "no time was left; give more minutes or fewer rows"
            return False
        try:
            count = candidate.num_parameters
            if self.budget is not None and count > self.budget:
                self.left_out[text] = f"its {count:,} parameters are beyond the budget"
                return False
            began = time.monotonic()
            _ = candidate.start
            trial = candidate.tried(TIMED_STEPS, evaluated=False)
        except InputError as error:
            self.left_out[text] = str(error)
            return False
        self._longest = max(self._longest, time.monotonic() - began)
        self._measured[text] = (candidate, trial)
        return True

    def outlook(self) -> Outlook:
        """The order of what was measured; the best method also at its useful rank, if it has one.

        Raises:
            InputError: nothing was measured, or as the predictors.
        """
        found = self._ordered()
        rank = self._useful(found[0].candidate)
        text = None if rank is None else _with_rank(found[0].candidate, rank)
        if text is not None and text not in self._measured and self.measure(text):
            found = self._ordered()
        if text is not None:
            self.left_out.pop(text, None)  # nobody asked for it
        return Outlook(self.situation, self.by, tuple(found), dict(self.left_out), rank)

    def _ordered(self) -> list[Prospect]:
        if not self._measured:
            reasons = "; ".join(f"{text}: {why}" for text, why in self.left_out.items())
            raise InputError(f"no method could be measured: {reasons}")
        candidates = [candidate for candidate, _ in self._measured.values()]
        scores = {name: p.scores(candidates) for name, p in self.predictors.items()}
        places = standings(scores[self.by])
        found = [
            Prospect(
                candidate,
                {name: column[i] for name, column in scores.items()},
                places[i],
                rate_estimate(candidate.start),
                trial,
            )
            for i, (candidate, trial) in enumerate(self._measured.values())
        ]
        return sorted(found, key=lambda prospect: prospect.standing.place)

    def _useful(self, candidate: Candidate) -> int | None:
        """At the sites of the one delta of a method that has a rank."""
        deltas = [delta for delta in candidate.deltas if hasattr(delta, "rank")]
        sites = getattr(deltas[0], "sites", None) if len(deltas) == 1 else None
        if not sites:
            return None
        try:
            found = SiteMap(self.situation.base).resolve(sites, getattr(deltas[0], "layers", None))
            keys = {site.key for site in found}
            here = [one for one in self.situation.weight_gradients if one.key in keys]
        except InputError:
            return None
        return useful_rank(here) or None if here else None


def _with_rank(candidate: Candidate, rank: int) -> str | None:
    """The text of a method at another rank; None where that is its own, or the user's."""
    words = []
    for word, delta in zip(candidate.text.split(), candidate.deltas, strict=True):
        known = {f.name for f in fields(delta)}  # type: ignore[arg-type]
        free = "rank" in known and "rank=" not in word and getattr(delta, "rank", rank) != rank
        words.append(f"{word}{',' if ':' in word else ':'}rank={rank}" if free else word)
    return " ".join(words) if words != candidate.text.split() else None
