"""The committed records are whole, complete, and reached from everywhere; others are published."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from deltacontrol.deltas.registry import completed
from deltacontrol.experiments import studies
from deltacontrol.experiments.cli.runs import Runs
from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.runs.publishing import publish
from deltacontrol.experiments.runs.record import read
from deltacontrol.experiments.runs.store import (
    COMMITTED,
    Record,
    RunStore,
    both_homes,
    configuration,
)
from deltacontrol.experiments.runs.table import table
from deltacontrol.experiments.runs.upgrade import upgrade
from deltacontrol.paper_figures import base, collect
from deltacontrol.theory.errors import InputError
from tests.experiments.test_runs import Toy, curve


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return both_homes(tmp_path_factory.mktemp("none")).records()


def test_every_committed_record_is_whole(committed: list[Record], tmp_path: Path) -> None:
    folders = [path.parent for path in COMMITTED.rglob("run.json")]
    assert sorted(record.folder for record in committed) == sorted(folders)  # none twice
    assert all(read(record.folder) == record for record in committed)
    store = both_homes(tmp_path)
    assert all(store.get(record.id) == record for record in committed[::50])


def test_committed_configurations_have_todays_fields(committed: list[Record]) -> None:
    """Else plain equality does not find them: `deltacontrol runs --upgrade` on their folder."""
    assert [r.folder for r in committed if completed(r.config) != r.config] == []


def test_committed_grids_are_those_of_the_studies() -> None:
    for name in base.names():
        study = base.load(name).STUDY
        if collect.is_fixed(study):  # which has no grid
            continue
        wanted = [configuration(e) for e in studies.experiments(study, "paper")]
        assert [configuration(record) for record in collect.committed(study)] == wanted, study


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout without changes, whatever this one is."""
    commit = {"commit": "0" * 40, "modified": False}
    monkeypatch.setattr(provenance, "project_commit", lambda: commit)


@pytest.mark.usefixtures("clean")
def test_publishing_leaves_out_the_controls_and_says_so(tmp_path: Path) -> None:
    own = RunStore(tmp_path / "runs")
    with_controls = own.write(Toy(), {"loss": 1.0}, curve(), {"a": torch.ones(4)})
    without = own.write(Toy(seed=1), {"loss": 2.0}, curve())
    root = tmp_path / "package"
    publish([with_controls, without], "figures/toys", root)
    found = RunStore(root / "figures" / "toys").records()
    assert found == sorted([with_controls, without], key=lambda record: record.id)
    left_out = {record.id: record.left_out for record in found}
    assert left_out == {with_controls.id: ("controls.safetensors",), without.id: ()}
    for record in found:
        pd.testing.assert_frame_equal(record.curve(), curve())
        with pytest.raises(InputError, match="published without|kept without"):
            record.controls()
    assert {p.name for p in root.rglob("*") if p.is_file()} == {"run.json", "curve.parquet"}


@pytest.mark.usefixtures("clean")
def test_a_run_is_published_once_and_only_whole(tmp_path: Path) -> None:
    own, root = RunStore(tmp_path / "runs"), tmp_path / "package"
    records = [own.write(Toy(seed=seed), {}, curve()) for seed in range(3)]
    publish(records[:2], "figures/toys", root)
    publish(records, "claims/runs", root)
    assert [p.name for p in (root / "claims" / "runs").iterdir()] == [records[2].id]
    publish(records[1:], "figures/toys", root, exactly=True)
    assert {p.name for p in (root / "figures" / "toys").iterdir()} == {records[1].id}
    (records[0].folder / "curve.parquet").write_bytes(b"")
    with pytest.raises(InputError, match="curve.parquet is damaged"):
        publish(records[:1], "claims/runs", root)
    assert len(list((root / "claims" / "runs").iterdir())) == 1


@pytest.mark.usefixtures("clean")
def test_a_dirty_checkout_publishes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"ls-files": "provenance.py", "status": " M theory/claims.py\n?? new.py\n"}
    monkeypatch.setattr(provenance, "_git", lambda folder, *words: answers[words[0]])
    with pytest.raises(InputError, match="2 of its files .*: theory/claims.py, new.py; commit"):
        provenance.require_clean()
    answers["status"] = ""
    provenance.require_clean()

    def no_checkout(folder: Path, *words: str) -> str:
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance, "_git", no_checkout)
    with pytest.raises(InputError, match="installed package"):
        provenance.require_clean()


