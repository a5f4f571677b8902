"""What the figure of scale computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.paper_figures.figures import scale
from deltacontrol.theory.errors import InputError
from tests.paper_figures.synthetic import GRIDS, write


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    store = RunStore(tmp_path_factory.mktemp("scale"))
    return write(store, GRIDS["scale"](seeds=2))


def test_slopes_are_those_that_the_points_have(records) -> None:
    table = scale.table(records)
    # lora: 3 points below, less by a third of them per ten times the size, beside 6 of all.
    assert scale.slope(table, "gap", "lora").value == pytest.approx(1.0, abs=0.3)
    assert scale.slope(table, "points", "full").value == pytest.approx(6.0, abs=0.3)
    expected = np.polyfit(
        np.log10(table.drop_duplicates("model")["parameters"].astype(float)),
        table[table["method"] == "prefix"].groupby("model", sort=False)["points"].mean(),
        1,
    )[0]
    assert scale.slope(table, "points", "prefix").value == pytest.approx(expected, abs=1e-9)
    assert scale.spread_slope(table).high < 0


def test_seeds_alone_spread_no_placements(records) -> None:
    """Placements that differ by noise alone have no spread, at every size."""
    table, random = scale.table(records), np.random.default_rng(0)
    sizes = table["parameters"].rank(method="dense")
    noisy = table.assign(points=70 + random.normal(0, 3 / sizes))
    assert scale._spreads(noisy).mean().abs().max() < 2.0
    slope = scale.spread_slope(noisy)
    assert slope.low < 0 < slope.high


def test_runs_of_two_settings_are_not_averaged(records) -> None:
    other = replace(records[0], config=records[0].config | {"steps": 7, "seed": 99})
    with pytest.raises(InputError, match="differ in more than their seed"):
        scale.table([*records, other])
