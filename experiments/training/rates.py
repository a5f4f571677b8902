"""Learning rates: those of the recorded search, and defaults where it has none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from deltacontrol.experiments.runs.store import COMMITTED
from deltacontrol.theory.errors import InputError

RATES_FILE = COMMITTED / "rates" / "learning_rates.json"


@dataclass(frozen=True)
class Rate:
    """A learning rate and where it is from, in a few words."""

    value: float
    source: str

    def __str__(self) -> str:
        """Both."""
        return f"learning rate {self.value:g}: {self.source}"


def default_rate(model: str, task: str, deltas: tuple[dict[str, Any], ...]) -> Rate:
    """The learning rate of the recorded search for model/task/delta, else a default.

    Several deltas together are looked up as `a+b`, the names in alphabetical order; without an
    entry they take the smallest of their defaults, so that none of them gets too large a rate. A
    delta's default is what its class says, else that of its category.
    """
    from deltacontrol.deltas import registry  # imports torch

    names = "+".join(sorted(searched_name(delta) for delta in deltas))
    recorded = recorded_rates().get(f"{model}/{task}/{names}")
    if recorded is not None:
        return Rate(recorded, f"tuned on {model}/{task}")
    methods = registry.available()
    method = min((methods[delta["name"]] for delta in deltas), key=lambda m: (m.rate(), m.name))
    whose = f"of {method.name}, the smallest of the deltas'" if len(deltas) > 1 else "of the method"
    if method.default_rate is None:
        whose = f"of the category of {method.name}, {method.category}"
    return Rate(method.rate(), f"default {whose}; no search is recorded for {model}/{task}/{names}")


def searched_name(delta: dict[str, Any]) -> str:
    """A delta's name in the recorded search; the rate of a subspace depends on its dimension."""
    return delta["name"] + (f"/{delta['dimension']}" if delta["name"] == "subspace" else "")


@cache
def recorded_rates() -> dict[str, float]:
    """Rates by model/task/delta, as the search wrote them; empty without a search."""
    if not RATES_FILE.exists():
        return {}
    try:
        document = json.loads(RATES_FILE.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{RATES_FILE} is not JSON: {error}; restore or delete it") from error
    return document.get("rates", document)
