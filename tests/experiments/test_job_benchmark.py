"""The benchmark of whole jobs: both contestants train and score the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltacontrol.experiments.benchmarks.jobs import Benchmark, rival_job
from tests import tiny_model


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what peft calls
@pytest.mark.parametrize("kind", ["lora", "houlsby", "last-layers"])
def test_a_rival_trains_what_it_should(tmp_path: Path, kind) -> None:
    job = Benchmark(**tiny_model.write(tmp_path), steps=3, batch_size=4, max_length=8)
    assert 0 <= rival_job(job, kind)["accuracy"] <= 1


@pytest.mark.slow
def test_a_small_contest_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places, out = tiny_model.write(tmp_path), tmp_path / "jobs.json"
    Benchmark(**places, kinds=("last-layers",), steps=2, batch_size=4, max_length=8, turns=1,
              precision="fp32", out=out).run()  # fmt: skip
    record = json.loads(out.read_text())
    assert record["last-layers"]["ratio"]["median"] > 0
    assert all(0 <= a <= 1 for each in record["last-layers"]["accuracy"].values() for a in each)
    assert "ratio" in capsys.readouterr().out


def test_kinds_that_were_measured_stay_in_the_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Benchmark, "_contest", lambda self, kind: {"kind": kind, "t": self.turns})
    out = tmp_path / "jobs.json"
    Benchmark(kinds=("lora",), turns=1, out=out).run()
    Benchmark(kinds=("houlsby",), turns=2, out=out).run()
    found = json.loads(out.read_text())
    assert found["lora"]["t"] == 1 and found["houlsby"]["t"] == 2
    Benchmark(kinds=("houlsby",), steps=7, out=out).run()  # another setting
    assert "lora" not in json.loads(out.read_text())
