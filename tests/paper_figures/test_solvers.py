"""What the figure of the solvers computes from its records."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.paper_figures.figures import solvers
from tests.paper_figures import synthetic


def test_gaps_are_above_the_lowest_of_the_same_seed(tmp_path: Path) -> None:
    records = synthetic.write(RunStore(tmp_path), synthetic.GRIDS["solvers"](seeds=2))
    table, curves = solvers.table(records), solvers.curves(records)
    for seed in (0, 1):
        lines = curves[curves["seed"] == seed]
        assert lines["gap"].min() == 0.0
        lowest = lines["objective"].min()
        assert (lines["gap"] - (lines["objective"] - lowest)).abs().max() == 0.0
        ends = table[table["seed"] == seed]
        assert ends["gap"].min() == 0.0 and (ends["gap"] >= 0).all()
    assert list(table["solver"].unique()) == list(solvers.NAMES)


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
    assert "thin ones" not in alone and "1 seed (" in alone


@pytest.mark.parametrize("known", sorted(solvers.NAMES))
def test_every_solver_has_its_own_look(known: str) -> None:
    looks = (solvers.COLORS, solvers.STYLES, solvers.MARKERS)
    for look in looks:
        assert known in look
    marks = {(solvers.COLORS[s], solvers.MARKERS[s]) for s in solvers.NAMES}
    assert len(marks) == len(solvers.NAMES)
