"""How much of the loss's gradient by the weights a method's sites and rank can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.sites import SiteMap
from deltacontrol.experiments.predicting.base import Predictor, Score
from deltacontrol.experiments.predicting.candidate import Candidate
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class GradientSpectrum(Predictor):
    """Minus the share of ``sum_W |dL/dW|_F^2`` that lies at the method's sites and in its rank.

    At a site the best matrix of rank ``r`` holds ``sum_{i <= r} sigma_i^2``. It is told of methods
    that choose linear maps by a field ``sites``; those without a field ``rank`` hold all of it.
    What a method's law can make of its rank, it does not know.
    """

    name = "gradient-spectrum"
    meaning = "minus the share of the weights' gradient that sites and rank hold"
    reference = "Zhang, Liu & Chen, LoRA-One, ICML 2025; Eckart & Young, 1936"

    def scores(self, candidates: Sequence[Candidate]) -> list[Score]:
        """From one gradient of the weights, which all methods share."""
        try:
            _ = [candidate.situation.weight_gradients for candidate in candidates]
        except InputError as error:  # a model without maps of known names
            return [Score.none(str(error)) for _ in candidates]
        return [self._score(candidate) for candidate in candidates]

    def _score(self, candidate: Candidate) -> Score:
        situation = candidate.situation
        found = situation.weight_gradients
        sites, held = SiteMap(situation.base), dict.fromkeys((one.key for one in found), 0.0)
        told = False
        for delta in candidate.deltas:
            if delta.name == "full":
                held, told = {one.key: one.energy for one in found}, True
            chosen = _chosen(sites, delta)
            told = told or bool(chosen)
            for one in found:
                if one.key in chosen:
                    held[one.key] = max(held[one.key], one.held(getattr(delta, "rank", None)))
        total = sum(one.energy for one in found)
        if not told or not total > 0:
            return Score.none("it chooses no linear maps by the field sites")
        return Score(-sum(held.values()) / total, 3.0 * situation.num_rows)


def _chosen(sites: SiteMap, delta: Delta) -> set[str]:
    """Keys of the linear maps that a delta names."""
    named = getattr(delta, "sites", None)
    if not named:
        return set()
    return {site.key for site in sites.resolve(named, getattr(delta, "layers", None))}
