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
from deltacontrol.experiments.runs.record import sealed
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
    code = Toy().code()  # of the file of Toy, which is not of this project
    assert code and record.provenance["digests"] == {"model": "a", "data": None, "code": code}
    text = (record.folder / "run.json").read_text()
    assert str(tmp_path) not in text and os.path.expanduser("~") + "/" not in text


def test_id_depends_on_configuration_and_digests_only(store):
    ids = {store.path(t).name for t in (Toy(), Toy(seed=1), Toy(rate=0.2), Toy(model_digest="b"))}
    assert len(ids) == 4
    assert store.path(Toy()) == store.path(Toy(seed=0))
    store.write(Toy(), {}, curve())
    assert store.find(Toy(model_digest="b")) is None


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
    for call in (lambda: store.find(Toy()), lambda: store.get(record.id[:5])):
        with pytest.raises(InputError, match=rf"{name} is damaged.*delete the folder"):
            call()


@pytest.mark.parametrize("name", ["curve.parquet", "controls.safetensors"])
@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_flipped_byte_is_found_when_the_file_is_read(store, name, place):
    record = store.write(Toy(), {}, curve(), {"a": torch.ones(64)})
    path = record.folder / name
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=f"{name} is damaged.*differ from what run.json"):
        record.curve() if name == "curve.parquet" else record.controls()
    if name == "curve.parquet":
        with pytest.raises(InputError, match="curve.parquet is damaged"):
            store.find(Toy())


def rewrite(record, change, seal=False) -> None:
    path = record.folder / "run.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(sealed(document) if seal else document))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["result"].update(accuracy=0.99),
        lambda d: d.update(status="completed!"),
        lambda d: d["provenance"].update(started="2020-01-01"),
        lambda d: d.update(files={}),
        lambda d: d.update(note="more"),
        lambda d: d["config"].update(seed=9),
    ],
)
def test_nothing_in_run_json_can_be_changed_unnoticed(store, change):
    record = store.write(Toy(), {"accuracy": 0.5}, curve())
    rewrite(record, change)
    with pytest.raises(InputError, match="run.json is damaged.*digest"):
        store.find(Toy())
    with pytest.warns(UserWarning, match="skipped 1 folders.*no whole record"):
        assert store.records() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(files={}), "names no curve.parquet"),
        (lambda d: d["files"].pop("curve.parquet"), "names no curve.parquet"),
        (lambda d: d["files"].pop("controls.safetensors"), "does not say that it is there"),
        (lambda d: d.update(left_out=["controls.safetensors"]), "does not say that it is there"),
        (lambda d: d.update(left_out=["curve.parquet"]), "only controls.safetensors can be left"),
        (lambda d: d["files"].update({"../../etc/passwd": {}}), "names files other than"),
        (lambda d: d["files"].update({"/etc/passwd": {}}), "names files other than"),
        (lambda d: d["files"].update({"curve.parquet": {"bytes": 1}}), "no size and digest"),
        (lambda d: d["config"].update(seed=9), "belong to run"),
        (lambda d: d.update(digests={"colour": "red"}), "not those of a model"),
        (lambda d: d.update(completed={"seed": 1, "rate": 0.1}), "contradicts"),
        (lambda d: d.update(completed={"seed": 0}), "contradicts"),
        (lambda d: d.pop("result"), "lacks result"),
    ],
)
def test_lies_under_a_digest_of_their_own_are_refused(store, change, words):
    record = store.write(Toy(), {}, curve(), {"a": torch.ones(4)})
    rewrite(record, change, seal=True)
    with pytest.raises(InputError, match=words) as caught:
        store.find(Toy())
    assert "etc" not in str(caught.value)


def test_fields_that_are_younger_than_a_record_are_completed(store):
    record = store.write(Toy(), {}, curve())
    rewrite(record, lambda d: d.update(completed=d["config"] | {"colour": "red"}), seal=True)
    found = store.find(Toy())
    assert found.id == record.id and found.config == {"seed": 0, "rate": 0.1, "colour": "red"}


def test_json_that_is_none_is_refused(store):
    record = store.write(Toy(), {"loss": 1.0}, curve())
    path = record.folder / "run.json"
    for text in (path.read_text().replace("1.0", "NaN"), "[]", '{"schema": 3}', "[" * 10_000):
        path.write_text(text)
        with pytest.raises(InputError, match=r"run.json"):
            store.find(Toy())


