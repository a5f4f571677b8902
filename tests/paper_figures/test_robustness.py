"""What the figure of robustness computes."""

from __future__ import annotations

import math

import pytest

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.paper_figures.figures import robustness
from tests.paper_figures.synthetic import GRIDS, write


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    store = RunStore(tmp_path_factory.mktemp("robustness"))
    return write(store, GRIDS["robustness"](seeds=2))


def test_what_a_correction_gives_back_is_of_what_was_lost(records) -> None:
    table = robustness.table(records)
    found = robustness.recovered(table, "lora", "corrected")
    assert found.value == pytest.approx(0.5, abs=0.05) and found.low < found.value < found.high
    assert robustness.recovered(table, "lora", "random").value == pytest.approx(0.25, abs=0.05)
    worse = table.assign(accuracy=table["accuracy"].where(table["condition"] != "clean", 0.3))
    assert math.isnan(robustness.recovered(worse, "lora", "corrected").value)
    assert "nothing to tell" in robustness.caption(worse)
