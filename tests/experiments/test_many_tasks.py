"""The study of many tasks: its tasks and grid, and how rates are searched for categories."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from deltacontrol.experiments import tasks
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.studies.learning_rates.of_study import StudyRates
from deltacontrol.experiments.studies.many_tasks import grid, rates
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory.errors import InputError

REGRESSION = "nyt-intensity"


def record(run: FineTuning, **result: float | None) -> Record:
    return Record(
        f"{run.task} {run.learning_rate:g}", "fine-tuning", run.to_config(), result, {}, "completed"
    )


@pytest.fixture
def data() -> None:
    """Every packaged task can be had."""
    for name in tasks.available():
        try:
            tasks.load(name)
        except InputError as error:
            if "could not fetch" not in str(error):
                raise
            pytest.skip(f"{name} cannot be had here: {error}")


@pytest.mark.usefixtures("data")
def test_the_tasks_are_those_that_the_seeded_rule_draws() -> None:
    drawn = tasks.study_tasks(grid.DRAWN)
    listed = [(t.name, t.category, t.corpus) for t in drawn if t.kind != "causal-lm"]
    assert listed == [(q.name, q.category, q.corpus) for q in grid.questions().values()]


@pytest.mark.slow
@pytest.mark.usefixtures("data")
def test_the_file_of_the_tasks_is_what_the_data_give() -> None:
    assert grid.drawn() == list(grid.questions().values())


def test_the_tasks_are_known_without_data() -> None:
    known = grid.questions()
    assert len(known) == 120 and set(grid.QUICK) <= set(known)
    assert len({q.category for q in known.values()}) == 6
    for question in known.values():
        digest = tasks.digest(question.name)  # which refuses a name that means nothing
        assert len(digest) == 64 and question.validation > 0
    assert len({known[name].corpus for name in grid.QUICK}) == len(grid.QUICK)


def test_every_run_of_the_grid_has_the_rate_of_its_category() -> None:
    runs = grid.experiments("paper")
    assert Counter(run.task for run in runs) == dict.fromkeys(grid.questions(), len(grid.DELTAS))
    for run in runs:
        category = grid.questions()[run.task].category
        name = grid.key(category, run.deltas[0]["name"])
        assert run.learning_rate == grid.RATES.recorded()[name] and run.evaluate_on == "test"


def test_a_grid_without_searched_rates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {grid.key(q.category, d): 1e-3 for q in grid.questions().values() for d in grid.DELTAS}
    del known["pair/lora"]
    monkeypatch.setattr(StudyRates, "recorded", lambda self: known)
    with pytest.raises(InputError, match="1 learning rates .* such as pair/lora; run python -m"):
        grid.experiments("paper")
    assert len(grid.experiments("quick")) == len(grid.QUICK) * len(grid.DELTAS)


def test_rates_are_searched_on_validation_rows_of_two_tasks_a_category() -> None:
    chosen = rates.searched()
    assert chosen == rates.searched()
    for category, found in chosen.items():
        own = [q for q in grid.questions().values() if q.category == category]
        assert len(set(found)) == len(found) == min(rates.TASKS_EACH, len(own))
        assert {q.category for q in found} == {category}
        large = [q for q in own if q.validation >= rates.LEAST_ROWS] or own
        assert set(found) <= set(large)
        corpora = {q.corpus for q in large}
        assert len({q.corpus for q in found}) == min(len(corpora), len(found))
    runs = rates.experiments()
    assert len(set(map(repr, runs))) == len(runs)
    assert {run.evaluate_on for run in runs} == {"validation"}
    # Apart from the rows of the result, a trial is a run of the grid.
    known = {q.name for found in chosen.values() for q in found}
    assert {run.task for run in runs} == known
    for run in runs[:: len(rates.FACTORS) * len(grid.DELTAS)]:
        final = grid.training(run.task, run.deltas[0]["name"], run.learning_rate)
        assert replace(run, evaluate_on="test", eval_limit=grid.ROWS) == final


def test_the_best_rate_is_that_of_the_best_mean_over_the_tasks() -> None:
    pair = rates.searched()["topic"]

    def trials(scores: dict[float, tuple[float | None, float | None]], loss: float = 0.5) -> list:
        return [
            record(grid.training(q.name, "lora", rate), accuracy=score, loss=loss - rate)
            for rate, both in scores.items()
            for q, score in zip(pair, both, strict=True)
        ]

    found = grid.RATES.choose(trials({1e-3: (0.9, 0.5), 3e-3: (0.8, 0.8), 1e-2: (0.7, 0.7)}))
    assert found["rates"] == {"topic/lora": 3e-3} and found["at_end_of_grid"] == []
    assert [row["rate"] for row in found["trials"]["topic/lora"]] == [1e-3, 3e-3, 1e-2]
    assert [row["score"] for row in found["trials"]["topic/lora"]] == pytest.approx([0.7, 0.8, 0.7])
    # Level scores: the least loss. A task without a metric: never.
    found = grid.RATES.choose(trials({1e-3: (0.8, 0.8), 3e-3: (0.8, 0.8), 1e-2: (0.99, None)}))
    assert found["rates"] == {"topic/lora": 3e-3}
    assert found["trials"]["topic/lora"][2]["score"] is None
    found = grid.RATES.choose(trials({1e-3: (0.8, 0.8), 3e-3: (0.7, 0.7)}))
    assert found["at_end_of_grid"] == ["topic/lora"]
    assert grid.RATES.choose(trials({1e-3: (None, 0.8)}))["rates"] == {}


def test_beyond_an_end_the_next_rate_is_tried() -> None:
    trials = [t for t in rates.experiments() if t.task == "sms" and t.deltas[0]["name"] == "lora"]
    assert len(trials) == len(rates.FACTORS)
    low, middle, high = (trial.learning_rate for trial in trials)

    def found(*accuracies: float | None) -> list[tuple[str, float | None]]:
        pairs = zip(trials, accuracies, strict=True)
        records = [record(trial, accuracy=score, loss=0.5) for trial, score in pairs]
        return [(t.task, t.learning_rate) for t in grid.RATES.beyond(trials, records)]

    assert found(0.7, 0.8, 0.7) == []
    assert found(0.9, 0.8, 0.7) == [("sms", float(f"{low / 3:.3g}"))]
    assert found(0.7, 0.8, 0.9) == [("sms", float(f"{high * 3:.3g}"))]
    assert found(0.7, 0.8, None) == []  # it diverges there


def test_a_regression_is_judged_by_its_correlation() -> None:
    low, high = (grid.training(REGRESSION, "full", rate) for rate in (1e-4, 3e-4))
    both = [record(low, pearson=0.5, mse=2.0), record(high, pearson=0.4, mse=1.0)]
    found = grid.RATES.choose(both)
    assert found["rates"] == {"regression/full": 1e-4}


def test_the_written_rates_are_what_the_records_say() -> None:
    written = json.loads(grid.RATES.file.read_text(encoding="utf-8"))
    found = RunStore(grid.RATES.file.with_suffix("")).records()
    assert written == grid.RATES.choose(found) and len(found) >= len(rates.experiments())