def test_links_are_not_followed(store, tmp_path):
    record = store.write(Toy(), {}, curve())
    outside = tmp_path / "outside"
    record.folder.rename(outside)
    record.folder.symlink_to(outside)
    with pytest.raises(InputError, match="is a link"):
        store.find(Toy())
    with pytest.warns(UserWarning, match="skipped 1 folders"):
        assert store.records() == []
    record.folder.unlink()
    outside.rename(record.folder)
    (record.folder / "run.json").rename(tmp_path / "run.json")
    (record.folder / "run.json").symlink_to(tmp_path / "run.json")
    with pytest.raises(InputError, match="run.json is damaged"):
        store.find(Toy())


def test_stray_folders_are_skipped_with_a_note(store):
    record = store.write(Toy(), {}, curve())
    for name in ("notes", "0123456789abcdef", "claims", ".partial/more"):
        (store.root / name).mkdir(parents=True, exist_ok=True)
    (store.root / "a file.txt").write_text("")
    with pytest.warns(UserWarning) as caught:
        assert store.records() == [record]
    texts = sorted(str(warning.message) for warning in caught)
    assert len(texts) == 2
    assert "1 folders in" in texts[0] and "'notes'" in texts[0] and "claims" not in texts[0]
    assert "0123456789abcdef" in texts[1]
    assert store.get(record.id) == record
    with pytest.raises(InputError, match="missing"):
        store.get("0123")


def test_lists_do_not_read_the_other_files(store):
    for seed in range(3):
        store.write(Toy(seed=seed), {"loss": seed}, curve(), {"a": torch.ones(4)})
    for path in store.root.glob("*/c*"):
        path.unlink()
    assert sorted(record.result["loss"] for record in store.records()) == [0, 1, 2]
    with pytest.raises(InputError, match="the file is missing"):
        store.find(Toy())


def test_both_homes(store, tmp_path):
    away = RunStore(tmp_path / "package" / "figures" / "toys")
    for seed in (0, 1):
        away.write(Toy(seed=seed), {"loss": 1.0}, curve())
    both = RunStore(store.root, committed=tmp_path / "package")
    assert both.find(Toy()).folder.parent == away.root
    own = store.write(Toy(model_digest="b"), {"loss": 2.0}, curve())
    own_too = both.write(Toy(seed=2), {"loss": 3.0}, curve())
    assert own_too.folder.parent == store.root and len(away.records()) == 2
    assert len(both.records()) == 4 and both.records()[:2] == sorted(
        [own, own_too], key=lambda record: record.id
    )
    assert both.find(Toy()).result == {"loss": 1.0}  # the same model
    found = both.lookup([Toy(seed=1), Toy(), Toy(seed=7)])
    assert [record and record.result["loss"] for record in found] == [1.0, 2.0, None]
    assert both.get(own.id[:8]) == own and both.get(found[0].id) == found[0]


def test_the_users_copy_of_a_committed_run_goes_first(store, tmp_path):
    committed = RunStore(tmp_path / "package" / "x").write(Toy(), {"loss": 1.0}, curve())
    own = store.write(Toy(), {"loss": 2.0}, curve())
    both = RunStore(store.root, committed=tmp_path / "package")
    assert own.id == committed.id
    assert [r.result["loss"] for r in both.records()] == [2.0]
    assert both.find(Toy()).result == both.get(own.id).result == {"loss": 2.0}


def test_two_records_of_one_configuration_in_one_home_are_refused(store):
    store.write(Toy(), {}, curve())
    store.write(Toy(model_digest="b"), {}, curve())
    store.write(Toy(seed=1), {}, curve())
    assert store.lookup([Toy(seed=1)])[0] is not None
    with pytest.raises(InputError, match="two records of one configuration"):
        store.lookup([Toy(seed=1), Toy()])


def test_controls_may_be_left_out(store):
    bare = RunStore(store.root, keep_controls=False)
    record = bare.write(Toy(), {}, curve(), {"a": torch.ones(4)})
    with pytest.raises(InputError, match="without controls"):
        record.controls()
    full = store.write(Toy(seed=1), {}, curve(), {"a": torch.ones(4)})
    (full.folder / "controls.safetensors").unlink()
    with pytest.raises(InputError, match="controls.safetensors is damaged: the file is missing"):
        store.find(Toy(seed=1))


def test_records_print_in_a_line(store):
    record = store.write(Toy(seed=3), {"loss": 0.5, "text": "<b>"}, curve(), message="fine")
    assert repr(record) == f"Record({record.id}, toy, seed=3, status=completed, loss=0.5)"
    assert "<th>seed</th><td>3</td>" in record._repr_html_()


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
    code = (
        "import sys; from deltacontrol.experiments.runs.table import runs; "
        "found = runs('/nowhere'); sys.exit('torch' in sys.modules or len(found) < 600)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
