"""The reference: a page for each folder of the packages, from signatures and docstrings.

Every public class and function is an object of Sphinx's Python domain, so that names in backticks
anywhere on the site become links to it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from docs.generators import markdown
from docs.generators.markdown import Pages, Resolve, inline, toctree

PACKAGE = "deltacontrol"
LAYERS = ("theory", "deltas", "experiments", "paper_figures")
# Files that other pages show one by one, or that need a library of their own.
LEFT_OUT = re.compile(
    r"\.experiments\.claims\.\d|\.deltas\.methods\.[a-z0-9_]+$|\.experiments\.cli\.(?!main)"
    r"|\.packaged\.|\.paper_figures\.figures\.|\.studies\.\w+\.|\.theory\.lq\.compiled"
)
FACADE = "the façade: what `import deltacontrol as dc` gives"


def pages() -> Pages:
    """A page for each folder with modules, the façade, and an index."""
    found: Pages = {"api/index.md": _index, f"api/{PACKAGE}.md": _facade}
    for folder in _folders():
        found[f"api/{folder}.md"] = lambda folder=folder: _folder_page(folder)
    return found


@cache
def modules() -> list[str]:
    """The dotted names of the modules that the reference shows."""
    found = []
    for layer in LAYERS:
        package = importlib.import_module(f"{PACKAGE}.{layer}")
        names = (i.name for i in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))
        found += [package.__name__, *names]
    return [name for name in found if not LEFT_OUT.search(name)]


@cache
def _folders() -> dict[str, list[str]]:
    """Modules by the page that shows them: the package that holds them."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in modules():
        folder = name if _is_package(name) else name.rpartition(".")[0]
        found[folder].append(name)
    return dict(sorted(found.items()))


def _is_package(name: str) -> bool:
    return hasattr(importlib.import_module(name), "__path__")


def public(module: ModuleType) -> dict[str, Any]:
    """The documented classes and functions that a module defines itself."""
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    found = {}
    for name in names:
        value = vars(module).get(name)
        own = getattr(value, "__module__", None) == module.__name__
        if own and (inspect.isclass(value) or callable(value)) and getattr(value, "__doc__", None):
            if getattr(value, "__name__", None) == name:
                found[name] = value
    return found


@cache
def objects() -> dict[str, str]:
    """Every name that a link can lead to, by kind: obj, or mod of a module."""
    found = {name: "mod" for name in modules()}
    for name in modules():
        for key, value in public(importlib.import_module(name)).items():
            found[f"{name}.{key}"] = "obj"
            if inspect.isclass(value):
                found |= {f"{name}.{key}.{member}": "obj" for member in _members(value)}
    from deltacontrol.deltas import registry

    for kind in registry.available().values():
        full = f"{kind.__module__}.{kind.__name__}"
        found[full] = "obj"
        found |= {f"{full}.{member}": "obj" for member in _members(kind)}
    return found


@cache
def _short() -> dict[str, str]:
    """Names of classes and functions that only one module has, and their full names."""
    found: dict[str, list[str]] = defaultdict(list)
    for full, kind in objects().items():
        if kind == "obj":
            found[full.rpartition(".")[2]].append(full)
            found[".".join(full.split(".")[-2:])].append(full)
    return {name: full[0] for name, full in found.items() if len(full) == 1 and name[0].isupper()}


def resolver(module: str) -> Resolve:
    """What turns a name that a docstring of `module` has in backticks into a link."""
    known = objects()

    def resolve(text: str) -> str | None:
        name = text.removesuffix("()")
        if not re.fullmatch(r"[A-Za-z_][\w.]*", name):
            return None
        exported = vars(importlib.import_module(module)).get(name) if module else None
        taken = f"{getattr(exported, '__module__', '')}.{getattr(exported, '__name__', '')}"
        for full in (name, f"{module}.{name}", taken, _short().get(name)):
            if full in known:
                return f"{{py:{known[full]}}}`{text} <{full}>`"
        return None

    return resolve


def class_directive(kind: type, *, with_text: bool = True, depth: int = 0) -> str:
    """A class as an object of the reference, with its public methods and properties."""
    resolve = resolver(kind.__module__)
    fence = ":" * (6 - depth)
    out = [
        f"{fence}{{py:class}} {kind.__name__}{_signature(kind)}",
        f":module: {kind.__module__}",
        "",
    ]
    if with_text:
        out += [markdown.docstring(kind.__doc__, resolve), ""]
    for name, value in _members(kind).items():
        out += [_member(name, value, resolve, fence[1:]), ""]
    return "\n".join([*out, fence])


def _members(kind: type) -> dict[str, Any]:
    """Documented public methods and properties that the class itself defines."""
    found = {}
    for name, value in vars(kind).items():
        target = getattr(value, "__func__", None) or getattr(value, "func", None) or value
        target = value.fget if isinstance(value, property) else target
        if not name.startswith("_") and inspect.isfunction(target) and target.__doc__:
            found[name] = value
    return found


