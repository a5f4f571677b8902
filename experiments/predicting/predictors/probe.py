"""The baseline that trains for a few steps and looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltacontrol.experiments.predicting.base import Predictor, Score
from deltacontrol.experiments.predicting.candidate import Candidate
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class Probe(Predictor):
    """The validation loss behind a short training with a schedule of its own.

    It begins with the head that was drawn, at the recorded or default rate of the method.

    Attributes:
        steps: of the training.
    """

    steps: int = 30

    name = "probe"
    meaning = "validation loss of a short training"
    reference = "a baseline of this project"
    is_loss = True

    def __post_init__(self) -> None:
        """Check the number of steps."""
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; expected 1 or more")

    def scores(self, candidates: Sequence[Candidate]) -> list[Score]:
        """From one training a method."""
        trials = [candidate.tried(self.steps) for candidate in candidates]
        return [Score(trial.loss, trial.cost) for trial in trials]
