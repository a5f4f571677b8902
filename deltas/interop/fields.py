"""The fields that an adapter_config.json may hold, and which of their values we reproduce.

peft drops a field that it does not know, with a warning. A field decides what the weights mean, so
here every field must be known, be of the right kind and have a value whose effect is reproduced.
Only a field of another version of peft that is switched off (null, false or empty) is passed over,
and said.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deltacontrol.theory.errors import InputError


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(item) for item in value.values())


_KINDS: dict[str, Callable[[Any], bool]] = {
    "true or false": lambda v: isinstance(v, bool),
    "an integer": _is_integer,
    "a positive integer": lambda v: _is_integer(v) and v > 0,
    "a number": _is_number,
    "a positive number": lambda v: _is_number(v) and v > 0,
    "a text": lambda v: isinstance(v, str),
    "a list of names": _are_texts,
    "a name or a list of names": lambda v: isinstance(v, str) or _are_texts(v),
    "an integer or a list of integers": lambda v: (
        _is_integer(v) or (isinstance(v, list) and all(map(_is_integer, v)))
    ),
    "a list of integers": lambda v: isinstance(v, list) and all(map(_is_integer, v)),
    "an object of numbers": _are_numbers,
    "an object of positive integers": lambda v: (
        isinstance(v, dict) and all(_is_integer(item) and item > 0 for item in v.values())
    ),
    "an object of lists of true and false": lambda v: (
        isinstance(v, dict) and all(isinstance(row, list) for row in v.values())
    ),
    "anything": lambda _: True,
}


@dataclass(frozen=True)
class Field:
    """One field of a configuration.

    Attributes:
        default: its value where it is left out.
        kind: what it must be; None (null) is allowed too where the default is nothing.
        only: the values whose effect is reproduced; None means all.
        why: what the other values do.
    """

    default: Any
    kind: str = "anything"
    only: tuple[Any, ...] | None = None
    why: str = ""

    def problem(self, name: str, value: Any) -> str | None:
        """What is wrong with a value, if anything."""
        if self.only is not None:
            if any(value == known and type(value) is type(known) for known in self.only):
                return None
            known = " or ".join(map(repr, self.only))
            return f"{name} is {value!r}, only {known} is supported ({self.why})"
        if (value is None and self.default in (None, {})) or _KINDS[self.kind](value):
            return None
        return f"{name} is {value!r}, expected {self.kind}"


Fields = Mapping[str, Field]

COMMON: Fields = {
    "peft_type": Field(None, "a text"),
    "task_type": Field(None, "a text"),
    "auto_mapping": Field(None),
    "base_model_name_or_path": Field(None, "a text"),
    "revision": Field(None, "a text"),
    "inference_mode": Field(False, "true or false"),
    "peft_version": Field(None, "a text"),
    "modules_to_save": Field(None, "a list of names"),
}
TARGETS: Fields = {
    "target_modules": Field(None, "a name or a list of names"),
    "exclude_modules": Field(None, "a name or a list of names"),
}
LAYERS: Fields = {
    "layers_to_transform": Field(None, "an integer or a list of integers"),
    "layers_pattern": Field(None, "a name or a list of names"),
}
PATTERNS: Fields = {
    "rank_pattern": Field({}, "an object of positive integers"),
    "alpha_pattern": Field({}, "an object of numbers"),
}
PROMPT: Fields = {
    "num_virtual_tokens": Field(0, "a positive integer"),
    "token_dim": Field(None, "a positive integer"),
    "num_transformer_submodules": Field(
        None, only=(None, 1), why="rows that a decoder gets as well are not the encoder's prompt"
    ),
    "num_attention_heads": Field(None, "a positive integer"),
    "num_layers": Field(None, "a positive integer"),
}


def _is_off(value: Any) -> bool:
    """Null, false or nothing; 0 may be a setting."""
    return value is None or value is False or (isinstance(value, dict | list) and not value)


def checked(fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with all defaults filled in.

    Raises:
        InputError: unknown fields that are not switched off, or values that are wrong or not
            supported; all are listed.
    """
    unknown = sorted(config.keys() - fields.keys())
    idle = [name for name in unknown if _is_off(config[name])]
    if idle:
        warnings.warn(
            f"this {config.get('peft_type')} adapter has fields of another version of peft, which "
            f"are switched off and change nothing: {', '.join(idle)}",
            stacklevel=3,
        )
    unknown = [name for name in unknown if name not in idle]
    problems = [f"unknown field {name} = {config[name]!r}" for name in unknown]
    for name, field in fields.items():
        if name in config and (problem := field.problem(name, config[name])):
            problems.append(problem)
    if problems:
        raise InputError(
            f"this {config.get('peft_type')} adapter cannot be reproduced: {'; '.join(problems)}. "
            "Correct adapter_config.json, or save the adapter with peft without these fields."
        )
    return {name: config.get(name, field.default) for name, field in fields.items()}
