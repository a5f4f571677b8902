"""A run's identity: files are hashed once, and a run whose files changed is not recorded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest

from deltacontrol.experiments import models, sources, tasks
from deltacontrol.experiments.runs.store import Experiment, Outcome, RunStore, Workspace
from deltacontrol.experiments.runs.sweep import run
from deltacontrol.theory.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files whose contents were read."""
    found = []
    inner = sources.sha256_of

    def counted(*paths):
        found.extend(path.name for path in paths)
        return inner(*paths)

    monkeypatch.setattr(sources, "sha256_of", counted)
    return found


def test_a_models_folder_is_hashed_once_a_process(folder, hashed, monkeypatch):
    monkeypatch.setattr(sources, "_SETTLED_NS", -1)
    first = models.digest(str(folder))
    for _ in range(4):
        assert models.digest(str(folder)) == models.resolve(str(folder)).digest == first
    assert sorted(hashed) == ["config.json", "model.safetensors", "tokenizer.json"]
    (folder / "model.safetensors").write_text("model.safetensorz")  # of the same size
    assert models.digest(str(folder)) != first
    assert hashed[3:] == ["model.safetensors"]
    (folder / "model.safetensors").write_text("model.safetensors")
    assert models.digest(str(folder)) == first


def test_a_file_that_has_just_changed_is_hashed_again(folder, hashed):
    for text in ("one", "two"):
        (folder / "config.json").write_text(text)
        models.digest(str(folder))
    assert hashed.count("config.json") == 2 and models.digest(str(folder))
    assert hashed.count("config.json") == 3


def test_data_are_hashed_once_too(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(sources, "_SETTLED_NS", -1)
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    assert len({tasks.digest(str(tmp_path / "rows.csv")) for _ in range(3)}) == 1
    assert hashed == ["rows.csv"]


@dataclass(frozen=True)
class Reader(Experiment):
    """Reads a model's folder and a file of data, and perhaps changes one of them."""

    kind: ClassVar[str] = "reader"
    model: str = ""
    task: str = ""
    changes: str = ""

    def execute(self, workspace: Workspace) -> Outcome:
        workspace.folder.mkdir(parents=True)
        (workspace.folder / "checkpoint").write_text("")
        if self.changes:
            Path(self.changes).write_text("other")
        return Outcome("completed", {"loss": 1.0}, pd.DataFrame({"step": [1]}))


@pytest.mark.parametrize(
    ("changed", "words"), [("model/model.safetensors", "its model"), ("rows.csv", "its data")]
)
def test_a_run_whose_files_changed_is_not_recorded(folder, tmp_path, changed, words):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\na,b\n")
    store = RunStore(tmp_path / "runs")
    with pytest.raises(InputError, match=f"the files of {words} changed while.*run it again"):
        run(Reader(str(folder), str(rows), str(tmp_path / changed)), store, progress=False)
    assert store.records() == [] and not list((store.root / ".partial").iterdir())
    record = run(Reader(str(folder), str(rows)), store, progress=False)
    assert record.provenance["digests"]["model"] == models.digest(str(folder))
