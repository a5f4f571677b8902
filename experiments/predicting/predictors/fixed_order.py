"""The baseline that always gives the same ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltacontrol.experiments.predicting.base import Predictor, Score
from deltacontrol.experiments.predicting.candidate import Candidate
from deltacontrol.theory.errors import InputError

PUBLISHED = ("full", "lora", "houlsby", "prefix", "prompt")


@dataclass(frozen=True)
class FixedOrder(Predictor):
    """The place of a method in one order, whatever the task.

    By default that of the performance study of Ding et al.: full fine-tuning, LoRA, adapter,
    prefix, prompt. A method that is not in it has no score; of deltas that are trained together
    the best placed counts.

    Attributes:
        order: names of methods, the best first.
    """

    order: tuple[str, ...] = PUBLISHED

    name = "fixed-order"
    meaning = "place in an order that is always the same"
    reference = "Ding et al., Nature Machine Intelligence 5, 2023, performance on T5-base"

    def __post_init__(self) -> None:
        """Check the order."""
        if not self.order or len(set(self.order)) < len(self.order):
            raise InputError(
                f"the order is {'+'.join(self.order)}; expected different names of methods, the "
                "best first, such as order=lora+houlsby+prompt"
            )

    def scores(self, candidates: Sequence[Candidate]) -> list[Score]:
        """Without a look at the task."""
        return [self._score(candidate) for candidate in candidates]

    def _score(self, candidate: Candidate) -> Score:
        places = [self.order.index(d.name) for d in candidate.deltas if d.name in self.order]
        return Score(min(places) + 1.0, 0.0) if places else Score.none("it is not in the order")
