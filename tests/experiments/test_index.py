"""The index of a folder of records: it saves time, and changes nothing else."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import pytest

from deltacontrol.experiments.runs import index
from deltacontrol.experiments.runs.record import read
from deltacontrol.experiments.runs.store import Experiment, Outcome, RunStore, Workspace
from deltacontrol.experiments.runs.table import table


@dataclass(frozen=True)
class Toy(Experiment):
    kind: ClassVar[str] = "toy"
    seed: int = 0

    def execute(self, workspace: Workspace) -> Outcome:
        raise NotImplementedError


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "LEAST", 3)
    monkeypatch.setattr(index, "_SETTLED_NS", -1)
    store = RunStore(tmp_path / "runs")
    for seed in range(5):
        result = {"loss": 0.125 * seed, "rows": [1, 2]}
        store.write(Toy(seed), result, pd.DataFrame({"step": [1]}), message="fine")
    return store


@pytest.fixture
def reads(monkeypatch):
    """The folders whose run.json was read for a list."""
    found = []

    def counted(folder, **options):
        found.append(folder.name)
        return read(folder, **options)

    monkeypatch.setattr(index, "read", counted)
    return found


def test_a_second_list_reads_no_record_and_is_the_same(store, reads):
    first = store.listed()
    assert len(reads) == 5 and (store.root / index.INDEX_FILE).exists()
    second = store.listed()
    assert len(reads) == 5
    assert second == first == store.records()
    for one, other in zip(first, second, strict=True):
        assert vars(one) == vars(other)
    pd.testing.assert_frame_equal(table(first, store.root), table(second, store.root))
    assert not [name for name in os.listdir(store.root) if name.startswith(".index.json.")]


def test_few_records_need_no_index(store, reads, monkeypatch):
    monkeypatch.setattr(index, "LEAST", 6)
    store.listed()
    assert not (store.root / index.INDEX_FILE).exists()


def edited(record, keep_times: bool) -> None:
    path = record.folder / "run.json"
    before = path.stat()
    text = path.read_text()
    path.write_text(text.replace("fine", "find"))
    assert path.stat().st_size == before.st_size
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_changed_record_is_read_anew_and_its_digest_checked(store, reads, keep_times):
    victim = store.listed()[2]
    edited(victim, keep_times)
    with pytest.warns(UserWarning, match="skipped 1 folders"):
        found = store.listed()
    assert victim.id not in {record.id for record in found} and len(found) == 4
    assert reads[5:] == [victim.id]


def test_what_is_looked_up_is_checked_whatever_the_index_says(store, monkeypatch):
    victim = next(record for record in store.listed() if record.config["seed"] == 2)
    edited(victim, keep_times=True)
    path = store.root / index.INDEX_FILE
    forged(
        path,
        lambda d: d["records"][victim.id].__setitem__(
            slice(0, 3), index._stamp(str(victim.folder))
        ),
    )
    assert len(store.listed()) == 5
    with pytest.raises(ValueError, match=r"run.json is damaged.*digest"):
        store.lookup([Toy(2)])


def forged(path, change) -> None:
    import hashlib

    document = json.loads(path.read_bytes().partition(b"\n")[2])
    change(document)
    text = json.dumps(document).encode()
    path.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"0.125", b"0.999")),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff\xfe\n" * 3),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: forged(path, lambda d: d.update(version=[0, 0])),
        lambda path: forged(path, lambda d: d.pop("records")),
        lambda path: forged(path, lambda d: d.update(records=[])),
        lambda path: forged(path, lambda d: d.update(shared=[])),
    ],
)
def test_damage_changes_nothing(store, reads, damage):
    first = store.listed()
    damage(store.root / index.INDEX_FILE)
    assert store.listed() == first == store.records()


def test_records_that_went_are_not_listed(store, reads):
    import shutil

    gone = store.listed()[0]
    shutil.rmtree(gone.folder)
    assert gone.id not in {record.id for record in store.listed()}
    outside = store.root.parent / "outside"
    linked = store.listed()[0]
    linked.folder.rename(outside)
    linked.folder.symlink_to(outside)
    with pytest.warns(UserWarning, match="skipped 1 folders"):
        assert linked.id not in {record.id for record in store.listed()}


def test_a_file_that_has_just_changed_is_not_remembered(store, reads, monkeypatch):
    monkeypatch.setattr(index, "_SETTLED_NS", 10**15)
    store.listed()
    store.listed()
    assert len(reads) == 10
