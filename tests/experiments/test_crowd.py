"""Sixty-four workers on one store with a slow file system make no run twice, and lose none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments.crowd import HEADING, RUNS_EACH

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_many_workers_on_one_store() -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.experiments.crowd", "--workers", "4", "64"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"\n{done.stdout}")
    heading, *rows = done.stdout.splitlines()
    assert heading == HEADING, done.stderr
    found = [[int(cell) for cell in row.split()[:4]] for row in rows]
    assert found == [[workers, RUNS_EACH * workers, 0, 0] for workers in (4, 64)]
