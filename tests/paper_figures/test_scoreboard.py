"""The figure of the claims: places on its axis, and what its caption counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.paper_figures.figures import scoreboard
from tests.paper_figures.grids import scoreboard as claims
from tests.paper_figures.synthetic import write


@pytest.fixture
def table(tmp_path: Path):
    return scoreboard.table(write(RunStore(tmp_path), claims.grid()))


def test_zero_is_the_bound_and_the_good_side_is_left(table) -> None:
    at = table.set_index("part")["evidence_at"]
    assert at["1"] == pytest.approx(-1, abs=1e-3)  # an error of nearly zero
    assert at["2a"] == pytest.approx(-(0.75 - 0.5) / 0.5)
    assert at["2b"] == pytest.approx((0.5 - 0.15) / 0.5)
    assert at["3"] == pytest.approx(-1)  # the middle of both bounds
    controls = table.set_index("part")["control_at"]
    assert controls["3"] == pytest.approx((4.0 - 1.5) / 0.5)
    assert controls["2c"] < 0


def test_the_caption_names_what_has_no_power(table) -> None:
    text = scoreboard.caption(table)
    assert claims.caption(table) in text
    assert "no power, in 2c." in text and "earlier result in 3 parts" in text
