"""The figure predictor: what knows is told from what draws lots, and nothing looks ahead."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deltacontrol.experiments.predicting.calibration import split_by_corpus
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.studies.foretelling import judgement
from deltacontrol.experiments.studies.learning_rates.of_study import StudyRates
from deltacontrol.experiments.studies.many_tasks.grid import DELTAS, key, questions
from deltacontrol.paper_figures.figures import predictor
from deltacontrol.theory.errors import InputError
from tests.paper_figures.grids import predictor as made
from tests.paper_figures.synthetic import GRIDS, write


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What came, and the searched rates, made up."""
    found = {
        (task, m): predictor.Outcome(made.loss(task, m), 100 - 100 * made.loss(task, m))
        for task in questions()
        for m in DELTAS
    }
    rates = {key(q.category, m): 2e-3 for q in questions().values() for m in DELTAS}
    monkeypatch.setattr(predictor, "outcomes", lambda: found)
    monkeypatch.setattr(StudyRates, "recorded", lambda self: rates)
    return found


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return write(RunStore(tmp_path_factory.mktemp("predictor")), GRIDS["predictor"]())


def test_what_knows_is_told_from_what_draws_lots(records) -> None:
    table = predictor.table(records)
    knows, lots = (predictor.judge(table, name) for name in ("linearised", "curvature"))
    assert knows["correlation"].bounds()[0] > 0.8 and knows["regret"].value < 2
    assert lots["correlation"].bounds()[1] < 0.5 and lots["regret"].value > knows["regret"].value
    assert predictor.between(table, "linearised", "curvature").bounds()[0] > 0
    # The mean order is learnt from other corpora, and is as good as methods differ by themselves.
    order = predictor.judge(table, "mean order")["correlation"]
    assert 0.5 < order.value < knows["correlation"].value


def test_the_verdict_says_which_and_how_sure(records) -> None:
    text = predictor.verdict(predictor.table(records))
    assert "rank correlation 0.9" in text and "beats the best baseline (mean order, 0." in text


def test_the_combination_finds_the_predictor_that_knows(records) -> None:
    table = predictor.table(records)
    found = predictor.judge(table, "combination")["correlation"]
    assert found.value > 0.8


def test_what_learns_never_sees_the_corpus_that_it_is_judged_on(records, known) -> None:
    """Other outcomes of a task move no learnt score on tasks of its own corpus."""
    before = predictor.table(records)
    task = str(before["task"].iloc[0])
    corpus = questions()[task].corpus
    for m in DELTAS:
        known[task, m] = predictor.Outcome(*reversed(sorted((0.1 * DELTAS.index(m), 50.0))))
    after = predictor.table(records)
    learnt = before["predictor"].isin(judgement.LEARNT)
    moved = before.loc[learnt, "score"].to_numpy() != after.loc[learnt, "score"].to_numpy()
    rows = before.loc[learnt]
    assert moved.any() and not moved[(rows["corpus"] == corpus).to_numpy()].any()
    names = list(dict.fromkeys(before["task"]))
    corpora = [questions()[name].corpus for name in names]
    one, other = split_by_corpus(corpora, judgement.SHARE, seed=judgement.FOLD_SEED)
    assert not {corpora[i] for i in one} & {corpora[i] for i in other}


def test_rates_are_in_octaves_and_costs_in_trainings(records) -> None:
    table = predictor.table(records)
    assert predictor.rate_error(table).value == pytest.approx(1.0)
    assert predictor.cost_share(table, "linearised") == pytest.approx(384 / 1920)
    assert predictor.cost_share(table, "mean order") == 0.0
    assert predictor.cost_share(table, "combination") == pytest.approx(3 * 384 / 1920)


def test_a_method_of_which_nothing_is_said_is_left_out(records) -> None:
    table = predictor.table(records)
    own = table[table["predictor"] == "gradient-spectrum"]
    assert own.groupby("task")["score"].count().eq(2).all()
    # Its regret is over all methods: what it says nothing of may be the best.
    judged = predictor.judge(table, "gradient-spectrum")
    best = table[table["predictor"] == "curvature"].groupby("task")["points"].max()
    lora = own[own["method"] == "lora"].set_index("task")["points"]
    corpora = own.drop_duplicates("task").set_index("task")["corpus"]
    expected = (best - lora).groupby(corpora).mean().mean()
    assert judged["regret"].value == pytest.approx(expected)
    inputs = judgement._inputs(table[~table["predictor"].isin(judgement.LEARNT)])
    assert np.isfinite(inputs.to_numpy()).all()


def test_a_training_that_is_lacking_is_named(records, known) -> None:
    task = str(records[0].config["task"])
    del known[task, "lora"]
    with pytest.raises(InputError, match=f"no run of lora on {task}"):
        predictor.table([replace(records[0])])
