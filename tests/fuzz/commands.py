"""Command lines: a valid one of each command, and up to three changes to it."""

from __future__ import annotations

import dataclasses
import random
import shlex
import shutil
import typing
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from deltacontrol.experiments.cli import main as cli
from tests.fuzz import odd, world
from tests.fuzz.answers import Case

_SMALL = ["--model", "tiny", "--task", "task.csv", "--max-length", "8"]
_TRAINED = [*_SMALL, "--steps", "1", "--batch-size", "4"]
BASES: dict[str, list[list[str]]] = {
    "finetune": [[*_TRAINED, "--delta", "lora:rank=2", "--learning-rate", "0.01"]],
    "solve": [[*_SMALL, "--delta", "bitfit", "--rows", "2", "--steps", "1", "--solver", "adam:lr=0.01"]],  # noqa: E501
    "dimension": [[*_TRAINED, "--target", "0.99", "--budget", "2", "--eval-limit", "4", "--seeds", "2",  # noqa: E501
                   "--largest", "100", "--no-predict"]],
    "tasks": [[], ["--show", "task.csv"], ["--show", "split.csv"], ["--show", "pairs.csv"]],
    "models": [[]],
    "inspect": [["--model", "tiny", "--delta", "lora:rank=2", "--kind", "classification"]],
    "deltas": [[], ["--show", "lora"]],
    "runs": [["--runs", "runs"], ["--show", "RUN"], ["--where", "task=task.csv", "--sort", "accuracy"]],  # noqa: E501
    "cite": [["--delta", "lora"], ["RUN"]],
    "claims": [["list"], ["show", "2"], ["judge", "9"]],
    "figures": [["--only", "taxonomy", "--preset", "paper", "--out", "out"]],
    "export-peft": [["RUN", "--out", "out"]],
    "import-peft": [["adapter", "--model", "labelled", "--task", "task.csv", "--max-length", "8"]],
}  # fmt: skip
WEIGHTS = {"finetune": 8, "solve": 4, "tasks": 5, "inspect": 5, "runs": 4, "import-peft": 5,
           "export-peft": 3, "dimension": 2, "claims": 2}  # fmt: skip
BENCHMARKS = ("solvers", "gauss_newton", "deltas", "projections")
# Options that would write into this checkout, or that train for minutes.
_LEFT_OUT = {"publish", "recompute", "predict", "upgrade"}
_FILES = ("tiny", "labelled", "causal", "task.csv", "task.tsv", "task.jsonl", "task.parquet", "task.txt",  # noqa: E501
          "task.csv.gz", "real.csv", "split.csv", "pairs.csv", "adapter", "runs", "mine.py")  # fmt: skip  # noqa: E501


def draw(key: str, seed: int, place: Path) -> Case:
    """The command line of a key, with the files that it names in a folder of its own.

    Args:
        key: ``command:N``.
        seed: of all cases.
        place: where `world.build` wrote; the folder of the case is in it.
    """
    chance = random.Random(f"{seed} {key}")
    name = chance.choice([n for n in BASES for _ in range(WEIGHTS.get(n, 1))])
    if chance.random() < 0.02:
        return _benchmark(key, chance)
    here = world.folder(place)
    for file in (*_FILES, "saved", "broken.py", "empty"):
        if file != "runs":
            (here / file).symlink_to(place / file)
    shutil.copytree(place / "runs", here / "runs")
    words = list(chance.choice(BASES[name]))
    marks: list[str] = []
    for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 3))):
        _change(chance, name, words, marks, here)
    runs = sorted(p.name for p in (here / "runs").iterdir() if p.name[0] != ".")
    words = [word.replace("RUN", chance.choice(runs) if runs else "x") for word in words]
    argv = [name, *words]
    if chance.random() < 0.03:
        argv = [
            "--load",
            chance.choice(("mine.py", "broken.py", "missing.py", "tiny", "task.csv")),
            *argv,
        ]
        marks.append(f"--load {argv[1]}")
    if chance.random() < 0.01:
        argv[0] = odd.near(chance, argv[0])
        marks.append("command")
    text = "deltacontrol " + shlex.join(argv)
    return Case(key, name, text, tuple(marks), lambda: _run(argv, here))


def _run(argv: list[str], here: Path) -> int:
    import os

    os.chdir(here)
    try:
        return cli._main(argv)
    except SystemExit as leave:  # the parser's own errors and --help
        if leave.code is None or isinstance(leave.code, int):
            return leave.code or 0
        raise


def _benchmark(key: str, chance: random.Random) -> Case:
    """A benchmark with one wrong option: a right one would measure for minutes."""
    import importlib

    import tyro

    name = chance.choice(BENCHMARKS)
    wrong = [["--secnds", "1"], ["--seconds", "many"], ["--out"], ["surprise"], ["--help"]]
    argv = chance.choice(wrong)
    module = importlib.import_module(f"deltacontrol.experiments.benchmarks.{name}")

    def run() -> int:
        try:
            tyro.cli(module.Benchmark, args=argv)
        except SystemExit as leave:
            return int(leave.code or 0)
        return 0

    text = f"python -m deltacontrol.experiments.benchmarks.{name} {shlex.join(argv)}"
    return Case(key, f"benchmark {name}", text, (" ".join(argv),), run)


