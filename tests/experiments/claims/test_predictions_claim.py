"""Claim 39 on scores that know, and on scores that draw lots."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from deltacontrol.experiments.claims import scoreboard
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.studies.foretelling.measurement import Foretelling
from deltacontrol.experiments.studies.learning_rates.of_study import StudyRates
from deltacontrol.experiments.studies.many_tasks.grid import DELTAS, key, questions
from deltacontrol.theory.claims import Verdict
from deltacontrol.theory.judging import judge
from tests.paper_figures.grids import predictor as made


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Record]:
    """Made-up records of the runs that the claim names."""
    rates = {key(q.category, m): 2e-3 for q in questions().values() for m in DELTAS}
    monkeypatch.setattr(StudyRates, "recorded", lambda self: rates)
    foretold = {e.config["task"]: result for e, result, _ in made.grid()}

    def find(run: Any) -> Record:
        if isinstance(run, Foretelling):
            result = foretold[run.task]
        else:
            loss = made.loss(run.task, run.deltas[0]["name"])
            result = {"loss": loss, "accuracy": 1 - loss, "majority_share": 0.5}
        return Record(run.label, run.kind, run.to_config(), result, {}, "completed")

    return find


def test_scores_that_know_are_told_from_lots(records: Callable[[Any], Record]) -> None:
    claim = scoreboard.find(39)
    found = {outcome.name: outcome for outcome in judge(claim, records).parts}
    assert [found[name].verdict for name in "abc"] == [Verdict.HOLDS] * 3
    # What is made up costs three fifths of all trainings.
    assert found["d"].verdict is Verdict.FAILS


def test_the_runs_are_the_predictions_and_what_they_foretold(
    records: Callable[[Any], Record],
) -> None:
    module = import_module("deltacontrol.experiments.claims.39_predictions")
    runs = module._runs()
    predictions = [run for run in runs if isinstance(run, Foretelling)]
    assert len(predictions) >= module.LEAST_TASKS
    assert len(runs) == len(predictions) * (1 + len(DELTAS))
    for run in predictions:
        assert run.methods == DELTAS
