"""What the files of the delta methods say about them, read without importing them.

Importing a method imports torch, which figures do without. Of a class in `deltas/methods` the
literals in its body are read, and those of its bases there; a user's file that was loaded has been
run already, and its classes are looked at themselves.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from deltacontrol.paper_figures.base import FOLDER
from deltacontrol.theory import plugins
from deltacontrol.theory.errors import InputError

METHODS = FOLDER.parent / "deltas" / "methods"
_READ = ("name", "category", "law", "look", "acts_on")


@dataclass(frozen=True)
class Look:
    """Label, colour and marker: two channels, so that no reader depends on colour.

    Attributes:
        label: in legends and tables.
        color: of lines and markers.
        marker: of matplotlib.
        place: where it stands in legends, 1 being first; by default after those that have one.
    """

    label: str
    color: str
    marker: str
    place: int = 1000


@dataclass(frozen=True)
class Method:
    """A delta method as its class declares it; `deltacontrol.deltas.base.Delta` says what it is."""

    category: str
    law: str
    look: Look | None
    acts_on: str


def declared() -> dict[str, Method]:
    """All delta methods by name, users' own among them.

    Raises:
        InputError: a method says no category or law, or its look is not label, colour, marker.
    """
    added = ((values["name"], _method(values)) for values in _users())
    return plugins.merged("delta", _own(), added)


@cache
def _own() -> dict[str, Method]:
    classes: dict[str, dict[str, Any]] = {}
    for file in sorted(METHODS.rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found = dict(_literals(node))
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                classes[node.name] = {"bases": bases, "public": file.parent == METHODS, **found}

    def value(kind: str, attribute: str) -> Any:
        """The attribute of a class, or of the first of its bases that has it."""
        known = classes.get(kind, {})
        if attribute in known:
            return known[attribute]
        inherited = (value(base, attribute) for base in known.get("bases", ()))
        return next((found for found in inherited if found is not None), None)

    named = [kind for kind, known in classes.items() if known["public"] and "name" in known]
    found = ({attribute: value(kind, attribute) for attribute in _READ} for kind in named)
    return {values["name"]: _method(values) for values in found}


def _literals(kind: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for node in kind.body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and "ClassVar" in ast.unparse(node.annotation):
            targets, value = [node.target], node.value
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name) and target.id in _READ and value is not None:
                try:
                    yield target.id, ast.literal_eval(value)
                except ValueError:  # no literal: as if it were not said
                    pass


def _users() -> Iterator[dict[str, Any]]:
    """The attributes of the delta classes that users' files define; only these have torch."""
    for kind in plugins.members(object):
        values = {attribute: getattr(kind, attribute, None) for attribute in _READ}
        if hasattr(kind, "num_parameters_formula") and isinstance(values["name"], str):
            yield values


def _method(values: dict[str, Any]) -> Method:
    name, look = values["name"], values["look"]
    for attribute in ("category", "law"):
        if not isinstance(values[attribute], str):
            raise InputError(f"the delta {name} gives its {attribute} as no text; write a literal")
    try:
        made = None if look is None else Look(*look)
    except TypeError as error:
        raise InputError(
            f"the look of the delta {name} is {look!r}; expected label, colour, marker and, if it "
            'is to stand at a certain place in legends, its number: ("LoRA", "#0072B2", "o", 2)'
        ) from error
    return Method(values["category"], values["law"], made, values["acts_on"] or "")
