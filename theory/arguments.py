"""Arguments that are held to their annotations where a user calls.

    @typed
    def stable_rank(values: Tensor) -> float: ...

    stable_rank([1.0])   # InputError: stable_rank: values is [1.0]; expected a tensor.

What is checked of an annotation: numbers (a whole one where ``int`` is asked, no NaN where
``float`` is), texts, switches, tensors (dense ones with real values: none on meta), classes,
the type of ``Literal``, callables, and the items of sequences. A number called ``seed`` is from 0
to 2^63 - 1. Annotations of other kinds are let pass, and so is what a function alone can know, such
as shapes. A whole number of another type (``8.0``, NumPy's) arrives as an int. Where arguments of
the right kind hold numbers with which nothing can be computed (a decomposition fails, a float
overflows), or do not fit each other in a way that only torch finds, that is an `InputError` as
well, with their shapes; errors of a user's own functions stay what they are.
"""

from __future__ import annotations

import collections.abc
import inspect
import math
import operator
import sys
import types
import typing
from collections.abc import Callable, Mapping
from functools import wraps
from numbers import Real
from typing import Any, TypeVar

from deltacontrol.theory.errors import InputError, raised_in

__all__ = ["typed"]

T = TypeVar("T", bound=Callable[..., Any])
LIBRARIES = ("deltacontrol", "numpy", "scipy", "torch")
SHOWN = 60  # letters of a value in a message


class _WrongError(Exception):
    """A value is not what its annotation says; the text is what is wrong with it, or empty."""


def typed(made: T) -> T:
    """Check every argument of a function, or of the constructor of a class, before it runs.

    Args:
        made: a function, or a class with an ``__init__`` of its own (a dataclass has one).

    Returns:
        The function that checks first, or the class itself.

    Example:
        >>> @typed
        ... def half(n: int) -> float:
        ...     return n / 2
        >>> half(3)
        1.5
        >>> half("3")
        Traceback (most recent call last):
        ...
        deltacontrol.theory.errors.InputError: half: n is '3'; expected a whole number.
    """
    if isinstance(made, type):
        made.__init__ = _checking(made.__init__, made.__name__)  # type: ignore[misc]
        return typing.cast("T", made)
    return typing.cast("T", _checking(made, made.__name__))


