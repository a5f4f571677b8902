"""Deltas by name: found in ``deltas/methods``, written as ``lora:rank=16,alpha=32``."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from deltacontrol.deltas.base import Delta
from deltacontrol.theory import parsing, plugins
from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError, unknown


def available() -> dict[str, type[Delta]]:
    """All delta methods by name, in alphabetical order; users' own among them."""
    return plugins.merged("delta", _own(), ((k.name, k) for k in plugins.members(Delta)))


@cache
def _own() -> dict[str, type[Delta]]:
    methods = importlib.import_module("deltacontrol.deltas.methods")
    found = {kind.name: kind for kind in plugins.defined(methods, Delta) if hasattr(kind, "name")}
    return dict(sorted(found.items()))


def _class(name: str) -> type[Delta]:
    if not isinstance(name, str) or name not in available():
        raise unknown("delta", name, available())
    return available()[name]


def users_own(config: Any) -> set[type[Delta]]:
    """Users' own classes that are named in a configuration, also in a text such as `of=mine`."""
    own = {kind.name: kind for kind in plugins.members(Delta)}
    return {own[name] for name in _words(config) if name in own}


def _words(config: Any) -> Iterator[str]:
    if isinstance(config, str):
        yield from re.findall(r"[\w-]+", config)
    elif isinstance(config, Mapping):
        for value in config.values():
            yield from _words(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _words(value)


def fields(name: str) -> dict[str, tuple[Any, Any]]:
    """Field names of a delta with their type and default."""
    return parsing.fields_of(_class(name))


def delta_of(given: Delta | str | Mapping[str, Any]) -> Delta:
    """The delta of a text, as `parse`, of a dictionary, as `from_dict`, or itself.

    Raises:
        InputError: as `parse` and `from_dict`.
    """
    if isinstance(given, str):
        return parse(given)
    return given if isinstance(given, Delta) else from_dict(given)


@typed
def from_dict(config: Mapping[str, Any]) -> Delta:
    """The delta of a plain dictionary ``{"name": ..., field: value}``.

    Raises:
        InputError: unknown name, unknown field, or a value of the wrong type.
    """
    values = dict(config)
    name = values.pop("name", None)
    if name is None:
        raise InputError(f"a delta needs a name; got {dict(config)}.")
    return _class(name)(**parsing.converted("delta", name, values, fields(name)))


def completed(config: Any) -> Any:
    """JSON values with every delta in them as `Delta.to_dict` writes it today.

    A record from before a delta had one of its fields lacks it; the field's default is what the
    record was made with.
    """
    if isinstance(config, Mapping):
        if config.get("name") in available() and config.keys() <= {"name", *fields(config["name"])}:
            return from_dict(config).to_dict()
        return {key: completed(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [completed(item) for item in config]
    return config


@typed
def parse(text: str) -> Delta:
    """The delta of a text such as ``lora:rank=16,sites=attention.query+mlp.up``.

    Items of a list are joined by ``+``.

    Raises:
        InputError: unknown name or field, or a value of the wrong type.
    """
    name, values = parsing.split("delta", text, fields)
    return from_dict({"name": name, **values})
