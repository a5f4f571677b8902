"""Every notebook is a percent script that prints, draws and runs; proofs have agreed sections."""

from __future__ import annotations

import ast
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "proofs_notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
# What is no proof: a first look at the whole product.
START = FOLDER / "00_quick_start.py"
SECTIONS = ("statement", "assumptions", "derivation", "numerical check", "what breaks it")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[str]:
    """The texts of the cells of a kind; fails where the file is no percent script of both kinds."""
    with warnings.catch_warnings():
        # jupytext's own imports still use interfaces that their authors have deprecated.
        warnings.simplefilter("ignore")
        import jupytext

        notebook = jupytext.read(path)
    assert notebook.metadata["jupytext"]["text_representation"]["format_name"] == "percent"
    kinds = {cell.cell_type for cell in notebook.cells}
    assert kinds == {"markdown", "code"}
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS[0] == START and len(NOTEBOOKS) > 1


@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda path: path.stem)
def test_is_a_percent_script_with_the_agreed_sections(path: Path) -> None:
    text = "\n".join(cells(path, "markdown"))
    headings = [line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("## ")]
    for section in SECTIONS:
        assert any(heading.startswith(section) for heading in headings), section
    assert "assert " in "\n".join(cells(path, "code"))


def draws(code: str) -> bool:
    """Whether a cell makes axes and does not only define how."""
    return ".subplots(" in code


def prints(code: str) -> bool:
    calls = (node.func for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    return any(isinstance(call, ast.Name) and call.id == "print" for call in calls)


def test_the_quick_start_has_ten_cells_and_each_shows_something() -> None:
    code = cells(START, "code")
    assert len(code) == 10
    for source in code:
        assert prints(source) or draws(source), source


@each
def test_a_notebook_prints_and_draws(path: Path) -> None:
    code = cells(path, "code")
    assert any(map(prints, code)) and any(map(draws, code))


@pytest.fixture
def own_defaults() -> Iterator[None]:
    """Let a notebook set the default dtype of its own process, which is this one here."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


# Of many seconds; `make slow` runs them too.
SLOW = ("00_", "01_", "02_", "03_", "04_", "05_", "07_", "11_", "16_")
SLOW += ("12_", "19_", "20_", "21_", "22_", "24_", "25_", "31_")


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow if p.stem.startswith(SLOW) else ()) for p in NOTEBOOKS],
    ids=lambda path: path.stem,
)
@pytest.mark.one_in(3)
@pytest.mark.usefixtures("own_defaults")
def test_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if path == START:
        request.getfixturevalue("minilm_l3")
    monkeypatch.chdir(tmp_path)  # what it records stays there
    runpy.run_path(str(path), run_name="__main__")
    plt.close("all")
