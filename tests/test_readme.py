"""The README runs, and its generated tables are not stale."""

import re
from pathlib import Path

import pytest

from deltacontrol.experiments.claims import scoreboard
from deltacontrol.experiments.cli import main as cli

README = Path(__file__).resolve().parents[1] / "README.md"


def between(text: str, marker: str) -> str:
    begin, end = f"<!-- {marker}:begin -->\n", f"<!-- {marker}:end -->"
    assert text.count(begin) == 1 and text.count(end) == 1, f"README.md lacks its {marker} markers"
    return text.split(begin)[1].split(end)[0]


def test_scoreboard_is_up_to_date() -> None:
    written = between(README.read_text(encoding="utf-8"), "scoreboard").strip()
    assert written == scoreboard.render_table().strip(), (
        "the scoreboard in README.md is stale; put what "
        "deltacontrol.experiments.claims.scoreboard.render_table() returns between its markers"
    )


def test_python_examples_run(minilm_l6: str, capsys: pytest.CaptureFixture[str]) -> None:
    codes = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert f'"{minilm_l6}"' in codes[0]
    names: dict[str, object] = {}
    for code in codes:  # each goes on where the last one stopped
        exec(compile(code, str(README), "exec"), names)
    assert capsys.readouterr().out


def test_commands_exist() -> None:
    named = re.findall(r"^deltacontrol ([a-z-]+)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert named and set(named) <= set(cli.available())


def test_linked_files_exist() -> None:
    text = README.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (README.parent / link).exists()]
    assert links and not missing
