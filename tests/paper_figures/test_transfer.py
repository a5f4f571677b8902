"""The figure transfer: kinds of tasks that help each other are told from kinds that do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.studies.transfer.grid import TASKS
from deltacontrol.paper_figures.figures import transfer
from deltacontrol.theory.errors import InputError
from tests.paper_figures.synthetic import GRIDS, write


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return write(RunStore(tmp_path_factory.mktemp("transfer")), GRIDS["transfer"]())


def test_kinds_that_help_each_other_are_told_from_kinds_that_do_not(records) -> None:
    table = transfer.table(records)
    found = transfer.kinds_apart(table, "probe")
    assert found.value == pytest.approx(4.0, abs=0.3) and found.p < 0.01
    assert all(one.agrees for one in transfer.agreement(table))
    # The same gains on tasks that are moved among the kinds.
    names = list(TASKS)
    moved = dict(zip(names, names[::3] + names[1::3] + names[2::3], strict=True)) | {"": ""}
    other = table.assign(source=table["source"].map(moved), target=table["target"].map(moved))
    assert transfer.kinds_apart(other, "probe").p > 0.05
    assert transfer.agreement(other)[0].agrees is None
    near = transfer.nearness(transfer.curves(records), "probe")
    assert near.value > 1 and near.p < 0.01


def test_a_kind_that_is_easy_to_help_is_no_kinship(records) -> None:
    """Controls and tasks of one kind that gain everywhere do not help each other."""
    table = transfer.table(records)
    sentiment = {task for task, question in TASKS.items() if question.kind == "sentiment"}
    random = np.random.default_rng(0)
    gains = 3.0 * table["source"].isin(sentiment) + 3.0 * table["target"].isin(sentiment)
    gains = gains + random.normal(0, 0.5, len(table))
    found = transfer.kinds_apart(table.assign(probe_gain=gains), "probe")
    assert abs(found.value) < 0.5 and found.p > 0.05
    more = gains + 2.0 * np.array(
        [
            bool(s) and TASKS[s].kind == TASKS[t].kind
            for s, t in zip(table["source"], table["target"], strict=True)
        ]
    )
    found = transfer.kinds_apart(table.assign(probe_gain=more), "probe")
    assert found.value == pytest.approx(2.0, abs=0.5) and found.p < 0.01


def test_pairs_of_one_corpus_take_no_part(records) -> None:
    table = transfer.table(records)
    same = np.array(
        [
            bool(s) and TASKS[s].corpus == TASKS[t].corpus
            for s, t in zip(table["source"], table["target"], strict=True)
        ]
    )
    moved = table.assign(probe_gain=table["probe_gain"] + 50.0 * same)
    assert transfer.kinds_apart(moved, "probe") == transfer.kinds_apart(table, "probe")


def test_a_training_that_diverged_has_the_majoritys_accuracy(records) -> None:
    found = records[-1].result["targets"]
    worse = {**found, "bbc": found["bbc"] | {"tuned": None}}
    table = transfer.table(
        [*records[:-1], replace(records[-1], result=records[-1].result | {"targets": worse})]
    )
    row = table[table["diverged"]]
    assert len(row) == 1 and row["tuned"].iloc[0] == 50.0
    assert "1 of" in transfer.caption(table) and "trainings diverged" in transfer.caption(table)
    none = table.assign(probe_gain=np.nan)
    assert transfer.kinds_apart(none, "probe").p == 1.0
    assert transfer.agreement(none)[0].agrees is None


def test_gains_are_over_the_same_seed_without_a_control(records) -> None:
    table = transfer.table(records)
    base_rows = table[table["source"] == ""]
    assert (base_rows[["probe_gain", "tuned_gain"]] == 0).all(axis=None)
    row = table[(table["source"] == "nyt") & (table["target"] == "bbc") & (table["seed"] == 1)]
    before = base_rows[(base_rows["target"] == "bbc") & (base_rows["seed"] == 1)]
    expected = row["probe"].iloc[0] - before["probe"].iloc[0]
    assert row["probe_gain"].iloc[0] == pytest.approx(expected, abs=1e-12)
    lacking = [r for r in records if r.config["source"]]
    with pytest.raises(InputError, match="the run without a source is lacking"):
        transfer.table(lacking)


def test_runs_of_two_settings_are_not_averaged(records) -> None:
    other = replace(records[0], config=records[0].config | {"steps": 7, "seed": 99})
    with pytest.raises(InputError, match="differ in more than their seed"):
        transfer.table([*records, other])


def test_gains_within_each_kind_are_told(records) -> None:
    table = transfer.table(records)
    parts = [text.removesuffix(")").split(" (") for text in transfer._by_kind(table)]
    told = {kind: gain for gain, kind in parts}
    assert set(told) == {"sentiment", "topic", "pair"}  # the others have one corpus
    gains, names = transfer._matrix(table, "tuned")
    own = [i for i, name in enumerate(names) if TASKS[name].kind == "topic"]
    by_hand = np.mean([gains[i, j] for i in own for j in own if i != j])
    assert float(told["topic"]) == pytest.approx(by_hand, abs=0.051)
    assert f"within a kind, {told['sentiment']} (sentiment)" in transfer.caption(table)
