"""A digest of the code that measures for a claim.

It covers the claim's own file and, of the modules of ``experiments``, those that it imports,
directly or through one another, and that measure: the studies and the modules beside them that
compute what a claim or a figure needs. What only loads, trains, records and prints (`MACHINERY`) is
left out, and with it what it imports; so are ``theory`` and ``deltas``, which have exact tests.

Of each file the syntax tree counts without imports, ``__all__``, ``QUICK`` (the sizes of the quick
preset, by which nothing is published), docstrings and positions: neither a comment nor formatting
nor a file's place changes the digest, and any other change does.
"""

from __future__ import annotations

import ast
import hashlib
import tomllib
from collections.abc import Iterator
from pathlib import Path

from deltacontrol.experiments import claims

# Packages and modules of `experiments` that measure nothing themselves.
MACHINERY = {"benchmarks", "cli", "models", "runs", "setting", "sources", "tasks", "training"}
PACKAGE = claims.__name__.rpartition(".")[0]
FOLDER = Path(claims.__path__[0]).parent


def code_digest(claim: Path, folder: Path = FOLDER) -> str:
    """SHA-256 of the normalised code that measures for the claim in this file.

    Args:
        claim: The claim's file, or that of a statement, which `court` measures.
        folder: The folder of the package `experiments` that it imports from.
    """
    files = measuring(folder / "claims" / "court.py" if _is_statement(claim) else claim, folder)
    texts = [normalised(path) for path in files]
    if _is_statement(claim):
        texts.append(repr(sorted(tomllib.loads(claim.read_text(encoding="utf-8")).items())))
    digests = {hashlib.sha256(text.encode()).hexdigest() for text in texts}
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def _is_statement(claim: Path) -> bool:
    return claim.suffix == ".toml"


def measuring(claim: Path, folder: Path = FOLDER) -> list[Path]:
    """The files that count: the claim's, and what measures among what it imports."""
    found, waiting = set(), [claim]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        waiting += _imported(path, folder)
    return sorted(found)


def normalised(path: Path) -> str:
    """The file's syntax tree as text, without what does not count."""
    return _text(ast.parse(path.read_text(encoding="utf-8")))


def _imported(path: Path, folder: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            file = _file(name, folder)
            if file is not None:
                yield file


def _file(name: str, folder: Path) -> Path | None:
    """The file of a module that measures, given its name or that of something in it."""
    if not name.startswith(f"{PACKAGE}."):
        return None
    parts = name.removeprefix(f"{PACKAGE}.").split(".")
    if parts[0] in MACHINERY:
        return None
    for known in (parts, parts[:-1]):
        place = folder.joinpath(*known)
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if known and file.is_file():
                return file
    return None


def _text(node: object) -> str:
    """A tree as text that does not depend on Python's version: no position, no empty field."""
    if isinstance(node, list):
        return "[" + ",".join(filter(None, map(_text, node))) + "]"
    if _is_aside(node):
        return ""
    if isinstance(node, ast.Constant):
        return f"{type(node.value).__name__}:{node.value!r}"
    if isinstance(node, ast.AST):
        fields = {name: getattr(node, name, None) for name in node._fields}
        told = (f"{n}={_text(v)}" for n, v in fields.items() if v not in (None, []) and n != "ctx")
        return f"{type(node).__name__}({','.join(told)})"
    return repr(node)


def _is_aside(node: object) -> bool:
    """Whether a statement only imports, lists names, documents, or has the quick sizes."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return isinstance(node.value.value, str)
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name):
        return node.test.id == "TYPE_CHECKING"
    targets = node.targets if isinstance(node, ast.Assign) else []
    listing = any(isinstance(t, ast.Name) and t.id in ("__all__", "QUICK") for t in targets)
    return listing or isinstance(node, ast.Import | ast.ImportFrom)
