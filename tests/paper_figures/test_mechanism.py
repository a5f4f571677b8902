"""How figures are found, and what may be averaged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.paper_figures import base
from deltacontrol.theory.errors import InputError
from tests.paper_figures.synthetic import GRIDS, Synthetic, committed, write


def test_every_figure_has_records_to_be_tested_on() -> None:
    assert set(GRIDS) <= set(base.names())
    for name in set(base.names()) - set(GRIDS):
        assert committed(name)


def test_a_figure_without_a_grid_has_its_committed_records() -> None:
    assert {record.kind for record in committed("d90")} != {"synthetic"}


def test_every_figure_is_complete() -> None:
    for name in base.names():
        figure = base.load(name)
        assert isinstance(figure, base.FigureModule)
        assert figure.STUDY and figure.TITLE


def test_unknown_figure_names_the_nearest() -> None:
    with pytest.raises(InputError, match="performance"):
        base.load("preformance")


def test_settings_are_not_pooled(tmp_path: Path) -> None:
    grid = GRIDS["performance"](seeds=2)
    other = Synthetic(grid[1][0].config | {"learning_rate": 0.5})
    records = write(RunStore(tmp_path), [grid[0], (other, *grid[1][1:])])
    with pytest.raises(InputError, match="more than their seed"):
        base.load("performance").table(records)


def test_a_seed_counts_once(tmp_path: Path) -> None:
    records = write(RunStore(tmp_path), GRIDS["performance"](seeds=1)[:1])
    with pytest.raises(InputError, match="two records"):
        base.check_replicates(records * 2, ["lora", "lora"])


@pytest.mark.slow
def test_committed_records_are_drawn_without_torch() -> None:
    """In a process of its own."""
    code = (
        "import sys; from deltacontrol.paper_figures import base, collect\n"
        "for name in base.names():\n"
        "    figure = base.load(name)\n"
        "    table = figure.table(collect.committed(figure.STUDY))\n"
        "    assert len(table) and figure.caption(table)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert len(base.names()) >= 8 and done.returncode == 0, done.stderr
