"""Six methods on lines of films, each along its path at two rates; news is what may be forgotten.

The larger rate of a method is its own default, the smaller one a third of it. Of each delta the
front is foretold from its start; full fine-tuning has too many controls for that.
"""

from __future__ import annotations

from typing import Any

from deltacontrol.experiments.studies.forgetting.front import ForetoldFront
from deltacontrol.experiments.studies.forgetting.measurement import Forgetting

# Method → its larger rate: the default of its file, written down so that records do not change.
RATES = {
    "full": 1e-4,
    "lora": 1e-3,
    "houlsby": 1e-3,
    "prefix": 1e-2,
    "bitfit": 2e-3,
    "ia3": 3e-3,
}
SEEDS = 2


def experiments(preset: str) -> list[Forgetting | ForetoldFront]:
    """Methods × rates × seeds, and the fronts of the deltas."""
    if preset == "quick":
        short: dict[str, Any] = {"steps": 2, "every": 1, "rows": 8, "held_rows": 4}
        return [
            Forgetting(delta={"name": name}, learning_rate=RATES[name], **short)
            for name in ("lora",)
        ]
    return [
        *(
            Forgetting(delta={"name": name}, learning_rate=float(f"{factor * rate:.3g}"), seed=seed)
            for seed in range(SEEDS)
            for name, rate in RATES.items()
            for factor in (1.0, 1 / 3)
        ),
        *(ForetoldFront(delta={"name": name}) for name in RATES if name != "full"),
    ]
