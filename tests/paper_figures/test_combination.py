"""What the figure of combinations computes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.paper_figures.figures import combination
from deltacontrol.theory.errors import InputError
from tests.paper_figures.synthetic import GRIDS, write


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    store = RunStore(tmp_path_factory.mktemp("combination"))
    return write(store, GRIDS["combination"](seeds=2))


def test_a_gain_of_a_subset_is_over_the_adapter_of_the_same_task(records) -> None:
    table = combination.table(records)
    above = combination._above(table, combination.ALL)
    rows = table[table["block"] == combination.ALL]
    means = rows.groupby(["task", "method"])["points"].mean()
    for task in above.index:
        expected = means[task, "bitfit"] - means[task, "houlsby"]
        assert above.loc[task, "bitfit"] == pytest.approx(expected, abs=1e-12)
    assert (above["houlsby"] == 0).all() and above.shape == (6, 8)


def test_the_stages_of_a_sequence_are_in_its_own_order(records) -> None:
    table = combination.table(records)
    rows = table[table["block"] == combination.IN_TURN]
    assert rows["method"].nunique() == 6 and set(rows["stage"]) == {1, 2, 3}
    record = next(r for r in records if r.config.get("sequential"))
    seen = record.curve()["validation_accuracy"].dropna().tolist()
    own = rows[rows["run"] == record.id].sort_values("stage")["points"].tolist()
    assert own == pytest.approx([100 * a for a in seen], abs=1e-9)


def test_a_combination_that_helps_disagrees_with_the_source(records) -> None:
    def verdict(found: list[Record]) -> bool | None:
        return combination.agreement(combination.table(found))[1].agrees

    assert verdict(records) is True
    better = [
        replace(r, result=r.result | {"accuracy": r.result["accuracy"] + 0.05})
        if len(r.config["deltas"]) == 3 and not r.config.get("shots")
        else r
        for r in records
    ]
    assert verdict(better) is False


def test_runs_of_two_settings_are_not_averaged(records) -> None:
    other = replace(records[0], config=records[0].config | {"steps": 7, "seed": 99})
    with pytest.raises(InputError, match="differ in more than their seed"):
        combination.table([*records, other])
