"""`deltacontrol runs`: what tells runs apart, two side by side, curves, files, deletion."""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest

from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.runs.listing import curves, overview
from deltacontrol.experiments.runs.listing.fields import _meets, fields
from deltacontrol.experiments.runs.store import COMMITTED, Experiment, Outcome, RunStore, Workspace
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class Trained(Experiment):
    """A record as a fine-tuning leaves it, without a training."""

    kind: ClassVar[str] = "fine-tuning"
    delta: str = "lora"
    rank: int | None = 8
    seed: int = 0
    task: str = "movie"

    def to_config(self) -> dict[str, Any]:
        given = asdict(self)
        delta: dict[str, Any] = {"name": given.pop("delta")}
        rank = given.pop("rank")
        if rank is not None:
            delta |= {"rank": rank, "sites": ["attention.query", "mlp.up"]}
        return {"model": "minilm-l6", **given, "deltas": [delta], "learning_rate": 0.001,
                "steps": 40}  # fmt: skip

    def digests(self):
        from deltacontrol.experiments.runs.store import Digests

        return Digests("a", "b")

    def execute(self, workspace: Workspace) -> Outcome:
        raise NotImplementedError


RUNS = [
    (Trained(), {"accuracy": 0.75, "num_trainable": 74_498}),
    (Trained(rank=16), {"accuracy": 0.5, "num_trainable": 148_226}),
    (Trained(delta="bitfit", rank=None, seed=1), {"accuracy": 0.9, "num_trainable": 1000}),
]


def curve(metric: bool = True) -> pd.DataFrame:
    frame = pd.DataFrame({"step": range(1, 41), "loss": [1 / n for n in range(1, 41)]})
    if metric:
        frame["validation_accuracy"] = [n / 40 if n % 10 == 0 else None for n in range(1, 41)]
    return frame


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    store = RunStore(tmp_path / "runs")
    for experiment, result in RUNS:
        store.write(experiment, result, curve(experiment.seed == 0))
    return store


def ids(store: RunStore) -> list[str]:
    """In the order of `RUNS`."""
    return [store.path(experiment).name for experiment, _ in RUNS]


def run(store: RunStore, *words: str) -> int:
    return cli._main(["runs", "--runs", str(store.root), *words])


def printed(store: RunStore, capsys, *words: str) -> list[str]:
    assert run(store, *words) == 0
    return capsys.readouterr().out.splitlines()