def _checking(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    signature = inspect.signature(function)
    placed = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    order = [p.name for p in signature.parameters.values() if p.kind in placed]
    hints: dict[str, Any] = {}

    @wraps(function)
    def checked(*given: Any, **by_name: Any) -> Any:
        if not hints:
            hints.update(_hints(function))
        values = list(given)
        for place, argument in enumerate(order[: len(values)]):
            if argument in hints:
                values[place] = _required(name, argument, values[place], hints[argument])
        for argument, value in by_name.items():
            if argument in hints:
                by_name[argument] = _required(name, argument, value, hints[argument])
        try:
            return function(*values, **by_name)
        except InputError:
            raise
        except (OverflowError, RuntimeError, TypeError, ValueError, LookupError) as error:
            why = str(error).partition("\n")[0]
            if isinstance(error, OverflowError) or type(error).__name__ == "_LinAlgError":
                raise InputError(
                    f"{name}: its arguments give numbers that are not finite, or matrices that "
                    f"cannot be decomposed ({why}); check them for NaN, and scale them so that no "
                    "product overflows."
                ) from error
            shapes = _tensors_of(dict(zip(order, given, strict=False)) | by_name)
            if not shapes or not raised_in(error, LIBRARIES):
                raise
            raise InputError(
                f"{name} cannot compute with what it was given ({why}): {shapes}; check that these "
                "shapes and dtypes fit each other."
            ) from error

    return checked


def _tensors_of(given: Mapping[str, Any]) -> str:
    """The arguments that are tensors, or lists of them, by shape and dtype."""
    told = []
    for name, value in given.items():
        items = value if isinstance(value, list | tuple) else [value]
        shapes = [
            f"{tuple(item.shape)} {str(item.dtype).removeprefix('torch.')}"
            for item in items
            if hasattr(item, "shape") and hasattr(item, "dtype")
        ]
        if shapes:
            told.append(f"{name} {', '.join(dict.fromkeys(shapes[:20]))}")
    return "; ".join(told)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations that can be told; one that is imported for type checkers alone cannot."""
    found: dict[str, Any] = {"return": None}
    for name, text in function.__annotations__.items():
        try:
            hint = eval(text, function.__globals__) if isinstance(text, str) else text  # type: ignore[attr-defined]
        except (NameError, TypeError, AttributeError):
            continue
        if name not in ("return", "self"):
            found[name] = hint
    return found


def _required(name: str, argument: str, value: Any, hint: Any) -> Any:
    """The value, a whole number as an int."""
    try:
        found = _checked(value, hint)
        if argument == "seed" and isinstance(found, int) and found < 0:
            raise _WrongError("from 0 to 2^63 - 1")
    except _WrongError as wrong:
        reason = f": {wrong}" if wrong.args else ""
        raise InputError(
            f"{name}: {argument} is {_shown(value)}; expected {_expected(hint)}{reason}."
        ) from None
    return found


def _checked(value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in _CHECKS:
        return _CHECKS[hint](value)
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, args)
    if origin in (collections.abc.Sequence, list, tuple):
        return _items(value, args)
    if origin is typing.Literal:
        # Another text goes on to the function, whose message names the nearest one.
        right = isinstance(value, str) or any(value is a for a in args)
    elif origin is collections.abc.Mapping or origin is dict:
        right = isinstance(value, Mapping)
    elif origin is collections.abc.Iterable:
        # A text is one of letters, which nobody means.
        right = isinstance(value, collections.abc.Iterable) and not isinstance(value, str | bytes)
    elif origin is collections.abc.Callable or hint is Callable:
        right = callable(value)
    elif origin is type:
        right = isinstance(value, type)
    else:
        right = origin is not None or not isinstance(hint, type) or _is_a(value, hint)
    if not right:
        raise _WrongError
    return value


def _one_of(value: Any, hints: tuple[Any, ...]) -> Any:
    """As one of them; where it is none, what is wrong by the first that says something."""
    reasons: tuple[Any, ...] = ()
    for hint in hints:
        try:
            return _checked(value, hint)
        except _WrongError as wrong:
            reasons = reasons or wrong.args
    raise _WrongError(*reasons)


def _items(value: Any, hints: tuple[Any, ...]) -> Any:
    if not isinstance(value, list | tuple | range) and not _is_array(value):
        raise _WrongError
    if not hints:
        return value
    repeated = len(hints) == 1 or hints[1:] == (...,)
    if not repeated and len(value) != len(hints):
        raise _WrongError(f"it has {len(value)} items, not {len(hints)}")
    found = []
    for place, item in enumerate(value):
        hint = hints[0 if repeated else place]
        try:
            found.append(_checked(item, hint))
        except _WrongError as wrong:
            reason = wrong.args or (f"not {_expected(hint)}",)
            raise _WrongError(f"item {place} is {_shown(item)}, {reason[0]}") from None
    same = not isinstance(value, list | tuple) or all(map(operator.is_, found, value))
    return value if same else typing.cast("Any", type(value))(found)


def _is_a(value: Any, kind: type) -> bool:
    if getattr(kind, "_is_protocol", False) and not getattr(kind, "_is_runtime_protocol", False):
        return True
    if isinstance(value, kind) and kind.__name__ == "Tensor" and kind.__module__ == "torch":
        _require_values(value)
    return isinstance(value, kind)


def _require_values(tensor: Any) -> None:
    torch = sys.modules["torch"]
    if tensor.is_meta:
        raise _WrongError("it lies on meta and has no values")
    if tensor.layout is not torch.strided:
        raise _WrongError("it is sparse; give its .to_dense()")
    if tensor.is_complex():
        raise _WrongError("it is complex; real values are meant")


def _int(value: Any) -> int:
    if type(value) is not int:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise _WrongError
        number = typing.cast("Any", value)
        if not math.isfinite(number) or number != int(number):
            raise _WrongError
        value = int(number)
    if not -(2**63) <= value < 2**63:
        raise _WrongError("one of at most 63 binary digits")
    return value


def _float(value: Any) -> Any:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor) and value.ndim == 0:
        _require_values(value)
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        raise _WrongError
    try:
        number = float(value)
    except OverflowError:
        raise _WrongError("it is larger than a float can be") from None
    if math.isnan(number):
        raise _WrongError
    return value


def _bool(value: Any) -> Any:
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise _WrongError
    return value


def _none(value: Any) -> None:
    if value is not None:
        raise _WrongError


_CHECKS: dict[Any, Callable[[Any], Any]] = {
    int: _int,
    float: _float,
    bool: _bool,
    type(None): _none,
    None: _none,
    Any: lambda value: value,
    object: lambda value: value,
}


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and getattr(value, "ndim", 0) >= 1


def _shown(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        kind = "a tensor" if type(value).__module__.startswith("torch") else "an array"
        return f"{kind} of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return "a whole number of very many digits"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({type(value).__name__})"


def _expected(hint: Any) -> str:
    """An annotation in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text",
             type(None): "None"}  # fmt: skip
    if hint in names:
        return names[hint]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(a) for a in args)
    if origin is typing.Literal:
        return " or ".join(map(repr, args))
    if origin in (collections.abc.Sequence, collections.abc.Iterable, list, tuple):
        return f"a list or tuple of {_plural(args[0])}" if args else "a list or tuple"
    if origin is collections.abc.Mapping or origin is dict:
        return "a dictionary"
    if origin is collections.abc.Callable:
        return "a function"
    name = getattr(hint, "__name__", str(hint))
    article = "an" if name[:1] in "AEIOU" else "a"
    return "a tensor" if name == "Tensor" else f"{article} {name}"


def _plural(hint: Any) -> str:
    names = {int: "whole numbers", float: "numbers", str: "texts", bool: "switches"}
    if hint in names:
        return names[hint]
    single = _expected(hint)
    return (
        single.replace("a tensor", "tensors") if single == "a tensor" else f"items, each {single}"
    )
