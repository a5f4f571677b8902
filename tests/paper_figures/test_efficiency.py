"""The figure efficiency: ratios of the same setting, of trainings that were alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.studies.efficiency import grid
from deltacontrol.paper_figures.figures import efficiency
from deltacontrol.theory.errors import InputError
from tests.paper_figures.synthetic import GRIDS, write


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return write(RunStore(tmp_path_factory.mktemp("efficiency")), GRIDS["efficiency"]())


def test_savings_are_ratios_of_the_same_setting(records) -> None:
    table = efficiency.table(records)
    assert efficiency.ratio(table, "lora", "seconds").value == pytest.approx(2 / 3)
    means = table.groupby(["model", "batch_size", "max_length", "method"])["memory_mb"].mean()
    wide = means.unstack("method")
    ratios = wide["lora"] / wide["full"]
    found = efficiency.ratio(table, "lora", "memory_mb")
    assert found.value == pytest.approx(np.exp(np.log(ratios).mean()))
    assert (found.low, found.high) == pytest.approx((ratios.min(), ratios.max()))
    assert all(one.agrees for one in efficiency.agreement(table))
    middle = efficiency._middle(table).iloc[0]
    assert (middle["model"], middle["batch_size"], middle["max_length"]) == ("minilm-l6", 8, 64)


def test_one_setting_that_saves_nothing_is_enough_to_doubt(records) -> None:
    table = efficiency.table(records)
    worse = table.assign(seconds=table["seconds"].where(table["method"] == "full", 1e3))
    assert [one.agrees for one in efficiency.agreement(worse)] == [False, True]
    one = table["method"].eq("lora") & table["batch_size"].eq(1)
    mixed = table.assign(seconds=table["seconds"].where(~one, 1e3))
    assert [one.agrees for one in efficiency.agreement(mixed)] == [None, True]


def test_shared_passes_and_freed_memory_are_refused(records) -> None:
    shared = replace(records[0], result=records[0].result | {"copies_trained_together": 2})
    with pytest.raises(InputError, match="shared its passes with others"):
        efficiency.table([shared, *records[1:]])
    freed = replace(records[0], result=records[0].result | {"peak_memory_bytes": 10})
    with pytest.raises(InputError, match="measure these runs again"):
        efficiency.ratio(efficiency.table([freed, *records[1:]]), "lora", "memory_mb")


def test_a_part_of_the_methods_is_drawn_too(records) -> None:
    few = [r for r in records if r.config["deltas"][0]["name"] in ("full", "lora", "bitfit")]
    assert all("2 deltas" in one.row for one in efficiency.agreement(efficiency.table(few)))


def test_no_two_runs_of_the_grid_can_share_a_pass() -> None:
    runs = grid.experiments("paper")
    settings = {(r.model, r.batch_size, r.max_length, r.deltas[0]["name"]) for r in runs}
    assert len(settings) == len(runs) and {r.seed for r in runs} == {0}
