"""What the figure of the solvers computes from its records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.paper_figures.figures import solvers
from tests.paper_figures import synthetic


def test_gaps_are_above_the_lowest_of_the_same_seed(tmp_path: Path) -> None:
    records = synthetic.write(RunStore(tmp_path), synthetic.GRIDS["solvers"](seeds=2))
    table, iterates = solvers.table(records), solvers.iterates(records)
    for seed in (0, 1):
        lines = iterates[iterates["seed"] == seed]
        assert lines["gap"].min() == 0.0
        lowest = lines["objective"].min()
        assert (lines["gap"] - (lines["objective"] - lowest)).abs().max() == 0.0
        ends = table[table["seed"] == seed]
        assert ends["gap"].min() == 0.0 and (ends["gap"] >= 0).all()
    assert list(table["solver"].unique()) == list(solvers.NAMES)


def test_lines_are_medians_of_the_iterates_in_bins_of_the_cost(tmp_path: Path) -> None:
    records = synthetic.write(RunStore(tmp_path), synthetic.GRIDS["solvers"](seeds=2))
    iterates, curves = solvers.iterates(records), solvers.curves(records)
    chosen = (curves["solver"] == "adamw") & (curves["cost"] == "gradients")
    line = curves[chosen & (curves["quantity"] == "residual")]
    assert 20 < len(line) < 40 and line["at"].is_monotonic_increasing
    assert ((line["low"] <= line["median"]) & (line["median"] <= line["high"])).all()
    own = iterates[iterates["solver"] == "adamw"]
    last = own[np.floor(solvers.BINS * np.log10(own["gradients"])) == 26]  # 398 to 501 gradients
    assert len(last) > 100
    assert line.iloc[-1]["median"] == pytest.approx(last["residual"].median(), rel=1e-12)


def test_the_caption_tells_what_the_records_say(tmp_path: Path) -> None:
    records = synthetic.write(RunStore(tmp_path), synthetic.GRIDS["solvers"](seeds=3))
    table = solvers.table(records)
    text = solvers.caption(table)
    assert "74,498 controls" in text and "4 fixed examples of at most 12 tokens" in text
    assert "AdamW 0.1 and 0.3 (0.3 and 1 given up)" in text
    newton = table[table["solver"] == "newton-cg"]
    assert f"after {newton['iterations'].median():.0f} iterations" in text
    assert f"Newton-CG: residual {newton['residual'].median():.0e}" in text
    assert "Newton-CG" in solvers.summary(table)["solver"].tolist()
    alone = solvers.caption(table[table["seed"] == 0])
    assert "(medians of 1 seed)" in alone and "2 seeds" not in alone


@pytest.mark.parametrize("known", sorted(solvers.NAMES))
def test_every_solver_has_its_own_look(known: str) -> None:
    looks = (solvers.COLORS, solvers.STYLES, solvers.MARKERS)
    for look in looks:
        assert known in look
    marks = {(solvers.COLORS[s], solvers.MARKERS[s]) for s in solvers.NAMES}
    assert len(marks) == len(solvers.NAMES)
