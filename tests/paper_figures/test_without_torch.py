"""Figures are drawn from records without torch, even indirectly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltacontrol.deltas import registry
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.paper_figures import base, methods
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


@pytest.mark.slow
def test_all_figures_are_drawn_without_torch(tmp_path: Path) -> None:
    """A subprocess, because this process has torch already."""
    ids = {
        name: [record.id for record in write(RunStore(tmp_path / name), GRIDS[name]())]
        for name in base.names()
        if name in GRIDS  # test_mechanism draws the others' committed records without torch
    }
    command = [sys.executable, "-c", DRAW, str(tmp_path), json.dumps(ids)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    drawn = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in drawn] == list(ids) and len(ids) >= 8
    assert all(int(count) > 0 for _, *counts in drawn for count in counts)


def test_what_is_read_of_the_methods_is_what_their_classes_say() -> None:
    read = methods.declared()
    assert list(read) == list(registry.available()) and len(read) > 30
    for name, kind in registry.available().items():
        look = None if kind.look is None else methods.Look(*kind.look)
        assert read[name] == methods.Method(kind.category, kind.law, look, kind.acts_on)


def test_looks_are_distinct() -> None:
    looks = [look for m in methods.declared().values() if (look := m.look) is not None]
    for attribute in ("label", "color", "place"):
        assert len({getattr(look, attribute) for look in looks}) == len(looks)
