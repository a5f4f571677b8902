"""Every proof notebook is a percent script with the agreed sections, and runs to its end."""

from __future__ import annotations

import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "proofs_notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
SECTIONS = ("statement", "assumptions", "derivation", "numerical check", "what breaks it")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@each
def test_is_a_percent_script_with_the_agreed_sections(path: Path) -> None:
    with warnings.catch_warnings():
        # jupytext's own imports still use interfaces that their authors have deprecated.
        warnings.simplefilter("ignore")
        import jupytext

        notebook = jupytext.read(path)
    assert notebook.metadata["jupytext"]["text_representation"]["format_name"] == "percent"
    kinds = {cell.cell_type for cell in notebook.cells}
    assert kinds == {"markdown", "code"}
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    headings = [line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("## ")]
    for section in SECTIONS:
        assert any(heading.startswith(section) for heading in headings), section
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    assert "assert " in code


@pytest.fixture
def own_defaults() -> Iterator[None]:
    """Let a notebook set the default dtype of its own process, which is this one here."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


# Of many seconds; `make slow` runs them too.
SLOW = ("01_", "02_", "03_", "04_", "05_", "07_", "11_", "16_")
SLOW += ("12_", "19_", "20_", "21_", "22_", "24_", "25_", "31_")


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow if p.stem.startswith(SLOW) else ()) for p in NOTEBOOKS],
    ids=lambda path: path.stem,
)
@pytest.mark.one_in(3)
@pytest.mark.usefixtures("own_defaults")
def test_runs(path: Path) -> None:
    runpy.run_path(str(path), run_name="__main__")
