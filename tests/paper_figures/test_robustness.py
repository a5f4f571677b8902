"""What the figure of robustness computes."""

from __future__ import annotations

import math

import pandas as pd
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
    beyond = robustness.recovered(table, "lora", "beyond random")
    assert beyond.value == pytest.approx(0.25, abs=0.05)
    assert robustness.recovered(table, "lora", "adaptive").value == pytest.approx(0.125, abs=0.05)
    worse = table.assign(accuracy=table["accuracy"].where(table["condition"] != "clean", 0.3))
    assert math.isnan(robustness.recovered(worse, "lora", "corrected").value)
    assert "nothing to tell" in robustness.caption(worse)


def test_a_share_is_a_ratio_of_sums_with_the_interval_of_its_residuals() -> None:
    """By hand: gained 1, 1, 4 of lost 2, 4, 4: R = 0.6, residuals -0.2, -1.4, 1.6."""
    clean, attacked, corrected = (9.0, 9.0, 9.0), (7.0, 5.0, 5.0), (8.0, 6.0, 9.0)
    table = pd.DataFrame(
        {"method": "lora", "seed": seed, "condition": condition, "accuracy": values[seed]}
        for seed in range(3)
        for condition, values in (
            ("clean", clean), ("attacked", attacked), ("attacked_corrected", corrected),
        )
    )  # fmt: skip
    found = robustness.recovered(table, "lora", "corrected")
    error = math.sqrt((0.2**2 + 1.4**2 + 1.6**2) / 2 / 3) / (10 / 3)
    assert found.value == pytest.approx(0.6)
    assert found.high - found.value == pytest.approx(4.302653 * error, rel=1e-5)
    assert found.value - found.low == pytest.approx(4.302653 * error, rel=1e-5)