@pytest.fixture
def old(tmp_path: Path) -> Record:
    """A record as version 0.1 wrote it."""
    record = RunStore(tmp_path / "runs").write(
        Toy(), {"loss": 1.0}, curve(), {"a": torch.ones(4)}, message="fine"
    )
    path = record.folder / "run.json"
    document = json.loads(path.read_text())
    del document["digest"], document["left_out"]
    path.write_text(json.dumps(document | {"schema": 1}))
    return record


def test_records_of_version_0_1_are_taken_over(
    old: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = RunStore(tmp_path / "runs")
    with pytest.raises(InputError, match="version 0.1.*runs --upgrade --runs"):
        store.find(Toy())
    Runs(runs=store.root, upgrade=True).run()
    assert "1 records" in capsys.readouterr().out
    found = store.find(Toy())
    assert found == old and torch.equal(old.controls()["a"], torch.ones(4))
    before = (found.folder / "run.json").read_bytes()
    assert upgrade(found.folder) == found
    assert (found.folder / "run.json").read_bytes() == before


def test_what_is_damaged_is_not_upgraded(old: Record) -> None:
    path, data = old.folder / "run.json", (old.folder / "curve.parquet").read_bytes()
    before = path.read_text()
    (old.folder / "curve.parquet").write_bytes(data[:-1] + b"x")
    with pytest.raises(InputError, match="curve.parquet is damaged"):
        upgrade(old.folder)
    assert path.read_text() == before
    (old.folder / "curve.parquet").write_bytes(data)
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"schema": 2, "digest": "0", "left_out": []}))
    with pytest.raises(InputError, match="run.json is damaged"):
        upgrade(old.folder)


def test_a_table_of_runs(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for seed, rate in ((0, 0.1), (1, 0.1), (2, 0.1)):
        store.write(Toy(seed=seed, rate=rate), {"loss": seed / 2, "seed": 7, "list": [1]}, curve())
    found = table(store.records(), tmp_path)
    assert list(found.columns) == ["id", "kind", "home", "status", "date", "seed", "loss",
                                   "result.seed"]  # fmt: skip
    assert sorted(zip(found["seed"], found["loss"], strict=True)) == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert set(found["home"]) == {"own"} and set(found["result.seed"]) == {7}
    assert table([], tmp_path).empty


def test_deltas_are_told_apart_by_the_fields_that_differ(committed: list[Record]) -> None:
    chosen = [r for r in committed if r.config.get("deltas", [{}])[0] and r.kind == "fine-tuning"
              and r.config["deltas"][0]["name"] == "subspace"]  # fmt: skip
    found = table(chosen, Path("runs"))
    assert set(found["deltas" if "deltas" in found else "subspace.dimension"]) - {"subspace"}
    assert not found.columns.duplicated().any() and set(found["home"]) == {"committed"}


def test_the_list_is_filtered_sorted_and_limited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = RunStore(tmp_path / "runs")
    for seed in range(5):
        store.write(Toy(seed=seed), {"loss": seed % 3, "accuracy": seed / 10}, curve())

    def printed(**options: object) -> list[str]:
        Runs(runs=store.root, **options).run()  # type: ignore[arg-type]
        return capsys.readouterr().out.splitlines()

    assert len(printed()) == 7  # with what all have in common
    lines = printed(sort="accuracy", limit=2, export=tmp_path / "all.csv")
    assert len(lines) == 6 and "2 of 5" in lines[-2] and "wrote" in lines[-1]
    written = pd.read_csv(tmp_path / "all.csv")
    assert written["seed"].tolist() == [4, 3, 2, 1, 0] and written["id"][1][:8] in lines[2]
    assert len(printed(where=("loss=1", "kind=toy"))) == 5
    assert len(printed(where=("rate=0.10", "seed=3"))) == 3
    assert "0 of 0" in printed(where=("task=movie",))[-1]
    assert len(printed(committed=True, limit=0)) > 600
    for options, words in (
        ({"where": ("seed",)}, "FIELD=VALUE"),
        ({"sort": "colour"}, "column"),
        ({"limit": -1}, "limit is -1"),
        ({"show": "zz"}, "run"),
    ):
        with pytest.raises(InputError, match=words):
            printed(**options)
