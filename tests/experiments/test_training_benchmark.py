"""The benchmark of a training step: what it counts, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltacontrol.experiments.benchmarks.training import SHAPES, Benchmark, measured_peak


def test_a_step_of_lora_costs_four_flops_a_weight_and_token(tmp_path: Path, capsys) -> None:
    """Of a model that is large beside its attention and its deltas, and as wide as deep."""
    pytest.importorskip("peft")
    out = tmp_path / "training.json"
    small = Benchmark(
        shape="small", batch_size=2, length=16, rank=2, compiled=False, turns=1, warmup=0,
        precision="fp32", device="cpu", threads=1, peak_tflops=1e-3, out=out,
    )  # fmt: skip
    found = small.run()
    width, blocks, heads, shared, inner, vocabulary = SHAPES["small"]
    head = width // heads
    block = 2 * width * width + 2 * width * shared * head + 3 * width * inner
    weights = blocks * block + width * vocabulary
    assert 3.6 < found["flops_per_step"] / (weights * 32) < 4.2
    ours = found["contestants"]["ours"]
    expected = found["flops_per_step"] / ours["seconds"]["median"] / 1e9
    assert ours["mfu"] == pytest.approx(expected)
    assert found["contestants"]["peft"]["time_ratio"]["median"] == 1
    assert json.loads(out.read_text())["peak_is"] == "given"
    assert "tokens/s" in capsys.readouterr().out


def test_the_peak_is_a_rate() -> None:
    assert 1e8 < measured_peak("fp32", "cpu", turns=1) < 1e15
