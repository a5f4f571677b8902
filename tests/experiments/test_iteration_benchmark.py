"""The benchmark of iLQR and DDP: both forms walk the same iterates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltacontrol.experiments.benchmarks.iterations import Benchmark


@pytest.mark.slow
def test_a_small_run_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "iterations.json"
    Benchmark(widths=(4,), iterations=1, turns=1, max_steps=14, out=out).run()
    record = json.loads(out.read_text())
    (row,), (whole,) = record["iteration"], record["to_residual"]
    for solver in ("ilqr", "ddp"):
        assert row[solver]["difference"] <= 1e-12
        ratio = row[solver]["ratio"]
        assert 0 < ratio["q25"] <= ratio["median"] <= ratio["q75"]
    assert whole["ddp"]["status"] == "converged" and whole["ddp"]["residual"] <= 1e-8
    assert whole["ddp"]["iterations"] <= 14 and whole["newton-cg"]["iterations"] <= 14
    assert "to a residual of 1e-08" in capsys.readouterr().out
