"""Deltas by name: found in ``deltas/methods``, written as ``lora:rank=16,alpha=32``."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from deltacontrol.deltas.base import Delta
from deltacontrol.theory import plugins
from deltacontrol.theory.errors import InputError, unknown


def available() -> dict[str, type[Delta]]:
    """All delta methods by name, in alphabetical order; users' own among them."""
    return plugins.merged("delta", _own(), ((k.name, k) for k in plugins.members(Delta)))


@cache
def _own() -> dict[str, type[Delta]]:
    found: dict[str, type[Delta]] = {}
    methods = importlib.import_module("deltacontrol.deltas.methods")
    for info in pkgutil.iter_modules(methods.__path__):
        if info.ispkg:  # what several methods share
            continue
        module = importlib.import_module(f"{methods.__name__}.{info.name}")
        for value in vars(module).values():
            concrete = isinstance(value, type) and issubclass(value, Delta) and value is not Delta
            if concrete and value.__module__ == module.__name__ and hasattr(value, "name"):
                found[value.name] = value
    return dict(sorted(found.items()))


def _class(name: str) -> type[Delta]:
    if name not in available():
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
    kind = _class(name)
    hints = typing.get_type_hints(kind)
    return {f.name: (hints[f.name], f.default) for f in dataclasses.fields(kind)}  # type: ignore[arg-type]


def from_dict(config: Mapping[str, Any]) -> Delta:
    """The delta of a plain dictionary ``{"name": ..., field: value}``.

    Raises:
        InputError: unknown name, unknown field, or a value of the wrong type.
    """
    values = dict(config)
    name = values.pop("name", None)
    if name is None:
        raise InputError(f"a delta needs a name; got {dict(config)}.")
    known = fields(name)
    for key in values:
        if key not in known:
            raise unknown(f"field of the delta {name}", key, known)
    return _class(name)(**{k: _convert(name, k, v, known[k][0]) for k, v in values.items()})


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


def parse(text: str) -> Delta:
    """The delta of a text such as ``lora:rank=16,sites=attention.query+mlp.up``.

    Items of a list are joined by ``+``.

    Raises:
        InputError: unknown name or field, or a value of the wrong type.
    """
    name, _, rest = text.partition(":")
    values: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(
                f"{item!r} in the delta {text!r} is not FIELD=VALUE; the fields of {name} are "
                f"{', '.join(fields(name))}."
            )
        key = key.strip()
        if key not in fields(name):
            raise unknown(f"field of the delta {name}", key, fields(name))
        if key in values:
            raise InputError(f"{key} is given twice in the delta {text!r}.")
        values[key] = value.strip()
    return from_dict({"name": name, **values})


def _convert(delta: str, key: str, value: Any, kind: Any) -> Any:
    """``value`` as the type of the field, or an error that says what was expected."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value not in args:
            raise unknown(f"{key} of the delta {delta}", str(value), map(str, args))
        return value
    error = InputError(f"{delta}: {key}={value!r} is not {_describe(kind)}.")
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            if type(None) in args:
                return None
            raise error
        return _convert(delta, key, value, next(a for a in args if a is not type(None)))
    if origin is tuple:
        items = value.split("+") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            items = [items]
        return tuple(_convert(delta, key, item, args[0]) for item in items)
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise error
    if isinstance(value, bool) or (kind is int and isinstance(value, float) and value % 1):
        raise error
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise error from None


def _describe(kind: Any) -> str:
    args = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return f"a list of {args[0].__name__} joined by '+'"
    if args:
        return " or ".join("none" if a is type(None) else _describe(a) for a in args)
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}[kind]
