"""How long a run will take, by the recorded runs that are most like it.

Runs are compared from near to far, and the median of the nearest ones that there are counts:

1. all is equal but seeds and rates;
2. the model, the deltas and the sizes of a step are equal, the task may be another;
3. the model is equal;
4. the kind is equal.

From 2 on the time is in proportion to the number of steps, where a run has one. Times of other
machines count as they are: a sweep corrects the forecast by its own pace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from deltacontrol.experiments.runs.experiment import Experiment, canonical_json
from deltacontrol.experiments.runs.record import Record

# Fields that hardly change how long a step takes.
_FREE = {"seed", "learning_rate", "rate", "weight_decay", "keep_controls"}
# Those that do, whatever is trained on.
_COSTLY = ("model", "deltas", "delta", "solver", "optimiser", "batch_size", "max_length", "method")


class Forecast:
    """Seconds of runs.

    Args:
        records: Those to learn from.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._seen: dict[str, list[float]] = {}
        self._medians: dict[str, float] = {}
        for record in records:
            self.learn(record)

    def learn(self, record: Record) -> None:
        """Take the time of a record into account."""
        seconds = record.provenance.get("wall_seconds")
        if not isinstance(seconds, int | float):
            return
        for key, steps in _likenesses(record.kind, record.config):
            self._seen.setdefault(key, []).append(seconds / steps)
            self._medians.pop(key, None)

    def seconds(self, experiment: Experiment) -> float | None:
        """Of a run; None where none of its kind is recorded."""
        for key, steps in _likenesses(experiment.kind, experiment.to_config()):
            if key in self._seen:
                if key not in self._medians:
                    self._medians[key] = median(self._seen[key])
                return steps * self._medians[key]
        return None


def _likenesses(kind: str, config: Mapping[str, Any]) -> list[tuple[str, float]]:
    """From near to far, what like runs have in common, and what their time is in proportion to."""
    steps = config.get("steps")
    steps = float(steps) if isinstance(steps, int | float) and steps > 0 else 1.0
    own = {k: v for k, v in config.items() if k not in _FREE and not k.endswith("_seed")}
    costly = {name: config[name] for name in _COSTLY if name in config}
    model = {"model": config.get("model")}
    far = [canonical_json([kind, level]) for level in (costly, model, {})]
    return [(canonical_json([kind, "equal", own]), 1.0), *((key, steps) for key in far)]