def test_the_list_has_what_differs_and_what_came_out(store, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    lines = printed(store, capsys, "--sort", "score")
    assert lines[0].split() == ["id", "delta", "seed", "steps", "parameters", "accuracy", "date"]
    short = [name[:8] for name in ids(store)]
    assert [line.split()[:2] for line in lines[1:4]] == [
        [short[2], "bitfit"],
        [short[0], "lora:rank=8"],
        [short[1], "lora:rank=16"],
    ]
    assert "148,226" in lines[3] and "0.5" in lines[3]
    assert lines[4] == "all: kind fine-tuning, model minilm-l6, task movie, rate 0.001"
    # What is the same in the rows that were asked for is no column.
    lines = printed(store, capsys, "--where", "delta=lora", "--sort", "score", "--ascending")
    assert "seed" not in lines[0] and [line.split()[1] for line in lines[1:3]] == [
        "lora:rank=16",
        "lora:rank=8",
    ]
    lines = printed(store, capsys, "--where", "seed=1", "accuracy=0.90")
    assert lines[0].split()[:5] == ["id", "kind", "model", "task", "delta"]


@pytest.mark.parametrize("width", [80, 100])
def test_the_list_fits_the_terminal_and_names_what_does_not(width: int) -> None:
    committed = RunStore(Path("none"), committed=COMMITTED).listed()
    rows = [(record, fields(record)) for record in committed]
    lines = overview.lines(rows, [record.id for record in committed], width)
    assert max(map(len, lines)) <= width and lines[0].split()[0] == "id"
    (left_out,) = [i for i, line in enumerate(lines) if line.startswith("no room for: ")]
    named = " ".join(lines[left_out:]).removeprefix("no room for: ").split(", ")
    named = [" ".join(name.split()) for name in named]
    assert sorted([*lines[0].split(), *named]) == sorted(overview.table(rows))
    assert {"id", "delta", "score", "task"} <= set(lines[0].split())
    assert len(lines[1 : 1 + len(rows)]) == len(rows)
    shown = [line.split()[0] for line in lines[1 : 1 + len(rows)]]
    assert len(set(shown)) == len(rows)  # an id is long enough to tell it from the others


def test_missing_values_are_last_and_numbers_before_words(store, capsys) -> None:
    odd = Trained(seed=9)
    store.write(odd, {"accuracy": None, "note": "none"}, curve())
    for more in ((), ("--ascending",)):
        lines = printed(store, capsys, "--sort", "accuracy", *more)
        assert lines[4].split()[0] == store.path(odd).name[:8]
    assert run(store, "--sort", "acuracy") == 2
    assert "nearest: accuracy" in capsys.readouterr().err
    assert run(store, "--where", "seed=77", "--sort", "acuracy") == 2


def test_two_runs_side_by_side(store, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    first, second, other = ids(store)
    lines = printed(store, capsys, "--compare", first[:9], second[:9])
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == [first, second, "difference"]
    cells = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert cells["lora.rank"] == ["8", "16"] and cells["accuracy"] == ["0.75", "0.5", "-0.25"]
    assert "seed" not in cells and any("seed 0" in line for line in lines[-4:])
    assert lines[lines.index("what it rests on:") + 1].split() == ["the", "same"]
    lines = printed(store, capsys, "--compare", first, other)
    cells = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert cells["deltas"] == ["lora", "bitfit"] and cells["lora.rank"] == ["8", "-"]
    for wrong in ([first], [first, first], [first, second, other]):
        assert run(store, "--compare", *wrong) == 2
        assert "two different runs" in capsys.readouterr().err


def test_curves_of_several_runs_are_drawn(store, capsys, tmp_path) -> None:
    rows = [(record, fields(record)) for record in map(store.get, ids(store))]
    drawn = curves.table(rows)
    assert drawn.groupby("run", sort=False)["label"].first().tolist() == [
        "lora:rank=8, seed 0",
        "lora:rank=16, seed 0",
        "bitfit, seed 1",
    ]
    assert drawn["validation"].notna().sum() == 8 and drawn["mean"][1] == 0.75
    figure = curves.draw(rows)
    assert [ax.get_ylabel() for ax in figure.axes] == ["training loss", "validation accuracy"]
    assert [len(ax.lines) for ax in figure.axes] == [6, 2]
    assert [text.get_text() for text in figure.legends[0].texts] == list(drawn["label"].unique())
    font = figure.axes[0].xaxis.label.get_fontsize()
    assert font == 8 and not figure.axes[0].spines["top"].get_visible()  # the style sheet's
    out = tmp_path / "new" / "curve.png"
    printed(store, capsys, "--plot", *ids(store), "--out", str(out))
    assert out.read_bytes()[:4] == b"\x89PNG"
    out = tmp_path / "lora.pdf"
    assert "2 runs" in printed(store, capsys, "--where", "delta=lora", "--plot", "--out",
                               str(out))[-1]  # fmt: skip
    assert out.read_bytes()[:4] == b"%PDF"
    assert run(store, "--plot", ids(store)[0], "--out", "curve.doc") == 2
    assert "no suffix of a picture" in capsys.readouterr().err
    listed = RunStore(store.root, committed=COMMITTED).listed()
    other = next(record for record in listed if record.kind == "dimension")
    assert run(store, "--plot", other.id) == 2
    assert "has no loss over steps" in capsys.readouterr().err


def test_odd_labels_are_drawn_as_they_are_and_many_runs_are_not(tmp_path) -> None:
    store = RunStore(tmp_path / "runs")
    tasks = ("costs $x^{$.csv", "_own.csv")
    for task in tasks:
        store.write(Trained(task=task), {"accuracy": 0.5}, curve())
    rows = [(record, fields(record)) for record in store.listed()]
    legend = curves.draw(rows).legends[0]
    assert sorted(text.get_text().strip().replace("\\", "") for text in legend.texts) == sorted(
        tasks
    )
    with pytest.raises(InputError, match="102 runs are too many .* at most 100"):
        curves.draw(rows * 51)


def test_the_chosen_rows_are_exported(store, capsys, tmp_path) -> None:
    words = ("--where", "delta=lora", "--sort", "score", "--limit", "1")
    for suffix in ("csv", "parquet", "tex"):
        printed(store, capsys, *words, "--export", str(tmp_path / f"list.{suffix}"))
    for frame in (pd.read_csv(tmp_path / "list.csv"), pd.read_parquet(tmp_path / "list.parquet")):
        assert frame["id"].tolist() == ids(store)[:2] and frame["lora.rank"].tolist() == [8, 16]
        assert frame["accuracy"].tolist() == [0.75, 0.5] and "seed" not in frame
    text = (tmp_path / "list.tex").read_text()
    assert text.splitlines()[2] == r"id & delta & steps & parameters & accuracy & date \\"
    assert "lora:rank=16" in text and text.count(r"\\") == 3
    assert run(store, "--export", str(tmp_path / "list.xls")) == 2
    assert ".parquet" in capsys.readouterr().err
    everything = ("--committed", "--limit", "1", "--export", str(tmp_path / "all.parquet"))
    printed(store, capsys, *everything)  # columns with words in one kind and numbers in another
    assert len(pd.read_parquet(tmp_path / "all.parquet")) > 100


def test_nothing_to_export_is_an_error(tmp_path, capsys) -> None:
    empty = RunStore(tmp_path / "empty")
    assert run(empty, "--export", str(tmp_path / "list.csv")) == 2
    assert "nothing is written" in capsys.readouterr().err
    assert not (tmp_path / "list.csv").exists()


@pytest.mark.parametrize("wanted", ["true", "True", "TRUE"])
def test_truth_is_written_in_any_case(wanted: str) -> None:
    assert _meets(True, wanted) and not _meets(False, wanted) and not _meets("yes", wanted)


def test_a_run_is_deleted_after_a_question(store, capsys, monkeypatch) -> None:
    first, second, third = ids(store)
    asked: list[str] = []

    def answer(text: str):
        def asks(question: str) -> str:
            asked.append(question)
            return text

        return asks

    monkeypatch.setattr("builtins.input", answer(""))
    assert run(store, "--delete", first[:8]) == 1
    assert "nothing was deleted" in capsys.readouterr().out and (store.root / first).is_dir()
    monkeypatch.setattr("builtins.input", answer("y"))
    assert run(store, "--delete", first[:8]) == 0
    assert first[:8] in capsys.readouterr().out and not (store.root / first).exists()
    assert asked[0].startswith("delete 1 run from ") and asked[0].endswith("[y/N] ")
    monkeypatch.delattr("builtins.input")  # with --yes nothing is asked
    assert run(store, "--delete", second, third, "--yes") == 0
    assert store.records() == [] and not list((store.root / ".partial").glob("deleted-*"))


def test_without_a_terminal_nothing_is_deleted(store, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run(store, "--delete", ids(store)[0]) == 2
    assert "add --yes" in capsys.readouterr().err and len(store.records()) == 3
    monkeypatch.setattr("sys.stdin", None)  # as a shell's <&- leaves it
    assert run(store, "--delete", ids(store)[0]) == 2
    assert "add --yes" in capsys.readouterr().err and len(store.records()) == 3


def test_an_empty_beginning_of_an_id_is_none_of_the_package(store, capsys) -> None:
    assert run(store, "--delete", *ids(store)[:2], "--yes") == 0
    assert run(store, "--delete", "", "--yes") == 2
    assert "1 run has an id that begins with ''" in capsys.readouterr().err
    assert len(store.records()) == 1


def test_deltas_of_another_form_are_listed(store, capsys) -> None:
    """An experiment of a user's own may keep what it likes under that name."""

    @dataclass(frozen=True)
    class Own(Trained):
        kind: ClassVar[str] = "own"

        def to_config(self) -> dict[str, Any]:
            return {"deltas": [{"rank": 2}, 3], "seed": self.seed}

    store.write(Own(), {"accuracy": 0.5}, curve())
    assert "{'rank': 2}+3" in "\n".join(printed(store, capsys, "--where", "kind=own"))


def test_a_damaged_run_and_a_link_can_be_deleted(store, tmp_path) -> None:
    first, second, third = ids(store)
    (store.root / first / "run.json").write_text("{")
    shutil.move(store.root / second, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", store.root / second)
    said = f"no whole record.*runs --show {min(first, second)} --runs {store.root}` says what"
    with pytest.warns(UserWarning, match=said):
        assert run(store, "--delete", first, second, "--yes") == 0
    assert sorted(p.name for p in store.root.glob("[!.]*")) == [third]
    assert (tmp_path / "elsewhere" / "run.json").exists()


def test_committed_evidence_is_never_deleted(store, capsys, tmp_path) -> None:
    home = next(COMMITTED.glob("figures/*/*/run.json")).parent
    before = sorted(COMMITTED.rglob("run.json"))
    for root in (store.root, home.parent, home.parent / "..", COMMITTED):
        assert cli._main(["runs", "--runs", str(root), "--delete", home.name, "--yes"]) == 2
        assert "it is never deleted" in capsys.readouterr().err
    assert sorted(COMMITTED.rglob("run.json")) == before
    for wrong, said in (("zz", "unknown run 'zz'"), ("", "3 runs have an id")):
        assert run(store, "--delete", wrong, "--yes") == 2
        assert said in capsys.readouterr().err
    # A user's own copy of a committed record is the user's.
    shutil.copytree(home, store.root / home.name)
    assert run(store, "--delete", home.name, "--yes") == 0 and home.is_dir()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--show", "a", "--delete", "b"], "do different things"),
        (["--plot", "a", "--where", "seed=1"], "goes with the list"),
        (["--delete", "a", "--where", "seed=1"], "goes with the list"),
        (["--out", "a.png"], "goes with --plot"),
        (["--yes"], "goes with --delete"),
        (["--compare", "a", "b", "--out", "a.png"], "does not go with --compare"),
        (["--failed", "--sort", "seed"], "goes with the list"),
    ],
)
def test_options_that_do_not_go_together(words, said, store, capsys) -> None:
    assert run(store, *words) == 2
    assert said in capsys.readouterr().err


def test_a_shown_record_is_json(store, capsys) -> None:
    document = json.loads("\n".join(printed(store, capsys, "--show", ids(store)[1])))
    assert document["config"]["deltas"][0]["rank"] == 16
