"""Every module can be imported, and every example in a docstring is run and is true."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from deltacontrol import deltas, experiments, paper_figures, theory
from tests import tiny_model

PACKAGES = (theory, deltas, experiments, paper_figures)


def modules() -> Iterator[str]:
    """The names of the packages and of all modules in their folders."""
    for package in PACKAGES:
        yield package.__name__
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            yield info.name


def written(module: ModuleType) -> int:
    """How many examples stand in the docstrings of a module's file."""
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return sum(len(doctest.DocTestParser().get_examples(text)) for text in texts)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What examples may use without making it: a small model and a task, in files."""
    places = tiny_model.write(tmp_path_factory.mktemp("tiny"))
    return {"tiny_model": places["model"], "tiny_task": places["task"]}


@pytest.mark.parametrize("name", list(modules()))
def test_examples_are_true(name: str, tiny: dict[str, str]) -> None:
    """One that is skipped, or that doctest does not find, is a failure: both counts must agree."""
    module = importlib.import_module(name)
    if not written(module):  # doctest would look for the line of every object of the module
        return
    results = doctest.testmod(module, extraglobs=tiny)
    assert results.failed == 0
    assert results.attempted == written(module)


def test_every_file_is_a_module_that_is_found() -> None:
    found = {importlib.import_module(name).__file__ for name in modules()}
    files = {str(file) for p in PACKAGES for file in Path(p.__path__[0]).rglob("*.py")}
    assert files == found
    assert sum(written(importlib.import_module(name)) > 0 for name in modules()) > 15
