"""Figures are drawn from records without torch, even indirectly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from deltacontrol.experiments.cli.deltas import Deltas
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.paper_figures import base
from deltacontrol.paper_figures.figures import taxonomy
from tests.paper_figures.synthetic import GRIDS, write

ROOT = Path(__file__).resolve().parents[2]
DRAW = """
import importlib, json, pkgutil, sys
from pathlib import Path
from deltacontrol import paper_figures
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.paper_figures import base
for info in pkgutil.walk_packages(paper_figures.__path__, "deltacontrol.paper_figures."):
    importlib.import_module(info.name)
    assert "torch" not in sys.modules, f"{info.name} imports torch"
root, ids = Path(sys.argv[1]), json.loads(sys.argv[2])
for name, wanted in ids.items():
    store, figure = RunStore(root / name), base.load(name)
    records = [store.get(one) for one in wanted]
    table, curves = figure.table(records), figure.curves(records)
    picture, caption = figure.draw(table, curves), figure.caption(table)
    print(name, len(figure.summary(table)), len(picture.axes), len(caption))
    assert "torch" not in sys.modules, f"drawing {name} imports torch"
"""


def test_all_figures_are_drawn_without_torch(tmp_path: Path) -> None:
    """A subprocess, because this process has torch already."""
    ids = {
        name: [record.id for record in write(RunStore(tmp_path / name), GRIDS[name]())]
        for name in base.names()
        if name in GRIDS
    }
    command = [sys.executable, "-c", DRAW, str(tmp_path), json.dumps(ids)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    drawn = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in drawn] == sorted(GRIDS)
    assert all(int(count) > 0 for _, *counts in drawn for count in counts)


def test_the_table_of_methods_is_that_of_the_deltas(tmp_path: Path) -> None:
    Deltas(csv=tmp_path / "methods.csv").run()
    assert (tmp_path / "methods.csv").read_bytes() == taxonomy.METHODS.read_bytes(), (
        f"{taxonomy.METHODS.name} is stale: deltacontrol deltas --csv {taxonomy.METHODS}"
    )
    assert len(pd.read_csv(taxonomy.METHODS)) > 30
