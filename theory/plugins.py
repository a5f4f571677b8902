"""A user's own files: deltas, solvers, claims, tasks, models, figures, studies and commands.

A file that would be one file of this project works outside of it as well. It is taken in by

    deltacontrol --load my_delta.py finetune --delta mine      on the command line,
    [tool.deltacontrol]                                        in the pyproject.toml of the working
    load = ["my_delta.py"]                                     folder, or of a folder above it,
    plugins.load("my_delta.py")                                in Python,

or by the entry-point group ``deltacontrol.plugins`` of an installed package, which names a module.
Deltas and solvers that a script or a notebook defines itself are found without any of this. The
registries of this project then find what is defined, as they find their own files. A file is Python
code: load what you would run. It is run once in a process, also in the processes of a sweep.
The module does not import torch.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import tomllib
import traceback
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError

__all__ = [
    "adopt",
    "configured",
    "defined",
    "digest",
    "load",
    "load_sources",
    "members",
    "merged",
    "modules",
    "sources",
    "values",
]

PACKAGE, GROUP = "deltacontrol.", "deltacontrol.plugins"
_MAINS = ("__main__", "__mp_main__")  # a script, and the same in a process of a sweep
T = TypeVar("T")
_loaded: dict[Path, ModuleType] = {}
_adopted: dict[str, ModuleType] = {}
_texts: dict[str, str] = {}  # digest of a module's file when it was first seen


@typed
def load(path: str | Path) -> ModuleType:
    """Run a file as a module and let the registries find what it defines; a second time, nothing.

    Raises:
        InputError: there is no such Python file, or it fails when it is run.
    """
    try:
        file = Path(path).expanduser().resolve()
        there = file.suffix == ".py" and file.is_file()
    except (OSError, RuntimeError, ValueError):  # no path: too long, an unknown ~user, a zero byte
        file, there = Path(), False
    if file in _loaded:
        return _loaded[file]
    if not there:
        raise InputError(
            f"cannot load {path}: expected the path of a Python file, such as my_delta.py"
        )
    # The same file has the same name in every process, so that what it defines can be sent there.
    name = f"deltacontrol_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _texts[name] = _text(file)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)
        ]
        where = f" in line {lines[-1]}" if lines else ""
        raise InputError(
            f"cannot load {path}: {type(error).__name__}: {error}{where}; the file must run "
            "by itself"
        ) from error
    _loaded[file] = module
    return module


def configured(folder: Path) -> list[Path]:
    """Files named under ``[tool.deltacontrol] load`` in the nearest pyproject.toml, upwards.

    Raises:
        InputError: that file is not TOML, or the entry is not a list of paths.
    """
    for place in (folder.resolve(), *folder.resolve().parents):
        file = place / "pyproject.toml"
        if not file.is_file():
            continue
        try:
            document = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error
        table = document.get("tool", {}).get("deltacontrol", {})
        named = table.get("load", []) if isinstance(table, dict) else table
        if not isinstance(named, list) or not all(isinstance(item, str) for item in named):
            raise InputError(
                f'{file}: [tool.deltacontrol] load is {named!r}; expected paths, ["my_delta.py"]'
            )
        return [place / item for item in named]
    return []


def adopt(value: type) -> None:
    """Let the registries know the module that defines a class, which a program imported itself."""
    name = value.__module__
    known = name.startswith(PACKAGE) or name in _MAINS or sys.modules[name] in _loaded.values()
    if not known:
        _adopted[name] = sys.modules[name]
        digest(value)


def sources() -> tuple[str, ...]:
    """What `load_sources` needs in another process to know what this one knows."""
    return (*map(str, _loaded), *_adopted)


def load_sources(found: Iterable[str]) -> None:
    """Load the files and import the modules that `sources` named."""
    for source in found:
        if source.endswith(".py"):
            load(source)
        else:
            _adopted[source] = importlib.import_module(source)


def modules() -> Iterator[ModuleType]:
    """Loaded files, adopted modules, and the modules of installed packages that extend this one."""
    yield from [*_loaded.values(), *_adopted.values()]
    yield from _installed()


@cache
def _installed() -> tuple[ModuleType, ...]:
    found = []
    for entry in entry_points(group=GROUP):
        try:
            found.append(entry.load())
        except Exception as error:
            raise InputError(
                f"the installed extension {entry.name} ({entry.value}) cannot be loaded: "
                f"{type(error).__name__}: {error}; mend or uninstall it"
            ) from error
    return tuple(found)


def defined(package: ModuleType, kind: type[T]) -> Iterator[type[T]]:
    """Concrete subclasses of ``kind`` that the modules of a package define, not its packages."""
    for info in pkgutil.iter_modules(package.__path__):
        if info.ispkg:  # what several of its modules share
            continue
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for value in vars(module).values():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and issubclass(value, kind) and not inspect.isabstract(value):
                yield value


def members(kind: type[T]) -> Iterator[type[T]]:
    """Concrete subclasses of ``kind`` that the modules, or the running script, define."""
    mains = {id(m): m for name in _MAINS if (m := sys.modules.get(name)) is not None}
    for module in (*modules(), *mains.values()):
        for value in vars(module).values():
            own = inspect.isclass(value) and sys.modules.get(value.__module__) is module
            if own and issubclass(value, kind) and not inspect.isabstract(value):
                yield value


def values(name: str) -> Iterator[tuple[str, Any]]:
    """The attribute ``name`` of the modules that have it, each with its module's last name."""
    for module in modules():
        if hasattr(module, name):
            file = getattr(module, "__file__", None)
            yield Path(file).stem if file else module.__name__, getattr(module, name)


