"""Objects as texts such as ``lora:rank=16,sites=attention.query+mlp.up``, field by field.

A registry knows its classes by name; what is common to all of them is here: a text is cut into a
name and its fields, and each value becomes what the field's type says, or is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from numbers import Real
from typing import Any, TypeAlias, TypeVar

from deltacontrol.theory.errors import InputError, unknown

__all__ = ["Fields", "built", "checked", "converted", "fields_of", "split"]

T = TypeVar("T")
Fields: TypeAlias = Mapping[str, tuple[Any, Any]]
"""Names of fields with their type and default (`dataclasses.MISSING` where there is none)."""


def fields_of(kind: type) -> dict[str, tuple[Any, Any]]:
    """The fields of a dataclass with their types and defaults."""
    hints = _hints(kind)
    found = {}
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]
        make = f.default_factory
        found[f.name] = (hints[f.name], f.default if make is dataclasses.MISSING else make())
    return found


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def split(what: str, text: str, fields: Callable[[str], Fields]) -> tuple[str, dict[str, str]]:
    """Name and fields of a text, the values as texts.

    Args:
        what: what is written, such as "delta", for the messages.
        text: ``name`` or ``name:field=value,field=value``.
        fields: the fields of a name; it refuses names that it does not know.

    Raises:
        InputError: an unknown name or field, one given twice, or an item that is no FIELD=VALUE.
    """
    name, _, rest = text.partition(":")
    known = fields(name)
    values: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(
                f"{item!r} in the {what} {text!r} is not FIELD=VALUE; the fields of {name} are "
                f"{', '.join(known) or 'none'}."
            )
        key = key.strip()
        if key not in known:
            raise unknown(f"field of the {what} {name}", key, known)
        if key in values:
            raise InputError(f"{key} is given twice in the {what} {text!r}.")
        values[key] = value.strip()
    return name, values


def built(what: str, text: str, kinds: Mapping[str, type[T]]) -> T:
    """The dataclass of a text ``name:field=value,field=value``.

    Args:
        what: what is written, for the messages.
        text: the name of a class, and fields.
        kinds: the classes by name.

    Raises:
        InputError: it is no text, names no class, or as `split` and `converted`.
    """
    if not isinstance(text, str):
        raise InputError(f"the {what} is {text!r}; expected a text such as {min(kinds)}")

    def known(name: str) -> dict[str, tuple[Any, Any]]:
        if name not in kinds:
            raise unknown(what, name, kinds)
        return fields_of(kinds[name])

    name, values = split(what, text, known)
    return kinds[name](**converted(what, name, values, known(name)))


def converted(what: str, name: str, values: Mapping[str, Any], known: Fields) -> dict[str, Any]:
    """The values as the types of their fields.

    Raises:
        InputError: an unknown field, a value of another type, or a field without a default that
            is not given.
    """
    for key in values:
        if key not in known:
            raise unknown(f"field of the {what} {name}", key, known)
    found = {key: _convert(what, name, key, v, known[key][0]) for key, v in values.items()}
    for key, (kind, default) in known.items():
        if default is dataclasses.MISSING and key not in found:
            raise InputError(
                f"the {what} {name} needs {key}, {_describe(kind)}; write it behind the name: "
                f"{name}:{key}=…"
            )
    return found


def _convert(what: str, name: str, key: str, value: Any, kind: Any) -> Any:
    """``value`` as the type of the field, or an error that says what was expected."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value not in args:
            raise unknown(f"{key} of the {what} {name}", str(value), map(str, args))
        return value
    error = InputError(f"{name}: {key}={value!r} is not {_describe(kind)}.")
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            if type(None) in args:
                return None
            raise error
        return _convert(what, name, key, value, next(a for a in args if a is not type(None)))
    if origin is tuple:
        items = value.split("+") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            items = [items]
        return tuple(_convert(what, name, key, item, args[0]) for item in items)
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise error
    if kind is str and not isinstance(value, str):
        raise error
    if isinstance(value, bool) or (kind is int and isinstance(value, float) and value % 1):
        raise error
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise error from None


def checked(name: str, key: str, value: Any, kind: Any) -> Any:
    """A value that a program gives, which must be of the field's type already.

    Texts and switches do not count as numbers here, as `converted` reads them from a command line.

    Args:
        name: what has the field, for the message.
        key: the field.
        value: given for it.
        kind: its type; a type that is none of a text's is let pass.

    Returns:
        The value; a whole number as an int, a list as a tuple.

    Raises:
        InputError: the value is of another type, or no finite number where one is expected.

    Example:
        >>> checked("lora", "rank", 8.0, int)
        8
        >>> checked("lora", "rank", "8", int)
        Traceback (most recent call last):
        ...
        deltacontrol.theory.errors.InputError: lora: rank is '8'; expected an integer.
    """
    try:
        return _of_kind(value, kind)
    except _OtherKindError:
        expected = _describe_value(kind)
        if "tuple" in expected and isinstance(value, str | int):
            expected += f", such as ({value!r},)"
        raise InputError(f"{name}: {key} is {value!r}; expected {expected}.") from None


class _OtherKindError(Exception):
    """A value is of another type than its field."""


def _of_kind(value: Any, kind: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        others = [a for a in args if a is not type(None)]
        if len(others) > 1 or (value is None and len(others) < len(args)):
            return value
        return _of_kind(value, others[0])
    if origin is tuple and args[1:] == (...,):
        if not isinstance(value, list | tuple | range):
            raise _OtherKindError
        return tuple(_of_kind(item, args[0]) for item in value)
    if kind in (int, float):
        if not isinstance(value, Real) or isinstance(value, bool) or not _is_finite(value):
            raise _OtherKindError
        number: Any = value  # an int, a float, or one of NumPy's
        if kind is float:
            return number if isinstance(number, int | float) else float(number)
        if number != int(number):
            raise _OtherKindError
        return int(number)
    if kind in (bool, str) and not isinstance(value, kind):
        raise _OtherKindError
    return value


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _describe_value(kind: Any) -> str:
    """A type in words, as a program gives it."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        one = {int: "integers", float: "finite numbers", str: "texts"}.get(args[0], "values")
        return f"a tuple of {one}"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join("None" if a is type(None) else _describe_value(a) for a in args)
    return {float: "a finite number", bool: "True or False"}.get(kind) or _describe(kind)


def _describe(kind: Any) -> str:
    args = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return f"a list of {args[0].__name__} joined by '+'"
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, args))
    if args:
        return " or ".join("none" if a is type(None) else _describe(a) for a in args)
    known = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    return known.get(kind, f"a {getattr(kind, '__name__', kind)}")
