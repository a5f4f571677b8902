"""The house: what may import what, how large a file and a folder may be, and who stays light.

Imports point downward, theory ← deltas ← experiments ← paper_figures; within a package, and within
each of its folders, no two neighbours import each other, directly or around a corner. An import in
a function and one for type checkers alone count too.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "deltacontrol"
LAYERS = ("theory", "deltas", "experiments", "paper_figures")
FILES = [file for layer in LAYERS for file in sorted((ROOT / layer).rglob("*.py"))]
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in FILES
}
FOLDERS = sorted({file.parent for file in FILES})
# One file an addition, found by itself: these folders grow with what is added.
REGISTRIES = {
    "deltas/methods",
    "deltas/interop/formats",
    "experiments/claims",
    "experiments/cli",
    "experiments/models/packaged",
    "experiments/predicting/predictors",
    "experiments/runs/executors",
    "experiments/tasks/packaged",
    "paper_figures/figures",
    "theory/solvers",
}
MOST_LINES, MOST_MODULES = 400, 15
LIGHT = [
    "experiments/cli/main.py",
    "experiments/runs/store.py",
    "experiments/setting.py",
    "experiments/sources.py",
    "experiments/models/**/*.py",
    "experiments/studies/*/grid.py",
    "experiments/tasks/packaged/*.py",
    "paper_figures/**/*.py",
]


@cache
def imported(file: Path) -> tuple[tuple[str, int], ...]:
    """Each import of a file, with its line: the module and what is taken, "." where relative."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(name.name, node.lineno) for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.append((".", node.lineno))
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(f"{node.module}.{name.name}", node.lineno) for name in node.names]
    return tuple(found)


def own(file: Path) -> Iterator[tuple[str, int]]:
    """The project's modules that a file imports, without the package's name."""
    for name, line in imported(file):
        if name.startswith(f"{PACKAGE}."):
            name = name.removeprefix(f"{PACKAGE}.")
            yield (name if name in MODULES else name.rpartition(".")[0] or name), line


def test_relative_imports_and_bare_names_are_not_used() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in FILES
        for name, line in imported(file)
        if name == "." or name.split(".")[0] in LAYERS
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_downward(layer: str) -> None:
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    upward = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in FILES
        if file.relative_to(ROOT).parts[0] == layer
        for name, line in own(file)
        if name.split(".")[0] in above
    ]
    assert not upward, upward


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_neighbours_do_not_import_each_other(folder: Path) -> None:
    """Modules and sub-folders of a folder are the nodes; its `__init__` only re-exports."""
    place = folder.relative_to(ROOT).parts
    arrows: dict[str, dict[str, str]] = defaultdict(dict)
    for file in FILES:
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[: len(place)] != place or parts[-1] == "__init__":
            continue
        for name, line in own(file):
            target = tuple(name.split("."))
            if target[: len(place)] == place and len(target) > len(place):
                source, end = parts[len(place)], target[len(place)]
                if source != end:
                    arrows[source].setdefault(end, f"{file.relative_to(ROOT)}:{line}")
    circle = _circle(arrows)
    assert not circle, (
        " → ".join(circle)
        + "; "
        + "; ".join(arrows[a][b] for a, b in zip(circle, circle[1:], strict=False))
    )


def _circle(arrows: dict[str, dict[str, str]]) -> list[str]:
    """A path that comes back to its start, or an empty list."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for end in arrows.get(node, {}):
            found = walk(end, [*path, node])
            if found:
                return found
        done.add(node)
        return []

    return next((found for start in sorted(arrows) if (found := walk(start, []))), [])


def test_files_are_of_a_size_to_be_read() -> None:
    lengths = {
        f.relative_to(ROOT).as_posix(): len(f.read_text("utf-8").splitlines()) for f in FILES
    }
    assert not {name: n for name, n in lengths.items() if n > MOST_LINES}


def test_folders_are_of_a_size_to_be_looked_through() -> None:
    counts = Counter(f.parent.relative_to(ROOT).as_posix() for f in FILES if f.stem != "__init__")
    assert not {
        name: n for name, n in counts.items() if n > MOST_MODULES and name not in REGISTRIES
    }


def test_every_folder_says_what_lives_there() -> None:
    silent = [
        folder.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        if not (folder / "__init__.py").exists()
        or not ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
    ]
    assert not silent, silent


def test_figures_and_theory_keep_to_their_libraries() -> None:
    forbidden = {"paper_figures": {"torch", "transformers"}, "theory": {"transformers"}}
    found = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in FILES
        for name, line in imported(file)
        if name.split(".")[0] in forbidden.get(file.relative_to(ROOT).parts[0], set())
    ]
    assert not found, found


@pytest.mark.parametrize("pattern", LIGHT)
@pytest.mark.one_in(2)
def test_light_modules_start_without_torch(pattern: str) -> None:
    """A subprocess, because this process has torch already."""
    files = sorted(ROOT.glob(pattern))
    assert files, pattern
    modules = [".".join((PACKAGE, *f.relative_to(ROOT).with_suffix("").parts)) for f in files]
    code = "\n".join(
        [
            "import importlib, sys",
            f"for module in {modules}:",
            "    importlib.import_module(module.removesuffix('.__init__'))",
            "    assert 'torch' not in sys.modules, f'{module} imports torch when it is imported'",
        ]
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
