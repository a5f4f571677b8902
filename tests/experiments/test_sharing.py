"""A run handed on: its card says what the record says, and the hub is asked as it expects."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pandas as pd
import pytest
import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from scipy.stats import binomtest

import deltacontrol as dc
from deltacontrol.deltas import hub, saved_folder
from deltacontrol.deltas.interop import adapter
from deltacontrol.experiments import cards
from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run
from deltacontrol.experiments.sharing import export_peft, save
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.experiments.training.peft_import import ImportedAdapter
from deltacontrol.theory.errors import InputError
from tests import tiny_model

# peft asks transformers by a name that is about to go.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

NAME = "someone/lora-tiny"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and a task whose name and classes are no words."""
    folder = tmp_path_factory.mktemp("private")
    written = tiny_model.write(folder, classes=2)
    frame = pd.read_csv(written["task"])
    frame["label"] = frame["label"].map({"yes": "<b>yes</b> | *so*", "no": "no `x`"})
    frame.to_csv(folder / "my_*task*.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def record(place: Path) -> Record:
    wanted = FineTuning(
        model=str(place / "tiny-bert"),
        task=str(place / "my_*task*.csv"),
        deltas=("lora:rank=2",),
        steps=6,
        batch_size=8,
        max_length=8,
        learning_rate=1e-2,
        precision="fp32",
    )
    found = run(wanted, RunStore(place / "runs"), progress=False)
    assert found is not None
    return found


@pytest.fixture
def hub_api(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A hub that answers, and what it was asked for."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self: HfApi, name: str, **given: Any) -> None:
        calls.append(("create_repo", {"repo_id": name, **given}))

    def upload_folder(self: HfApi, **given: Any) -> CommitInfo:
        files = {p.name: p.read_bytes() for p in Path(given["folder_path"]).iterdir()}
        calls.append(("upload_folder", given | {"files": files}))
        address = "https://hub.example"
        return CommitInfo(f"{address}/{NAME}/commit/1", "", "", "1", _endpoint=address)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(hub, "unreachable", lambda: None)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    return calls


def block(text: str, language: str) -> str:
    (found,) = re.findall(rf"^(```+){language}\n(.*?)^\1$", text, re.MULTILINE | re.DOTALL)
    return found[1]


def loaded(text: str) -> Any:
    """What the code of a card gives."""
    names: dict[str, Any] = {}
    exec(compile(block(text, "python"), "README.md", "exec"), names)
    return names["tuned"]


def logits(model: Any, record: Record) -> torch.Tensor:
    batch = record.setting().batch("test", range(6))
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def test_the_card_of_a_run_is_its_record(record: Record, place: Path, tmp_path: Path) -> None:
    dc.save(record, tmp_path / "lora-tiny")
    text = (tmp_path / "lora-tiny" / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("deltacontrol", "text-classification")
    assert data.base_model is None and data.datasets is None and data.license is None
    assert data.tags == ["deltacontrol", "lora", "head"]
    scores = {result.metric_type: result for result in data.eval_results}
    assert set(scores) == {"accuracy", "f1", "loss"} == set(data.metrics)
    for name, metric in (("accuracy", "accuracy"), ("macro_f1", "f1"), ("loss", "loss")):
        assert scores[metric].metric_value == pytest.approx(record.result[name], rel=1e-12)
    assert scores["f1"].dataset_split == "test" and scores["f1"].dataset_type == "my_*task*.csv"

    count = record.result["num_evaluated"]
    exact = binomtest(round(record.result["accuracy"] * count), count).proportion_ci(method="exact")
    row = re.search(r"^\| accuracy \| (\S+) \| \[(\S+), (\S+)\] \|$", text, re.MULTILINE)
    assert row and [float(x) for x in row.groups()] == pytest.approx(
        [record.result["accuracy"], exact.low, exact.high], rel=1e-3
    )
    assert re.search(r"^\| macro F1 \| \S+ \|  \|$", text, re.MULTILINE), "no interval is known"

    settings = json.loads(block(text, "json"))
    expected = record.config | {"model": "tiny-bert", "task": "my_*task*.csv"}
    assert settings == json.loads(json.dumps(expected))
    for name, version in record.provenance["packages"].items():
        assert f"| `{name}` | `{version}` |" in text
    assert "@inproceedings{hu2022lora" in block(text, "bibtex")
    assert record.provenance["digests"]["data"] in text
    assert str(place) not in text and "private" not in text
    assert "<b>" not in text and r"| 0 | \<b\>yes\</b\> \| \*so\* |" in text
    assert r"| 1 | no \`x\` |" in text


def test_the_code_of_the_card_loads_what_was_saved(
    record: Record, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "tiny-bert", tmp_path / "tiny-bert")
    monkeypatch.chdir(tmp_path)
    expected = logits(record.model(), record)
    save(record, "lora-tiny")
    text = Path("lora-tiny/README.md").read_text(encoding="utf-8")
    assert torch.equal(logits(loaded(text), record), expected)


def test_the_code_of_an_adapters_card_loads_it_by_peft(
    record: Record, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "tiny-bert", tmp_path / "tiny-bert")
    monkeypatch.chdir(tmp_path)
    expected = logits(record.model(), record)
    export_peft(record, "adapter")
    text = Path("adapter/README.md").read_text(encoding="utf-8")
    assert ModelCard(text).data.library_name == "peft"
    torch.testing.assert_close(logits(loaded(text).eval(), record), expected)
    with pytest.raises(InputError, match=r"holds adapter_config\.json.*README\.md already"):
        export_peft(record, "adapter")


def test_what_the_record_does_not_know_has_no_line(record: Record) -> None:
    setting = record.setting()
    result = {k: v for k, v in record.result.items() if k != "num_evaluated"}
    card = cards.of_run(replace(record, result=result), setting, "x")
    assert "eval_results" not in card.head and not card.sections["Scores"]
    assert "## Scores" not in card.text
    shared = replace(record, result={**record.result, "accuracy": 0.123456})
    assert cards.interval(shared, "accuracy") is None, "no share of so many rows"
    bad = replace(record, status="diverged", message="loss\n\n# <i>nan</i>", provenance={
        "digests": record.provenance["digests"]
    })  # fmt: skip
    text = cards.of_run(bad, setting, "x").text
    assert r"ended as `diverged`. loss \# \<i\>nan\</i\>" in text and "## Versions" not in text
    assert cards._public({"a": ["/x/y.csv", "~/z", "C:\\u\\v", "../w", "re:a/b", r"\d+"]}) == {
        "a": ["y.csv", "z", "v", "w", "re:a/b", r"\d+"]
    }


def test_a_run_goes_to_the_hub(record: Record, place: Path, tmp_path: Path, hub_api) -> None:
    save(record, tmp_path / "saved", push_to=NAME, private=True)
    (made, first), (sent, second) = hub_api
    assert (made, sent) == ("create_repo", "upload_folder")
    assert first == {"repo_id": NAME, "private": True, "exist_ok": True}
    assert second["repo_id"] == NAME and second["folder_path"] == tmp_path / "saved"
    assert second["allow_patterns"] == list(saved_folder.FILES)
    assert set(second["files"]) == set(saved_folder.FILES)
    text = second["files"]["README.md"].decode()
    assert f'dc.load(model, "{NAME}")' in text and str(place) not in text
    hub_api.clear()
    save(record.model(), tmp_path / "plain", push_to=NAME)
    assert [name for name, _ in hub_api] == ["create_repo", "upload_folder"]
    assert hub_api[0][1]["private"] is None


def test_the_command_sends_an_adapter_without_a_path(
    record: Record, place: Path, tmp_path: Path, hub_api, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export-peft", record.id, "--runs", str(place / "runs")]
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    assert cli._main([*command, "--out", str(out), "--push", NAME]) == 0
    assert f"{NAME} on the hub: lora + head" in capsys.readouterr().out
    sent = hub_api[1][1]
    assert sent["allow_patterns"] == list(adapter.FILES) and "diary.txt" not in adapter.FILES
    config = json.loads(sent["files"]["adapter_config.json"])
    assert config["base_model_name_or_path"] == "tiny-bert"
    for name in ("adapter_config.json", "README.md"):
        assert str(place).encode() not in sent["files"][name]
    assert cli._main([*command, "--out", str(tmp_path / "b"), "--private"]) == 2
    assert "--private goes with --push" in capsys.readouterr().err


def test_what_the_hub_cannot_take_is_told_before_any_work(
    record: Record, tmp_path: Path, hub_api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is restored for a hub that cannot be asked")

    monkeypatch.setattr(Record, "setting", never)
    for make in (save, export_peft):
        with pytest.raises(InputError, match="'no id' is no id of the hub; expected owner/name"):
            make(record, tmp_path / "a", push_to="no id")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="without a token; log in"):
        save(record, tmp_path / "a", push_to=NAME)
    monkeypatch.setattr(hub, "unreachable", lambda: "hub.example cannot be reached")
    with pytest.raises(InputError) as caught:
        save(record, tmp_path / "a", push_to=NAME)
    assert "hub.example cannot be reached. Check" in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "a").exists() and not hub_api
    with pytest.raises(InputError, match="str has no deltas; expected a DeltaModel or a record"):
        save("lora", tmp_path / "a")  # type: ignore[arg-type]


def test_a_hub_that_refuses_is_heard(
    record: Record, tmp_path: Path, hub_api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("403 Forbidden\n\n  you have no rights to create a model.")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(InputError, match=rf"put at {NAME} on the hub: 403 .* no rights .*token"):
        save(record, tmp_path / "saved", push_to=NAME)
    assert (tmp_path / "saved" / "deltas.json").is_file(), "the folder stays, to be pushed later"


def test_deltas_come_from_the_hub(
    record: Record, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(record, tmp_path / "saved")
    export_peft(record, tmp_path / "adapter", base_model=str(place / "tiny-bert"))
    asked = []

    def snapshot(name: str, **given: Any) -> str:
        asked.append((name, given))
        return str(tmp_path / ("saved" if name == NAME else "adapter"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(hub, "unreachable", lambda: None)
    base = dc.load_model(str(place / "tiny-bert"), kind="classification", num_labels=2)[0]
    assert torch.equal(logits(dc.load(base, NAME), record), logits(record.model(), record))
    assert asked.pop() == (NAME, {"allow_patterns": list(saved_folder.FILES)})
    there = ImportedAdapter(Path("someone/adapter"))
    assert there.to_config() == ImportedAdapter(tmp_path / "adapter").to_config()
    assert asked == [("someone/adapter", {"allow_patterns": list(adapter.FILES)})]

    def missing(name: str, **given: Any) -> None:
        raise OSError("404 Client Error.\n\nRepository Not Found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(InputError, match="nobody/nothing is no folder here, and .* 404 Client"):
        dc.load(record.setting().base, "nobody/nothing")


def test_without_a_connection_an_id_is_refused_at_once(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the suite is offline
    base = record.setting().base
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set, .* there is none of that name"):
        dc.load(base, "nobody/nothing")
    assert not hub.is_id(tmp_path) and not hub.is_id("folder") and not hub.is_id("a/b/c")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not hub.is_id("a/b") and hub.is_id("a/c")
