"""The four files of ``tests/user_files``, each a user's own, work as files of this project do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from deltacontrol.deltas import attach, registry
from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run_all
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.paper_figures import marks
from deltacontrol.theory import plugins
from deltacontrol.theory.control.solved_problems import exact_problems
from deltacontrol.theory.solvers.solving import Solver, solve

FILES = Path(__file__).with_name("user_files")
WORDS = ("good", "bad", "fine", "poor")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files, a tiny model and a task; what is loaded is forgotten after it."""
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.setattr(plugins, "_adopted", {})
    for file in FILES.glob("*.py"):
        shutil.copy(file, tmp_path)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(vocabulary), intermediate_size=16, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    rows = [{"text": f"{WORDS[i % 4]} {i}", "label": ("yes", "no")[i % 2]} for i in range(100)]
    pd.DataFrame(rows).to_csv(tmp_path / "task.csv", index=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def tuning(**options) -> FineTuning:
    small = {"model": "model", "task": "task.csv", "steps": 2, "batch_size": 4, "max_length": 8}
    return FineTuning(**(small | {"device": "cpu", "precision": "fp32"} | options))


def call(*arguments: str) -> int:
    return cli._main(list(arguments))


def test_a_delta(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len((project / "my_delta.py").read_text().splitlines()) <= 30
    load = ("--load", "my_delta.py")
    assert call(*load, "deltas") == 0
    assert "h (1 + s)" in capsys.readouterr().out
    assert call(*load, "inspect", "--model", "model", "--delta", "mine") == 0
    assert capsys.readouterr().out.count("mine: s 1") == 2
    options = "--model model --task task.csv --delta mine --steps 2 --max-length 8 --device cpu"
    assert call(*load, "finetune", *options.split()) == 0
    out = capsys.readouterr().out
    assert out.count("learning rate 0.03: default of the method; no search is recorded for") == 1
    assert "completed" in out
    assert marks.looks(["mine", "lora"])["mine"].label == "my scales"


def test_a_delta_in_the_worker_processes_of_a_sweep(project: Path) -> None:
    kind = plugins.load("my_delta.py").Mine
    runs = [tuning(deltas=(kind(),), seed=seed) for seed in range(2)]
    records = run_all(runs, RunStore(project / "runs"), workers=2, progress=False)
    assert [r.status for r in records] == ["completed"] * 2
    assert {r.config["learning_rate"] for r in records} == {0.03}


def test_a_delta_acts_as_its_law_says(project: Path) -> None:
    kind = plugins.load("my_delta.py").Mine
    base = BertForSequenceClassification.from_pretrained("model").eval()
    ids = torch.tensor([[2, 5, 6, 3]])
    before = base(input_ids=ids).logits
    tuned = attach(base, kind())
    assert torch.equal(tuned(input_ids=ids).logits, before)
    assert tuned.num_trainable == kind().num_parameters(tuned.host) == 2
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.fill_(-1.0)  # no feed-forward output at all
    scaled = tuned(input_ids=ids).logits
    tuned.detach()
    for layer in base.bert.encoder.layer:
        torch.nn.init.zeros_(layer.output.dense.weight)
        torch.nn.init.zeros_(layer.output.dense.bias)
    torch.testing.assert_close(scaled, base(input_ids=ids).logits)
    assert not torch.allclose(scaled, before)


def test_a_run_belongs_to_the_text_of_its_delta(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(project / "runs")
    plugins.load("my_delta.py")
    mine, inside = tuning(deltas=("mine",)), tuning(deltas=("subspace:dimension=2,of=mine",))
    record = run_all([mine], store, workers=1, progress=False)[0]
    assert record.provenance["digests"]["code"] == mine.code() == inside.code()
    assert store.find(mine) == store.lookup([mine])[0] == record
    lora = tuning(deltas=("lora",))
    before = store.path(inside).name, store.path(lora).name
    text = (project / "my_delta.py").read_text()
    (project / "my_delta.py").write_text(text.replace('1 + control["s"]', '1 - control["s"]'))
    monkeypatch.setattr(plugins, "_loaded", {})
    plugins.load("my_delta.py")
    again = tuning(deltas=("mine",))
    assert again == mine and store.find(again) is None and store.lookup([again]) == [None]
    assert (store.path(inside).name == before[0], store.path(lora).name == before[1]) == (
        False,
        True,
    )
    assert lora.code() is None


def test_a_claim(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = ("--load", "my_claim.py", "claims")
    assert call(*load, "run", "901") == 0
    assert "verdict           holds" in capsys.readouterr().out
    kept = json.loads((project / "runs" / "claims" / "901_harmonic_numbers.json").read_text())
    assert kept["outcome"]["parts"][0]["verdict"] == "holds" and kept["outcome"]["code"]
    assert call(*load) == 0
    row = next(r for r in capsys.readouterr().out.splitlines() if "H_n grows as log n" in r)
    assert "holds" in row and "stale" not in row
    text = (project / "my_claim.py").read_text()
    (project / "my_claim.py").write_text(text.replace("1 / k for", "1.0 / k for"))
    assert call(*load) == 0
    row = next(r for r in capsys.readouterr().out.splitlines() if "H_n grows as log n" in r)
    assert "holds, stale" in row


def test_a_claim_of_ones_own_is_not_published_with_the_project(project: Path) -> None:
    from deltacontrol.experiments.claims import board, scoreboard
    from deltacontrol.theory.errors import InputError

    claim = plugins.load("my_claim.py").CLAIM
    store = RunStore(project / "runs")
    with pytest.raises(InputError, match="claim 901 is of your own file"):
        scoreboard.publish(claim, scoreboard.evaluate(claim, store), store)
    assert "H_n grows" not in board.markdown()


def test_a_figure_with_its_study(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--only", "my_figure", "--preset", "quick", "--workers", "1")
    assert call("--load", "my_figure.py", "figures", *options) == 0
    assert "my_figure: The average of a die's throws (2 runs)" in capsys.readouterr().out
    assert (project / "figures" / "my_figure.png").stat().st_size > 1000
    records = RunStore(project / "runs").records()
    assert sorted(r.config["seed"] for r in records) == [0, 1]
    assert all(r.provenance["digests"]["code"] for r in records)


def test_a_solver(project: Path) -> None:
    plugins.load("my_solver.py")
    (kind,) = plugins.members(Solver)
    assert kind.__name__ == "BarzilaiBorwein"
    for known in exact_problems():
        if known.linear_quadratic:
            problem = known.make()
            start = known.start(problem)
            solution = solve(problem, kind.example(problem, start), start, tol=1e-9)
            assert solution.status == "converged", known.name
            assert known.error(solution.controls) < 1e-6, known.name


def test_all_of_them_together_from_the_projects_own_settings(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(file.name for file in FILES.glob("*.py"))
    (project / "pyproject.toml").write_text(f"[tool.deltacontrol]\nload = {json.dumps(names)}\n")
    assert call("deltas") == 0 and "h (1 + s)" in capsys.readouterr().out
    assert call("claims", "list", "901") == 0 and "H_n grows" in capsys.readouterr().out
    assert "mine" in registry.available() and len(list(plugins.members(Solver))) == 1
