"""The benchmark of serving, on a tiny model: all contestants give one result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltacontrol.experiments.benchmarks.serving import Benchmark
from deltacontrol.theory.errors import InputError
from tests import tiny_model


def test_all_contestants_give_the_same_outputs(tmp_path: Path) -> None:
    model = tiny_model.write(tmp_path, classes=2)["model"]
    out = tmp_path / "serving.json"
    found = Benchmark(
        model, adapters=(1, 2), rows=4, length=5, turns=2, warmup=0, threads=1, out=out
    ).run()
    assert json.loads(out.read_text())["adapters"] == found["adapters"]
    for row in found["adapters"]:
        for name in ("mixed", "apart", "peft"):
            assert row[name]["difference"] < 1e-5 and row[name]["rows_per_second"] > 0
        assert row["adapters_differ"] > 1e-3 or row["adapters"] == 1


def test_adapters_share_the_rows() -> None:
    with pytest.raises(InputError, match="3 adapters do not share 32 rows"):
        Benchmark(adapters=(3,)).run()
