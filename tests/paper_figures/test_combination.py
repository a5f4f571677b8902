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


def test_what_a_template_gains_is_over_a_head_of_the_same_model(records) -> None:
    table = combination.table(records)
    few = combination._template_gain(table, combination.FEW)
    assert few.value == pytest.approx(10, abs=0.5) and few.low < few.value < few.high
    every = combination._template_gain(table, combination.ALL)
    assert every.value == pytest.approx(0, abs=0.5)
    found = {one.row: one for one in combination.agreement(table)}["combination, templates"]
    # By hand from Table 2: 0, 0.2, 0.2, -0.3, 0.3, 0.4 and -0.2.
    assert found.published.startswith("+0.1 ") and found.agrees is True
    assert combination._gained(table, combination.ALL).shape == (6, 7)
    # Runs of the other model are in none of these blocks, and the other way round.
    alone = table[~table["block"].isin(combination.FORM_BLOCKS)]
    assert set(alone["model"]) == {"minilm-l3"} and not combination._with_forms(alone)
    assert "template" not in combination.caption(alone)


def test_templates_have_a_word_for_every_class_of_their_tasks() -> None:
    from deltacontrol.experiments import tasks
    from deltacontrol.experiments.studies.combination import grid
    from deltacontrol.experiments.tasks.templates import Template

    assert set(grid.TEMPLATES) == set(grid.TASKS)
    for task, (sentence, verbaliser) in grid.TEMPLATES.items():
        try:
            labels = tasks.load(task).labels
        except InputError:
            pytest.skip("a packaged task cannot be had here")
        assert set(Template(sentence, verbaliser).words) == set(labels), task


def test_rates_are_searched_for_every_form_of_the_grid() -> None:
    from deltacontrol.experiments.studies.combination import grid, rates

    keys = {grid.RATES.key(trial.to_config()) for trial in rates.experiments()}
    assert len(keys) == 8 + 2 * 7 and {"houlsby", "head/houlsby", "template/houlsby"} <= keys
