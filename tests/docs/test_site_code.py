"""Every Python block of the pages by hand runs, on a model and a task of a few numbers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltacontrol.theory import plugins
from docs import generate
from tests import tiny_model

BLOCK = re.compile(r"^```python( no-run)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Blocks that need a hub or a GPU are marked `no-run`.
NOT_RUN = {"howto/hub.md"}


def blocks() -> dict[str, list[tuple[str, str]]]:
    found = {}
    for path in sorted(generate.HAND.rglob("*.md")):
        page = path.relative_to(generate.HAND).as_posix()
        if matches := BLOCK.findall(path.read_text(encoding="utf-8")):
            found[page] = matches
    return found


BLOCKS = blocks()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, in which nothing of the user's is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.setattr(plugins, "_adopted", {})
    yield


def test_what_is_not_run_is_listed() -> None:
    assert {page for page, found in BLOCKS.items() if any(mark for mark, _ in found)} == NOT_RUN


@pytest.mark.parametrize("page", BLOCKS)
@pytest.mark.one_in(3)
def test_python_blocks_run(page: str, tmp_path: Path) -> None:
    """In order, each by itself: a reader may copy any one of them."""
    small = tiny_model.write(tmp_path, classes=2)
    for mark, code in BLOCKS[page]:
        if mark:
            continue
        code = code.replace('"minilm-l6"', repr(small["model"]))
        code = code.replace('task="movie"', f"task={small['task']!r}")
        code = code.replace(" steps=20)", " steps=20, max_length=8)")  # which the small model has
        with warnings.catch_warnings():
            # The Trainer warns of its own settings.
            warnings.simplefilter("ignore")
            exec(compile(code, page, "exec"), {"__name__": "block"})
