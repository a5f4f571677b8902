"""The guide: its two files are short, stand in it as they are, and go from formula to verdict."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.runs import sweep
from deltacontrol.experiments.runs.running import run
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.studies.d90.fine_tuning import FineTuningDimension
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.theory import plugins
from tests import tiny_model

ROOT = Path(__file__).resolve().parents[1]
FILES = Path(__file__).with_name("user_files") / "guide"
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
MOST = 60


def in_guide() -> list[list[str]]:
    """The commands of the guide, without their first word."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    plain = "\n".join(text for language, text in blocks if not language)
    lines = plain.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("deltacontrol ")]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files, a tiny model and a task; what is loaded is forgotten after it."""
    monkeypatch.setattr(plugins, "_loaded", {})
    for file in FILES.glob("*.py"):
        shutil.copy(file, tmp_path)
    tiny_model.write(tmp_path, classes=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["fewer_dimensions", "first_step"])
def test_the_files_are_short_and_stand_in_the_guide(name: str) -> None:
    text = (FILES / f"{name}.py").read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if line.strip()]) <= MOST
    assert f"```python\n{text}```\n" in GUIDE


def test_the_commands_of_the_guide_are_understood(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is parsed whole, and not run."""
    done: list[Any] = []
    for kind in cli.available().values():
        monkeypatch.setattr(kind, "run", lambda self: done.append(self))
    commands = in_guide()
    for command in commands:
        assert cli._main(command) == 0, command
    assert len(done) == len(commands) > 8
    assert {type(one).__name__ for one in done} >= {"Dimension", "Compare", "Claims", "Runs"}


def test_a_comparison_of_dimensions_shares_its_searches_with_the_claim(project: Path) -> None:
    """By their configurations: what the guide's commands train, the claim finds."""
    claim = plugins.load("fewer_dimensions.py")
    wanted = {search.delta: search.to_config() for search in claim.CLAIM.runs()}
    for delta in ("layer-norm", "lora"):
        (words,) = (c[1:] for c in in_guide() if c[0] == "dimension" and delta in c)
        given = dict(zip((w[2:].replace("-", "_") for w in words[::2]), words[1::2], strict=True))
        kinds = {"steps": int, "seeds": int}
        made = FineTuningDimension(**{n: kinds.get(n, str)(v) for n, v in given.items()})
        assert made.to_config() == wanted[delta]


def made(truth: float) -> tuple[dict[str, Any], pd.DataFrame]:
    """Result and curve of a search whose answer is known: 90 % is reached at `truth`."""
    rows = [
        {"dimension": d, "performance": 0.72 + 0.1 * math.log10(d / truth) + e, "used": True}
        for d in (100, 1000, 10_000, 100_000)
        for e in (-0.001, 0.001)
    ]
    result = {"baseline": [0.8, 0.8], "target": 0.72, "chance": 0.2, "confidence": 0.9}
    return result, pd.DataFrame(rows).astype({"dimension": "Int64"})


@pytest.mark.parametrize(
    ("first", "second", "verdict"), [(300, 3000, "holds"), (3000, 300, "fails")]
)
def test_from_the_formula_of_dimensions_to_a_verdict(
    first: int, second: int, verdict: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From records of searches whose answers are known; nothing is trained."""
    module = plugins.load("fewer_dimensions.py")
    store = RunStore(Path("runs"))
    for delta, truth in ((module.FIRST, first), (module.SECOND, second)):
        store.write(module.search(delta), *made(truth))
    assert cli._main(["claims", "run", "fewer_dimensions"]) == (verdict != "holds")
    assert "LayerNorm tuning needs fewer dimensions than LoRA" in capsys.readouterr().out
    kept = json.loads(Path("runs/claims/911_fewer_dimensions.json").read_text())
    (part,) = kept["outcome"]["parts"]
    assert part["verdict"] == verdict
    assert part["evidence"]["value"] == pytest.approx(math.log10(first / second), abs=0.02)
    assert part["control"]["value"] > 0 > part["passing"]["value"]


@pytest.mark.slow
def test_searches_of_a_tiny_model_and_their_verdict(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The searches first, as the guide runs them; the claim then trains nothing."""
    module = plugins.load("fewer_dimensions.py")
    small = {"model": "tiny-bert", "task": "task.csv", "steps": 60, "seeds": 2, "budget": 10,
             "max_length": 12, "batch_size": 32, "baseline_seeds": 1, "smallest": 2, "start": 16,
             "largest": 32}  # fmt: skip
    monkeypatch.setattr(module, "SETTING", small)
    monkeypatch.setattr(module, "SECOND", "lora:rank=2")
    monkeypatch.setattr(sweep, "default_workers", lambda: 1)  # in this process
    store = RunStore(Path("runs"))
    assert all(run(search, store, progress=False) for search in module.CLAIM.runs())
    before = len(store.records())
    assert cli._main(["claims", "run", "fewer_dimensions"]) in (0, 1)
    assert "verdict" in capsys.readouterr().out and len(store.records()) == before


def test_from_the_formula_of_the_first_step_to_a_verdict(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = plugins.load("first_step.py")
    small = {"model": "tiny-bert", "task": "task.csv", "steps": 8, "max_length": 12}
    monkeypatch.setattr(module, "SETTING", small)
    monkeypatch.setattr(
        module, "DELTAS", ["lora", "bitfit", "houlsby:bottleneck=4", "layer-norm", "full"]
    )
    monkeypatch.setattr(module, "SEEDS", range(1))
    trainings = [FineTuning(deltas=(d,), **small) for d in module.DELTAS]
    store = RunStore(Path("runs"))
    assert all(run(training, store, progress=False) for training in trainings)
    assert cli._main(["claims", "run", "first_step"]) in (0, 1)
    assert "The first step foretells accuracy" in capsys.readouterr().out
    cosines, scores = module.measured()
    assert len(cosines) == 5 and all(0 < c < 1 for c in cosines)  # an update follows descent
    assert all(0 <= score <= 1 for score in scores)
    assert module.correlation([1, 2, 3], [2, 4, 9]) == pytest.approx(1.0)
    assert module.correlation([1, 2, 3], [9, 4, 2]) == pytest.approx(-1.0)
    # One step of plain gradient descent on those very rows has cosine one.
    monkeypatch.setattr(module, "ROWS", range(len(trainings[0].setting().data.train)))
    one = FineTuning(deltas=("bitfit",), **{**small, "steps": 1}, optimiser="sgd", warmup=0.0,
                     learning_rate=1e-3, batch_size=len(module.ROWS), max_grad_norm=None,
                     precision="fp32")  # fmt: skip
    record = run(one, store, progress=False)
    assert record is not None
    assert module.cosine(one, record) == pytest.approx(1.0, abs=1e-4)
