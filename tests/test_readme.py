"""The README runs, and its generated tables are not stale."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deltacontrol.experiments.claims import board
from deltacontrol.experiments.cli import main as cli

README = Path(__file__).resolve().parents[1] / "README.md"


def between(text: str, marker: str) -> str:
    begin, end = f"<!-- {marker}:begin -->\n", f"<!-- {marker}:end -->"
    assert text.count(begin) == 1 and text.count(end) == 1, f"README.md lacks its {marker} markers"
    return text.split(begin)[1].split(end)[0]


def test_scoreboard_is_up_to_date() -> None:
    written = between(README.read_text(encoding="utf-8"), "scoreboard").strip()
    assert written == board.folded().strip(), (
        "the scoreboard in README.md is stale; call "
        "deltacontrol.experiments.claims.board.update_readme()"
    )


CODES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def run(code: str) -> str:
    """What a reader sees who runs `code` in a fresh process."""
    environment = os.environ | {"PYTHONPATH": str(README.parent / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, len(CODES)))]
)
def test_python_examples_run_by_themselves(minilm_l6: str, number: int) -> None:
    assert f'"{minilm_l6}"' in CODES[number]
    shown = run(CODES[number])
    if number == 0:  # the solve converges, by the numbers that stand beside it
        status, residuals = shown.splitlines()[-2:]
        assert status.startswith("converged ")
        written = re.search(r"# ([-\de, .]+): Newton", CODES[0])
        assert written is not None
        values = json.loads(residuals)
        assert values == pytest.approx([float(text) for text in written[1].split(", ")], rel=0.3)
        assert values == sorted(values, reverse=True) and values[-1] < 1e-6


def test_commands_exist() -> None:
    named = re.findall(r"^deltacontrol ([a-z-]+)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert named and set(named) <= set(cli.available())


def test_linked_files_exist() -> None:
    text = README.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    places = {f"#{re.sub(r'[^a-z0-9 -]', '', one.lower()).replace(' ', '-')}" for one in headings}
    missing = [n for n in links if n not in places and not (README.parent / n).exists()]
    assert links and not missing
