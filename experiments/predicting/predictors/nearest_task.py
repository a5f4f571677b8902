"""The baseline that takes over what a study found on the most similar task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltacontrol.experiments.predicting.base import Predictor, Score
from deltacontrol.experiments.predicting.candidate import Candidate
from deltacontrol.experiments.predicting.known_tasks import KnownTask, features, nearest
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class NearestTask(Predictor):
    """The loss of the same method on the nearest task of a study.

    Attributes:
        known: the tasks of the study. Leave out those of the corpus that is predicted: tasks of one
            corpus are not independent.
    """

    known: tuple[KnownTask, ...] = ()

    name = "nearest-task"
    meaning = "loss on the nearest task of a study"
    reference = "a baseline of this project"

    def scores(self, candidates: Sequence[Candidate]) -> list[Score]:
        """From the study's records, and one forward pass of the validation rows.

        Raises:
            InputError: there is no study.
        """
        if not self.known:
            raise InputError(
                "nearest-task takes a study's tasks, and none are given: in Python, "
                "NearestTask(known=(KnownTask(...), ...))"
            )
        if not candidates:
            return []
        situation = candidates[0].situation
        task = nearest(features(situation), self.known)
        return [
            Score(task.losses[c.text], float(situation.num_heldout), note=f"of {task.name}")
            if c.text in task.losses
            else Score.none(f"{task.name} has no loss of it")
            for c in candidates
        ]
