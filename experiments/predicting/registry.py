"""Predictors by name: found in the folder `predictors`, written as ``probe:steps=30``.

Users' own predictors are found as `deltacontrol.theory.plugins` says.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache

from deltacontrol.experiments.predicting import predictors
from deltacontrol.experiments.predicting.base import Predictor
from deltacontrol.theory import parsing, plugins
from deltacontrol.theory.errors import unknown

__all__ = ["available", "predictor_of"]


def available() -> dict[str, type[Predictor]]:
    """All predictors by name, in alphabetical order; users' own among them."""
    added = ((kind.name, kind) for kind in plugins.members(Predictor))
    return plugins.merged("predictor", _own(), added)


@cache
def _own() -> dict[str, type[Predictor]]:
    found: dict[str, type[Predictor]] = {}
    for info in pkgutil.iter_modules(predictors.__path__):
        module = importlib.import_module(f"{predictors.__name__}.{info.name}")
        for value in vars(module).values():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and issubclass(value, Predictor) and not inspect.isabstract(value):
                found[value.name] = value
    return found


def predictor_of(given: Predictor | str) -> Predictor:
    """The predictor of a text, or itself.

    Raises:
        InputError: an unknown name or option, or a value that is refused.

    Example:
        >>> predictor_of("probe:steps=10")
        Probe(steps=10)
    """
    if isinstance(given, Predictor):
        return given
    name, values = parsing.split("predictor", given, lambda n: parsing.fields_of(_class(n)))
    kind = _class(name)
    return kind(**parsing.converted("predictor", name, values, parsing.fields_of(kind)))


def _class(name: str) -> type[Predictor]:
    if name not in available():
        raise unknown("predictor", name, available())
    return available()[name]
