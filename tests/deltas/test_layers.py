"""Inside the package of deltas no module imports itself through others, not even for its types."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import deltacontrol.deltas

FOLDER = Path(deltas.__file__).parent


def imported(file: Path) -> set[Path]:
    """Return the files of the package that a file imports, under TYPE_CHECKING too."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        _, inside, path = f".{node.module}.".partition(".deltas.")
        if not inside:
            continue
        module = FOLDER.joinpath(*path.strip(".").split("."))
        names = [module / alias.name for alias in node.names] if module.is_dir() else []
        found |= {
            candidate.with_suffix(".py")
            for candidate in (module, *names)
            if candidate.with_suffix(".py").is_file()
        }
    return found - {file}


def test_imports_have_no_circle() -> None:
    graph = {file: imported(file) for file in FOLDER.rglob("*.py") if file.name != "__init__.py"}
    assert sum(map(len, graph.values())) > 100, "the imports were read"
    TopologicalSorter(graph).prepare()
