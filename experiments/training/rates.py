"""Learning rates: those of the recorded search, and defaults where it has none."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from deltacontrol.experiments.runs.store import COMMITTED
from deltacontrol.theory.errors import InputError

# Peak learning rates where no search is recorded for (model, task, delta): about a tenth of the
# least that was best in short runs of a small model, as longer runs and larger models want less.
DEFAULT_RATES = {
    "full": 1e-4,
    "last-layers": 2e-4,
    "selected-modules": 2e-4,
    "lottery-ticket": 1e-4,
    "diff-pruning": 1e-4,
    "fisher-mask": 1e-3,
    "random-mask": 5e-3,
    "lora": 1e-3,
    "adalora": 3e-3,
    "loha": 3e-3,
    "lokr": 3e-3,
    "houlsby": 1e-3,
    "low-rank-adapter": 3e-3,
    "bitfit": 2e-3,
    "layer-norm": 3e-3,
    "ia3": 3e-3,
    "vera": 1e-2,
    "head": 5e-3,
    "subspace": 1e-2,
    "said": 1e-2,
    "prefix": 1e-2,
    "prompt": 1e-2,
    "p-tuning": 3e-3,
    "intrinsic-prompt": 3e-3,
}
OTHER_RATE = 1e-3
RATES_FILE = COMMITTED / "rates" / "learning_rates.json"


def default_rate(model: str, task: str, deltas: tuple[dict[str, Any], ...]) -> float:
    """The learning rate of the recorded search for model/task/delta, else a default.

    Several deltas together are looked up as `a+b`, the names in alphabetical order; without an
    entry they take the smallest of their defaults, so that none of them gets too large a rate.
    """
    names = sorted(delta["name"] for delta in deltas)
    keys = sorted(searched_name(delta) for delta in deltas)
    recorded = recorded_rates().get(f"{model}/{task}/{'+'.join(keys)}")
    if recorded is not None:
        return recorded
    return min(DEFAULT_RATES.get(name, OTHER_RATE) for name in names)


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