def merged(what: str, own: dict[str, T], added: Iterable[tuple[str, T]]) -> dict[str, T]:
    """The registry of this project and what users add, in alphabetical order.

    Raises:
        InputError: a name is taken.
    """
    found = dict(own)
    for name, value in added:
        if name in found and found[name] is not value:
            raise InputError(
                f"the name {name!r} of a {what} is taken by this project; give yours another"
            )
        found[name] = value
    return dict(sorted(found.items()))


def digest(value: type) -> str | None:
    """SHA-256 of the files that define a class and its ancestors; None for this project's own.

    What a user's class computes may change without a change of configuration, so a run's identity
    holds this digest. It is that of the text which was loaded.

    Raises:
        InputError: the class has no text, as one that was typed at a prompt, or its file has
            changed since it was loaded, so that another text runs than stands there.
    """
    if value.__module__.startswith(PACKAGE):
        return None
    texts = sorted({_digest(value), *map(_digest, filter(_is_users, value.__mro__[1:]))})
    return texts[0] if len(texts) == 1 else _hash("".join(texts).encode())


def _is_users(kind: type) -> bool:
    """Whether a class is neither of this project, nor of Python, nor of an installed package."""
    top = kind.__module__.partition(".")[0]
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    library = kind.__module__.startswith(PACKAGE) or top in sys.stdlib_module_names
    return not library and "site-packages" not in Path(file).parts


def _digest(value: type) -> str:
    name = value.__module__
    file = getattr(sys.modules.get(name), "__file__", None)
    try:
        text = _text(Path(file)) if file else _hash(inspect.getsource(value).encode())
    except (OSError, TypeError) as error:
        raise InputError(
            f"the text of the class {value.__name__} cannot be found, so a run with it could not "
            "be told from one with another class of that name; write it into a file"
        ) from error
    if file and _texts.setdefault(name, text) != text:
        raise InputError(
            f"{file} has changed since it was loaded, so a run would be kept under a text that was "
            "not run; start anew (in a notebook: restart the kernel)"
        )
    return text


def _text(file: Path) -> str:
    return _hash(file.read_bytes())


def _hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
