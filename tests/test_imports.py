"""Imports point downward: theory, deltas, experiments, paper_figures."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("theory", "deltas", "experiments", "paper_figures")
FILES = [file for layer in LAYERS for file in sorted((ROOT / layer).rglob("*.py"))]
LIGHT = [
    "experiments/cli/main.py",
    "experiments/runs/store.py",
    "experiments/setting.py",
    "experiments/sources.py",
    "experiments/models/*.py",
    "experiments/studies/*.py",
    "experiments/tasks/*.py",
    "paper_figures/*.py",
]


def imported(file: Path) -> Iterator[tuple[str, int]]:
    """Yield the top-level package and line of each absolute import, in functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], node.lineno


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_downward(layer: str) -> None:
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    upward = [
        f"{file.relative_to(ROOT)}:{line} imports {package}"
        for file in FILES
        if file.relative_to(ROOT).parts[0] == layer
        for package, line in imported(file)
        if package in above
    ]
    assert not upward, upward


def test_figures_and_theory_keep_to_their_libraries() -> None:
    forbidden = {"paper_figures": {"torch", "transformers"}, "theory": {"transformers"}}
    found = [
        f"{file.relative_to(ROOT)}:{line} imports {package}"
        for file in FILES
        for package, line in imported(file)
        if package in forbidden.get(file.relative_to(ROOT).parts[0], set())
    ]
    assert not found, found


@pytest.mark.parametrize("pattern", LIGHT)
def test_light_modules_start_without_torch(pattern: str) -> None:
    """A subprocess, because this process has torch already."""
    files = sorted(ROOT.glob(pattern))
    assert files, pattern
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    code = "\n".join(
        [
            "import importlib, sys",
            f"for module in {modules}:",
            "    importlib.import_module(module.removesuffix('.__init__'))",
            "    assert 'torch' not in sys.modules, f'{module} imports torch when it is imported'",
        ]
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