def _member(name: str, value: Any, resolve: Resolve, fence: str) -> str:
    options, signature = [], ""
    target = getattr(value, "__func__", value)
    if isinstance(value, property) or hasattr(value, "func"):
        kind = "py:property"
        target = value.fget if isinstance(value, property) else value.func
    else:
        kind = "py:method"
        signature = _signature(target, skip=not isinstance(value, staticmethod))
        options += [":classmethod:"] * isinstance(value, classmethod)
        options += [":staticmethod:"] * isinstance(value, staticmethod)
    text = markdown.docstring(target.__doc__, resolve)
    return "\n".join([f"{fence}{{{kind}}} {name}{signature}", *options, "", text, fence])


def _function(name: str, value: Any) -> str:
    text = markdown.docstring(value.__doc__, resolver(value.__module__))
    head = f"::::::{{py:function}} {name}{_signature(value)}"
    return "\n".join([head, f":module: {value.__module__}", "", text, "::::::"])


def _signature(value: Any, *, skip: bool = False) -> str:
    """The arguments as the code writes them; what cannot be written back is left out."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return "()"
    parameters = list(found.parameters.values())[int(skip) :]
    shown = [
        p.replace(annotation=_Text(_plain(p.annotation)), default=_default(p.default))
        if p.annotation is not p.empty
        else p.replace(default=_default(p.default))
        for p in parameters
    ]
    returned = found.return_annotation
    text = str(found.replace(parameters=shown, return_annotation=inspect.Signature.empty))
    if inspect.isclass(value) or returned is inspect.Signature.empty:
        return text
    return f"{text} -> {_plain(returned)}"


class _Text(str):
    """A text that prints itself without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _default(value: Any) -> Any:
    if value is inspect.Parameter.empty:
        return value
    text = repr(value)
    if isinstance(value, Path):
        text = repr(value.as_posix())
    return _Text("..." if re.search(r"<|0x|\n|/", text) and not isinstance(value, str) else text)


def _plain(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(typing|collections\.abc)\.", "", text)


def _folder_page(folder: str) -> str:
    page, names = f"api/{folder}.md", _folders()[folder]
    out = [f"# {folder}"]
    for name in names:
        module = importlib.import_module(name)
        if name != folder:
            out.append(f"## {name.rpartition('.')[2]}")
        # Names in a package's docstring may be those that it exports.
        out += [
            f"```{{py:module}} {name}\n```",
            markdown.docstring(module.__doc__, resolver(name)),
            f"Code: {markdown.code_link(page, _file(module))}",
        ]
        for key, value in public(module).items():
            out.append(class_directive(value) if inspect.isclass(value) else _function(key, value))
    return "\n\n".join(filter(None, [*out, ""]))


def _file(module: ModuleType) -> str:
    """A module's file in the checkout, whose folders the package links to."""
    place = Path(*module.__name__.split(".")[1:])
    return f"{place.as_posix()}/__init__.py" if hasattr(module, "__path__") else f"{place}.py"


def _facade() -> str:
    import deltacontrol as dc

    page, rows = f"api/{PACKAGE}.md", []
    places: dict[str, str] = vars(dc)["_PLACES"]
    for name in dc.__all__:
        value = getattr(dc, name)
        if name in LAYERS:
            shown = f"[`{PACKAGE}.{name}`]({PACKAGE}.{name}.md)"
        elif name in places:
            resolve = resolver(getattr(value, "__module__", ""))
            shown = resolve(getattr(value, "__name__", name)) or markdown.code(places[name])
        else:
            shown = ""
        doc = "the version" if name == "__version__" else markdown.first_line(value.__doc__)
        rows.append((f"`dc.{name}`", shown, inline(doc)))
    return "\n\n".join([
        f"# {PACKAGE}",
        f"```{{py:module}} {PACKAGE}\n```",
        markdown.docstring(dc.__doc__, resolver(PACKAGE)),
        f"Code: {markdown.code_link(page, 'src/deltacontrol/__init__.py')}",
        "## Names",
        markdown.table(("name", "is", "which does"), rows),
        "",
    ])  # fmt: skip


def _index() -> str:
    out = [
        "# Reference",
        f"`{PACKAGE}` is {FACADE}. Behind it stand four packages. Imports point downward only: "
        "`theory` knows tensors and no Transformers; `deltas` knows Transformers; `experiments` "
        "trains and records; `paper_figures` draws records.",
        f"- [`{PACKAGE}`]({PACKAGE}.md): {FACADE}",
    ]
    for layer in LAYERS:
        rows = [
            (f"[`{folder}`]({folder}.md)",
             inline(markdown.first_line(importlib.import_module(folder).__doc__)))
            for folder in _folders()
            if f"{folder}.".startswith(f"{PACKAGE}.{layer}.")
        ]  # fmt: skip
        out += [f"## {layer}", markdown.table(("folder", "what lives there"), rows)]
    return "\n\n".join([*out, toctree([PACKAGE, *_folders()], hidden=True), ""])