# -- changes ---------------------------------------------------------------------------------------


@cache
def _options(name: str) -> dict[str, Any]:
    """The type of every option of a command, by its word."""
    command: Any = cli.available()[name]
    hints = typing.get_type_hints(command)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(command) if f.name not in _LEFT_OUT}
    return {("delta" if n == "deltas" and name != "deltas" else n): h for n, h in fields.items()}


def _word(field: str) -> str:
    return "--" + field.replace("_", "-")


def _value(chance: random.Random, field: str, hint: Any) -> list[str]:
    """An odd or a valid value of an option, by its name and type."""
    kind = str(hint)
    if field in ("delta", "optimiser", "solver") or (field == "show" and "name" in kind):
        known = _deltas() if field == "delta" else _solvers()
        return [odd.spec(chance, known) for _ in range(chance.choice((1, 1, 1, 2)))]
    if field in ("task", "model", "runs", "adapter", "out", "plot", "csv", "json", "base_model"):
        return [chance.choice((*odd.PATHS, *_FILES))]
    if field == "text_column" or field == "label_column":
        return [chance.choice(("text", "label", "text_pair", "split", "txt", *odd.WORDS))]
    literals = [a for part in (hint, *typing.get_args(hint)) for a in typing.get_args(part)]
    words = [a for a in literals if isinstance(a, str)]
    if words:
        words = [word for word in words if word != "run"]  # measures for minutes
        return [chance.choice((*words, odd.near(chance, words[0]), "", "None"))]
    if "int" in kind or "float" in kind:
        return [odd.number(chance, field)]
    if "bool" in kind:
        return chance.choice(([], [], ["yes"], ["False"]))
    if "tuple" in kind:
        return [chance.choice(odd.WORDS) for _ in range(chance.choice((0, 1, 2)))]
    return [chance.choice(odd.WORDS)]


@cache
def _deltas() -> dict[str, dict[str, Any]]:
    from deltacontrol.deltas import registry

    return {n: {k: d for k, (_, d) in registry.fields(n).items()} for n in registry.available()}


@cache
def _solvers() -> dict[str, dict[str, Any]]:
    from deltacontrol.theory.solvers import registry

    return {n: {k: d for k, (_, d) in registry.fields(n).items()} for n in registry.available()}


def _change(
    chance: random.Random, name: str, words: list[str], marks: list[str], here: Path
) -> None:
    kinds: list[Callable[..., None]] = [
        _give,
        _give,
        _give,
        _give,
        _spoil_file,
        _spoil_file,
        _structure,
    ]
    chance.choice(kinds)(chance, name, words, marks, here)


def _give(chance: random.Random, name: str, words: list[str], marks: list[str], _: Path) -> None:
    """Another value of an option, in place of the one that is there."""
    options = _options(name)
    if not options:
        words.append(chance.choice(odd.WORDS))
        marks.append("a word too many")
        return
    field = chance.choice(sorted(options))
    given = _value(chance, field, options[field])
    if "Positional" in str(options[field]) or field in ("run_id", "adapter", "action", "ids"):
        words[:] = [*given, *words[1:]] if words else given
    else:
        if _word(field) in words:
            place = words.index(_word(field))
            end = place + 1
            while end < len(words) and not words[end].startswith("--"):
                end += 1
            del words[place:end]
        words += [_word(field), *given]
    marks.append(f"{field}={' '.join(given)[:40]}")


def _spoil_file(
    chance: random.Random, name: str, words: list[str], marks: list[str], here: Path
) -> None:
    """A file or a folder that is named is damaged."""
    named = [i for i, word in enumerate(words) if word in _FILES]
    if not named and (name in ("runs", "export-peft", "cite")):
        shutil.rmtree(here / "runs")
        marks.append("runs " + world.damaged(chance, here.parent / "runs", here / "runs"))
        return
    if not named:
        return
    place = chance.choice(named)
    file = here / words[place]
    if not file.is_symlink() and file.name != "runs":
        return
    if chance.random() < 0.3 and words[place] == "task.csv":
        words[place] = chance.choice([f for f in _FILES if "." in f])
        file = here / words[place]
    source = here.parent / file.name
    if file.is_symlink():
        file.unlink()
    else:
        shutil.rmtree(file, ignore_errors=True)
    marks.append(f"{file.name} " + world.damaged(chance, source, file))


def _structure(
    chance: random.Random, _name: str, words: list[str], marks: list[str], _here: Path
) -> None:
    """A word twice, missing, misspelt, or one too many."""
    kind = chance.randrange(4)
    if not words or kind == 0:
        words.append(chance.choice(odd.WORDS))
        marks.append("a word too many")
        return
    place = chance.randrange(len(words))
    if kind == 1:
        marks.append(f"without {words[place]}")
        del words[place]
    elif kind == 2:
        marks.append(f"{words[place]} twice")
        words += words[place : place + 2]
    else:
        marks.append(f"{words[place]} misspelt")
        words[place] = odd.near(chance, words[place])
