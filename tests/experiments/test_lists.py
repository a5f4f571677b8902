"""What lists and lookups of the command line say: columns, homes, widths."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest

from deltacontrol.experiments.claims import scoreboard
from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.runs.store import COMMITTED, Experiment, Outcome, RunStore, Workspace
from deltacontrol.experiments.runs.upgrade import upgrade
from deltacontrol.theory import plugins
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class Toy(Experiment):
    kind: ClassVar[str] = "toy"
    seed: int = 0
    colour: str = "red"

    def execute(self, workspace: Workspace) -> Outcome:
        raise NotImplementedError


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    store = RunStore(tmp_path / "runs")
    for seed, colour in enumerate(["red", "green", "green"]):
        store.write(Toy(seed, colour), {"loss": 0.5}, pd.DataFrame({"step": [1]}))
    return store


def run(*argv: str) -> int:
    return cli._main(list(argv))


def test_conditions_are_on_columns_and_fields_that_exist(store, capsys) -> None:
    words = ("runs", "--runs", str(store.root), "--where")
    assert run(*words, "colour=green") == 0
    assert "2 of 2 that were asked for, of 3 runs" in capsys.readouterr().out
    assert run(*words, "colour=blue") == 0  # a value that no run has is no mistake
    assert "0 of 0" in capsys.readouterr().out
    for wrong, nearest in (("color=red", "nearest: colour"), ("los=0.5", "nearest: loss")):
        assert run(*words, "seed=9", wrong) == 2
        said = capsys.readouterr().err
        assert f"unknown column or field of the configuration '{wrong[: wrong.index('=')]}'" in said
        assert nearest in said
    assert run(*words, "colour") == 2
    assert "is not FIELD=VALUE" in capsys.readouterr().err


def test_a_run_is_found_by_the_beginning_of_its_id(store, tmp_path) -> None:
    first = store.records()[0]
    both = RunStore(store.root, committed=COMMITTED)
    assert both.get(first.id[:9]) == first
    with pytest.raises(InputError, match=r"3 runs have an id that begins with ''.*give more"):
        both.get("")
    with pytest.raises(InputError, match=r"unknown run 'zz'.*runs --committed") as caught:
        both.get("zz")
    assert len(str(caught.value)) < 400
    committed = next(iter(RunStore(tmp_path / "none", committed=COMMITTED)._committed()))
    assert both.get(committed).id == committed


def test_committed_runs_are_cited_and_say_why_they_are_not_exported(tmp_path, capsys) -> None:
    records = RunStore(tmp_path, committed=COMMITTED).records()
    left_out = next(r for r in records if r.left_out and r.config.get("deltas"))
    assert run("cite", left_out.id, "--runs", str(tmp_path)) == 0
    assert "@misc{deltacontrol" in capsys.readouterr().out
    assert run("export-peft", left_out.id, "--runs", str(tmp_path)) == 2
    assert "published without its controls.safetensors" in capsys.readouterr().err


def test_the_list_of_claims_fits_80_columns(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("claims", "--runs", str(tmp_path)) == 0
    out = capsys.readouterr().out
    lines = out.partition("\n\n")[0].splitlines()
    parts = sum(len(claim.parts) for claim in scoreboard.available().values())
    assert max(map(len, out.splitlines())) <= 80 and len(lines) == 1 + parts
    assert lines[0].split() == ["#", "claim", "verdict", "measured"]
    assert any("…" in line for line in lines)
    monkeypatch.setenv("COLUMNS", "200")
    assert run("claims", "--runs", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    assert out.split("\n")[0].split() == ["#", "claim", "verdict", "measured", "condition"]


def test_a_claim_of_ones_own_is_refused_before_it_is_measured(
    tmp_path, capsys, monkeypatch
) -> None:
    files = Path(__file__).resolve().parents[1] / "user_files"
    monkeypatch.setattr(plugins, "_loaded", {})
    claim = plugins.load(str(files / "my_claim.py")).CLAIM

    def never(*arguments):
        raise AssertionError("nothing may be measured")

    monkeypatch.setattr(scoreboard, "evaluate", never)
    monkeypatch.setattr(scoreboard, "rejudge", never)
    for action in ("run", "judge"):
        words = ("claims", action, str(claim.id), "--publish", "--runs", str(tmp_path))
        assert run(*words) == 2
        assert f"claim {claim.id} is of your own file" in capsys.readouterr().err


def test_an_upgrade_keeps_the_message_of_what_is_wrong(store) -> None:
    folder = store.records()[0].folder
    path = folder / "run.json"
    document = json.loads(path.read_text())
    document["result"]["loss"] = 0.1
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"^the record file .*run\.json is damaged"):
        upgrade(folder)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is no record of a run"):
        upgrade(folder)
