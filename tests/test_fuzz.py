"""Odd inputs get a message, never a traceback and never no end; more: ``python -m tests.fuzz``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.answers import Case, answer
from tests.fuzz.odd import near

ROOT = Path(__file__).resolve().parents[1]


def sorted_as(run: object, limit: float = 5.0) -> str:
    return answer(Case("call:0", "x", "x()", (), run), limit).sort  # type: ignore[arg-type]


def test_answers_are_sorted() -> None:
    from deltacontrol.theory.errors import InputError

    def refuse() -> None:
        raise InputError("rank is 0; expected at least 1")

    def stay() -> None:
        while True:
            pass

    def swallow() -> None:
        try:
            stay()
        except BaseException:
            return

    assert sorted_as(lambda: None) == "accepted" and sorted_as(lambda: 1) == "accepted"
    assert sorted_as(refuse) == "message"
    assert sorted_as(lambda: 2) == "traceback"  # exit code 2 without a word
    assert sorted_as(lambda: print("no", file=sys.stderr) or 2) == "message"
    assert sorted_as(lambda: [][0]) == "traceback"  # type: ignore[index]
    assert sorted_as(lambda: sys.exit("no")) == "traceback"
    assert sorted_as(stay, 0.05) == "hang" and sorted_as(swallow, 0.05) == "hang"


def test_a_name_is_changed_by_one_letter() -> None:
    import random

    assert all(near(random.Random(i), "lora") != "" for i in range(20))


@pytest.mark.parametrize(
    ("commands", "calls"), [(1, 15), pytest.param(20, 200, marks=pytest.mark.slow)]
)
def test_no_traceback_and_no_hang(tmp_path: Path, commands: int, calls: int) -> None:
    """A few drawn cases of both kinds; the number of them, not the time, is fixed."""
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        "--seed",
        "7",
        "--commands",
        str(commands),
        "--calls",
        str(calls),
    ]
    command += ["--accepted", str(tmp_path / "accepted.jsonl")]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = (tmp_path / "accepted.jsonl").read_text("utf-8").splitlines()
    names = {json.loads(line)["name"] for line in lines}
    assert len(names) > 2  # valid inputs are drawn too, and the table counts all of them
    rows = [row.split()[1:] for row in done.stdout.splitlines()[1:3]]
    assert [sum(map(int, row)) for row in rows] == [commands, calls]
