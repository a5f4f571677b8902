"""The benchmark of deltas runs, and its account of memory adds up."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from deltacontrol.deltas import HeadTuning, LoRA, attach
from deltacontrol.experiments.benchmarks import contest, deltas
from deltacontrol.experiments.benchmarks.contest import alternate, peak_allocated, saved_bytes
from deltacontrol.experiments.training import compiling


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny-bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of peft
def test_every_part_gives_its_numbers(tiny, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(deltas, "TOGETHER", ((3, 2, 8),))
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    out = tmp_path / "result.json"
    benchmark = deltas.Benchmark(
        methods=("lora", "ia3"), model=tiny, decoder="", batch_size=2, length=8, turns=2, warmup=1,
        threads=1, precision="fp32", device="cpu", out=out,
    )  # fmt: skip
    result = benchmark.run()
    assert result == json.loads(out.read_text())
    for name in ("lora", "ia3"):
        entry = result["peft"][name]
        sizes = entry["num_trainable"]
        assert sizes["ours"] == sizes["peft"]
        assert min(entry["peak_bytes"].values()) > 0
        assert 0 < entry["time_ratio"]["q25"] <= entry["time_ratio"]["q75"]
    compiled = result["compiled"]
    assert set(compiled) == {"ours", "peft", "ours compiled", "peft compiled"}
    assert compiled["peft"]["time_ratio"]["median"] == compiled["peft"]["peak_ratio"] == 1
    assert compiled["ours compiled"]["compile_seconds"] > 0
    memory = result["memory"][tiny]
    ours, lora = (sum(memory["kept_bytes"][n].values()) for n in ("state-based", "lora"))
    assert memory["ratio"] == ours / lora < 1
    assert result["caching"][tiny]["num_frozen"] == 1
    assert result["caching"][tiny]["bytes_an_example"] == 8 * 32 * 4
    (together,) = result["together"]
    assert together["copies"] == 3 and 1 <= together["group"] <= 3
    assert "times the throughput" in capsys.readouterr().out


def test_the_peak_is_that_of_what_is_alive_at_one_time() -> None:
    def step() -> None:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        torch.empty(800)
        del second

    assert peak_allocated(step, "cpu") == 4 * 1500


def test_the_profiler_prints_nothing(capfd) -> None:
    peak_allocated(lambda: torch.empty(10), "cpu")
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_what_is_kept_is_counted_once_and_without_parameters() -> None:
    class Square(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x):
            y = x * self.weight  # keeps x
            return type("Output", (), {"loss": (y * y).sum()})  # keeps y, twice the same

    found = saved_bytes(Square(), {"x": torch.ones(10, 4)}, "fp32", "cpu")
    assert found == {"": 2 * 10 * 4 * 4}


def test_what_a_delta_keeps_is_told_from_what_the_model_keeps(tiny) -> None:
    model = BertForSequenceClassification.from_pretrained(tiny)
    controlled = attach(model, LoRA(rank=2), HeadTuning()).eval()
    batch = {"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.tensor([0, 1])}
    paths = saved_bytes(controlled, batch, "fp32", "cpu")
    assert any(path.startswith("controls.lora.") for path in paths)
    assert any(path.startswith("model.bert.encoder.layer.*.intermediate") for path in paths)
    assert not any(part.isdigit() for path in paths for part in path.split("."))


def test_contestants_alternate() -> None:
    order: list[str] = []
    seconds = alternate({n: lambda n=n: order.append(n) for n in ("a", "b")}, turns=2, warmup=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_contest_ends_behind_its_limit() -> None:
    clock = iter(range(1000))  # every step takes a second
    steps = {name: lambda: None for name in ("a", "b")}
    seconds = alternate(steps, turns=50, warmup=1, now=lambda: next(clock), limit=11.0)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 6, "b": 6}
    seconds = alternate(steps, turns=50, warmup=1, now=lambda: next(clock), limit=0.0)
    assert len(seconds["a"]) == contest.LEAST_TURNS
