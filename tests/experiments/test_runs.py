"""Run records: identity, whole-or-nothing writing, damage, unwritable stores."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch

from deltacontrol.experiments.runs import store as runs
from deltacontrol.experiments.runs.store import Digests, Experiment, Outcome, RunStore, Workspace
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class Toy(Experiment):
    kind: ClassVar[str] = "toy"
    seed: int = 0
    rate: float = 0.1
    model_digest: str | None = "a"

    def to_config(self) -> dict[str, Any]:
        config = asdict(self)
        config.pop("model_digest")
        return config

    def digests(self) -> Digests:
        return Digests(model=self.model_digest)

    def execute(self, workspace: Workspace) -> Outcome:
        return Outcome("completed", {"loss": 1.0}, curve())


def curve() -> pd.DataFrame:
    return pd.DataFrame({"step": [1, 2], "loss": [1.0, 0.5]})


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "runs")


def test_round_trip(store):
    controls = {"lora.A": torch.randn(3, 2), "lora.B": torch.zeros(2)}
    assert store.find(Toy()) is None and store.records() == []
    written = store.write(Toy(), {"loss": 0.5}, curve(), controls, wall_s=2.0, message="fine")
    found = store.find(Toy())
    assert found == written and store.records() == [found]
    assert found.config == {"seed": 0, "rate": 0.1} and found.result == {"loss": 0.5}
    assert found.status == "completed" and found.message == "fine"
    pd.testing.assert_frame_equal(found.curve(), curve())
    assert all(torch.equal(found.controls()[k], v) for k, v in controls.items())
    assert not list((store.root / ".partial").glob("*/record-*"))


def test_provenance_names_versions_hardware_and_no_path(store, tmp_path):
    record = store.write(Toy(seed=3), {}, curve(), wall_s=2.0)
    assert record.provenance["seeds"] == {"seed": 3}
    # torch names its build (2.13.0+cu130), the metadata of the default wheel only the release.
    release = record.provenance["packages"]["torch"].partition("+")[0]
    assert release == torch.__version__.partition("+")[0]
    assert record.provenance["hardware"]["threads"] == torch.get_num_threads()
    assert record.provenance["digests"] == {"model": "a", "data": None}
    text = (record.folder / "run.json").read_text()
    assert str(tmp_path) not in text and os.path.expanduser("~") + "/" not in text


def test_id_depends_on_configuration_and_digests_only(store):
    ids = {store.path(t).name for t in (Toy(), Toy(seed=1), Toy(rate=0.2), Toy(model_digest="b"))}
    assert len(ids) == 4
    assert store.path(Toy()) == store.path(Toy(seed=0))
    store.write(Toy(), {}, curve())
    assert store.find(Toy(model_digest="b")) is None
    assert [r.config["seed"] for r in store.matching(Toy(model_digest="b"))] == [0]


def test_non_finite_results_become_null_and_configurations_must_be_finite(store):
    values = {"a": math.nan, "b": [math.inf, 1.0], "c": torch.tensor(2.0)}
    record = store.write(Toy(), values, curve(), status="diverged")
    assert record.result == {"a": None, "b": [None, 1.0], "c": 2.0}
    with pytest.raises(InputError, match="finite"):
        store.path(Toy(rate=math.nan))


def test_first_record_is_kept(store):
    first = store.write(Toy(), {"loss": 1.0}, curve())
    second = store.write(Toy(), {"loss": 2.0}, curve())
    assert second.result == first.result == {"loss": 1.0}


@pytest.mark.parametrize("name", ["run.json", "curve.parquet", "controls.safetensors"])
def test_truncated_files_are_reported(store, name):
    record = store.write(Toy(), {}, curve(), {"a": torch.ones(4)})
    path = record.folder / name
    path.write_bytes(path.read_bytes()[:-20])
    for call in (lambda: store.find(Toy()), store.records):
        with pytest.raises(InputError, match=rf"{name} is damaged.*delete the folder"):
            call()


def test_missing_and_foreign_files_are_reported(store):
    record = store.write(Toy(), {}, curve())
    document = json.loads((record.folder / "run.json").read_text())
    document["config"]["seed"] = 9
    (record.folder / "run.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="belong to run"):
        store.find(Toy())
    (record.folder / "run.json").unlink()
    with pytest.raises(InputError, match="missing"):
        store.records()


def test_controls_may_be_left_out(store):
    bare = RunStore(store.root, keep_controls=False)
    record = bare.write(Toy(), {}, curve(), {"a": torch.ones(4)})
    with pytest.raises(InputError, match="without controls"):
        record.controls()
    full = store.write(Toy(seed=1), {}, curve(), {"a": torch.ones(4)})
    (full.folder / "controls.safetensors").unlink()
    assert store.find(Toy(seed=1)) == full


def test_unwritable_store(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(InputError, match="cannot use the run folder"):
        RunStore(blocker / "runs").write(Toy(), {}, curve())


def test_full_disk_leaves_nothing(store, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runs, "_flush", full)
    with pytest.raises(InputError, match="free some space"):
        store.write(Toy(), {}, curve())
    assert store.find(Toy()) is None and not list(store.root.glob(".partial/*/*"))


def test_reading_records_needs_no_torch():
    code = "import sys, deltacontrol.experiments.runs.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
