"""What inputs name: small models, tasks, adapters and runs, and damaged copies of them."""

from __future__ import annotations

import gzip
import importlib
import json
import pkgutil
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from deltacontrol.deltas import LoRA, attach
from tests import tiny_model

ROWS = 40
PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from deltacontrol.deltas import LoRA

@dataclass(frozen=True)
class Mine(LoRA):
    name: ClassVar[str] = "mine"
"""


def warm_up() -> None:
    """Import what cases import, once for the processes of all."""
    import deltacontrol

    for info in pkgutil.walk_packages(deltacontrol.__path__, "deltacontrol."):
        skipped = (".claims.", ".figures.", "proofs_notebooks", ".tests", "__main__")
        if not any(part in info.name for part in skipped):
            importlib.import_module(info.name)


def build(folder: Path) -> None:
    """Write everything; no command and no network is needed.

    tiny: a BERT without a head. labelled: the same with a head of named classes. causal: a GPT-2.
    task.* and further files of rows. adapter: of peft. saved: of `DeltaModel.save`. runs: records.
    """
    made = tiny_model.write(folder)
    tiny = folder / "tiny"
    Path(made["model"]).rename(tiny)
    rows = pd.read_csv(folder / "task.csv").head(ROWS)
    rows.to_csv(folder / "task.csv", index=False)
    rows.to_csv(folder / "task.tsv", index=False, sep="\t")
    rows.to_json(folder / "task.jsonl", orient="records", lines=True)
    rows.to_parquet(folder / "task.parquet", index=False)
    (folder / "task.txt").write_text("\n".join(rows["text"]), encoding="utf-8")
    (folder / "task.csv.gz").write_bytes(gzip.compress((folder / "task.csv").read_bytes(), mtime=0))
    rows.assign(label=[0.5 + i / 7 for i in range(ROWS)]).to_csv(folder / "real.csv", index=False)
    rows.assign(split=["train"] * 25 + ["validation"] * 5 + ["test"] * 10).to_csv(
        folder / "split.csv", index=False
    )
    rows.assign(text_pair=rows["text"]).to_csv(folder / "pairs.csv", index=False)
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(
        tiny, hidden_size=32, intermediate_size=64, max_position_embeddings=64
    )
    BertModel(config).save_pretrained(tiny)
    _copy_tokenizer(tiny, folder / "labelled")
    config.id2label, config.label2id = {0: "no", 1: "so", 2: "yes"}, {"no": 0, "so": 1, "yes": 2}
    labelled = BertForSequenceClassification(config)
    labelled.save_pretrained(folder / "labelled")
    _copy_tokenizer(tiny, folder / "causal")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=15, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    ).save_pretrained(folder / "causal")
    tuned = attach(labelled.eval(), LoRA(rank=2))
    tuned.save(folder / "saved")
    from deltacontrol.deltas.interop import export_peft

    export_peft(tuned, folder / "adapter", base_model=str(folder / "labelled"))
    (folder / "mine.py").write_text(PLUGIN, encoding="utf-8")
    (folder / "broken.py").write_text("raise SystemExit('no')", encoding="utf-8")
    (folder / "empty").mkdir()
    _record(folder)


def folder(place: Path) -> Path:
    """An empty folder for a case, in place of that of the case before."""
    here = place / "case"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    return here


def _record(folder: Path) -> None:
    """Runs of one step each."""
    from deltacontrol.experiments.measures.solving import Solve
    from deltacontrol.experiments.runs.store import RunStore
    from deltacontrol.experiments.runs.sweep import run
    from deltacontrol.experiments.training.finetune import FineTuning

    store = RunStore(folder / "runs")
    common = {"model": "tiny", "task": "task.csv", "max_length": 8}
    for deltas in (("lora:rank=2",), ("ia3", "bitfit")):
        run(FineTuning(deltas=deltas, steps=1, batch_size=4, learning_rate=0.01, **common), store,
            progress=False)  # fmt: skip
    run(Solve(deltas=("bitfit",), solver="adam:lr=0.01", rows=2, steps=1, **common), store,
        progress=False)  # fmt: skip


def _copy_tokenizer(source: Path, folder: Path) -> None:
    folder.mkdir()
    for file in source.iterdir():
        if file.name.startswith(("tokenizer", "vocab", "special")):
            shutil.copy(file, folder / file.name)


# -- damage ----------------------------------------------------------------------------------------

Damage = Callable[[random.Random, bytes], bytes]


def _cut(chance: random.Random, data: bytes) -> bytes:
    return data[: chance.randrange(len(data) or 1)]


def _flip(chance: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 3, 20))):
        if changed:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _insert(chance: random.Random, data: bytes) -> bytes:
    place = chance.randrange(len(data) + 1)
    odd = (
        b'"',
        b"\x00",
        b"\xff\xfe",
        b"\n",
        b",",
        b"\t",
        b"{",
        b"}",
        b"NaN",
        b"\r",
        b"\\u00",
        b"\x1a",
    )
    return data[:place] + chance.choice(odd) * chance.choice((1, 1, 5)) + data[place:]


def _lines(chance: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    kind = chance.randrange(6)
    place = chance.randrange(len(lines))
    if kind == 0:
        return b"\n".join(lines[:1])
    if kind == 1:
        return b"\n".join([*lines[:place], lines[place], *lines[place:]])
    if kind == 2:
        return b"\n".join(lines[1:])
    if kind == 3:
        return b"\n".join(lines[:2])
    if kind == 4:
        return data.replace(b"\n", b"\r")
    return b"\n".join(lines[: chance.choice((3, 4, 6, 9))])


def _other(chance: random.Random, data: bytes) -> bytes:
    return chance.choice((b"", b" ", b"null", b"[]", b"{}", b"[[[[", b"PK\x03\x04", b"0", b'"x"',
                          b"\xef\xbb\xbf", b"[" * 100_000, data + data, data[::-1]))  # fmt: skip


_ENTRIES = (
    None,
    -1,
    0,
    10**9,
    1.5,
    "x",
    "",
    [],
    {},
    True,
    [1],
    {"a": 1},
    "nan",
    "../..",
    [None],
    3,
)


def _json(chance: random.Random, data: bytes) -> bytes:
    """One entry of a JSON object, at any depth, gets another value or goes."""
    try:
        document = json.loads(data)
    except ValueError:
        return _flip(chance, data)
    place = document
    while isinstance(place, dict | list) and place:
        key = (
            chance.choice(sorted(place))
            if isinstance(place, dict)
            else chance.randrange(len(place))
        )
        inner = place[key]
        if isinstance(inner, dict | list) and inner and chance.random() < 0.7:
            place = inner
            continue
        if chance.random() < 0.25:
            del place[key]
        else:
            place[key] = chance.choice(_ENTRIES)
        break
    return json.dumps(document).encode()


_ANY: tuple[Damage, ...] = (_cut, _flip, _insert, _other)


def damaged(chance: random.Random, source: Path, target: Path) -> str:
    """Copy a file or folder, with one damage; says which."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
        files = sorted(f for f in target.rglob("*") if f.is_file())
        if not files:
            return "empty folder"
        file = chance.choice(files)
        kind = chance.randrange(8)
        if kind == 0:
            file.unlink()
            return f"{file.name} missing"
        if kind == 1:
            file.unlink()
            file.mkdir()
            return f"{file.name} a folder"
        return f"{file.name} {_damage(chance, file, file)}"
    return _damage(chance, source, target)


def _damage(chance: random.Random, source: Path, target: Path) -> str:
    kinds: tuple[Damage, ...] = _ANY
    if source.suffix in (".csv", ".tsv", ".jsonl", ".txt"):
        kinds = (*_ANY, _lines, _lines, _lines)
    elif source.suffix == ".json":
        kinds = (*_ANY, *(_json,) * 12)
    kind = chance.choice(kinds)
    target.write_bytes(kind(chance, source.read_bytes()))
    return kind.__name__.lstrip("_")
