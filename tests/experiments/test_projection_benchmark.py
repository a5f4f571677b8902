"""The benchmark of projections runs, and its ratios are those of its seconds."""

from __future__ import annotations

import json

import pytest
from transformers import BertConfig, BertForSequenceClassification

from deltacontrol.experiments.benchmarks.projections import Benchmark


def test_every_part_gives_its_numbers(tmp_path, monkeypatch, capsys) -> None:
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    monkeypatch.setattr(Benchmark, "_base", lambda _: BertForSequenceClassification(config))
    monkeypatch.setattr(Benchmark, "_alone", lambda *_: 4 * 5000)
    out = tmp_path / "result.json"
    result = Benchmark(
        full_dim=5000, dims=(3, 20), kinds=("fastfood", "gaussian"), most=50_000, step_dim=20,
        batch_size=2, length=8, turns=2, warmup=1, threads=(1,), out=out,
    ).run()  # fmt: skip
    assert result == json.loads(out.read_text())
    found = result["threads_1"]
    # 5000 x 20 Gaussian numbers are above the limit.
    assert set(found["products"]) == {"fastfood 3", "gaussian 3", "fastfood 20"}
    for numbers in found["products"].values():
        assert numbers["at_work"] == 1
        for name in ("lift", "adjoint"):
            ratio = numbers[f"{name}_seconds"]["median"] / numbers["copy"]["median"]
            assert numbers[name]["median"] == pytest.approx(ratio)
    assert found["reference"]["difference"] < 1e-5 and found["reference"]["speed_up"]["q25"] > 0
    assert found["step"]["did_ratio"]["median"] > 0 and found["step"]["said_ratio"]["median"] > 0
    printed = capsys.readouterr().out
    assert "left out: 1.0e+05" in printed and "times faster" in printed
    assert "of full fine-tuning's" in printed
