"""The benchmark of linear-quadratic solvers: its contestants solve the same problem."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltacontrol.experiments.benchmarks.solvers import CONTESTANTS, Benchmark, Problem


def test_contestants_find_the_same_gain() -> None:
    problem = Problem.random(5, 2, 6)
    expected = CONTESTANTS["deltacontrol"](problem)()
    assert abs(CONTESTANTS["numpy"](problem)() - expected).max() <= 1e-12
    batch = Problem.random(5, 2, 6, 3)
    for i, gain in enumerate(CONTESTANTS["deltacontrol"](batch)()):
        found = CONTESTANTS["numpy"](batch.example(i))()
        assert abs(found - gain).max() <= 1e-12


def test_a_small_run_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "solvers.json"
    benchmark = Benchmark(
        sizes=((3, 2, 4),),
        seconds=0.0,
        batch=2,
        batch_size=(3, 2, 4),
        scan_sizes=((2, 1),),
        scan_horizons=(8,),
        out=out,
    )
    benchmark.run()
    record = json.loads(out.read_text())
    assert record["single"][0]["gain_difference"]["numpy"] <= 1e-12
    assert record["batch"]["gain_difference"]["loop"] <= 1e-12
    assert record["scan"][0]["gain_difference"]["scan"] <= 1e-12
    ratio = record["single"][0]["time_over_deltacontrol"]["numpy"]
    assert 0 < ratio["q25"] <= ratio["median"] <= ratio["q75"]
    assert record["scan"][0]["turns"] == 5 and set(record["scan"][0]["seconds"]) == {
        "recursion",
        "scan",
    }
    assert "times deltacontrol" in capsys.readouterr().out
