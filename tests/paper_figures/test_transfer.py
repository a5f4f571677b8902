"""The figure transfer: kinds of tasks that help each other are told from kinds that do not."""

from __future__ import annotations

from dataclasses import replace

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
    found = transfer.kinds_apart(other, "probe")
    assert found.p > 0.05
    assert transfer.agreement(other)[0].agrees is None
    near = transfer.nearness(transfer.curves(records), "probe")
    assert near.value > 0.2 and near.p < 0.01


def test_gains_are_over_the_same_seed_without_a_control(records) -> None:
    table = transfer.table(records)
    base_rows = table[table["source"] == ""]
    assert (base_rows[["probe_gain", "tuned_gain"]] == 0).all(axis=None)
    row = table[(table["source"] == "rt") & (table["target"] == "bbc") & (table["seed"] == 1)]
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
