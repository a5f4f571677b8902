"""Every field of every method refuses a value of another type, before any model is at hand."""

import math
import typing
from typing import Any

import numpy as np
import pytest

from deltacontrol.deltas import LoRA, registry
from deltacontrol.theory.errors import InputError

WRONG: dict[type, tuple[Any, ...]] = {
    int: ("8", 2.5, True, math.nan, math.inf, [8]),
    float: ("0.5", True, math.nan, math.inf, -math.inf, (0.5,)),
    bool: ("false", 0, None),
    str: (3, None, ("relu",)),
}
EXPECTED = {int: "integer", float: "finite number", bool: "True or False", str: "text"}


def scalar(kind: Any) -> type | None:
    """The type of a field, or of the value that may be None; none of a list or a choice."""
    options = [a for a in typing.get_args(kind) if a is not type(None)] or [kind]
    return options[0] if options[0] in WRONG and len(options) == 1 else None


def test_every_field_of_every_method_refuses_values_of_another_type() -> None:
    seen = 0
    for name, method in registry.available().items():
        example = method.example()
        own = {f: getattr(example, f) for f in registry.fields(name)}
        for field, (kind, _) in registry.fields(name).items():
            plain = scalar(kind)
            if plain is None:
                continue
            for value in WRONG[plain]:
                if value is None and type(None) in typing.get_args(kind):
                    continue
                with pytest.raises(InputError) as caught:
                    method(**{**own, field: value})
                message = str(caught.value)
                for part in (name, field, repr(value), EXPECTED[plain]):
                    assert part in message, (name, field, value, message)
                seen += 1
    assert seen > 300


def test_every_list_of_every_method_refuses_items_of_another_type() -> None:
    for name, method in registry.available().items():
        example = method.example()
        own = {f: getattr(example, f) for f in registry.fields(name)}
        for field in own:
            if field not in ("layers", "sites", "input_sites", "prompts"):
                continue
            wrong = ("0", ("0",), (0.5,), 0) if field == "layers" else ("mlp.down", (1,), 1)
            for value in wrong:
                with pytest.raises(InputError, match=f"{name}: {field} is .*; expected a tuple of"):
                    method(**{**own, field: value})


def test_whole_numbers_of_any_kind_are_integers() -> None:
    for rank in (8.0, np.int64(8), np.float32(8)):
        delta = LoRA(rank=rank, alpha=np.float32(0.5), layers=[np.int64(1)])  # type: ignore[arg-type]
        assert delta == LoRA(rank=8, alpha=0.5, layers=(1,)) and hash(delta)
        assert type(delta.rank) is int and type(delta.alpha) is float
    with pytest.raises(InputError, match="lora: rank is 0; expected at least 1"):
        LoRA(rank=0)
    with pytest.raises(InputError, match="lora: rank is 2.5; expected an integer"):
        LoRA(rank=2.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"sites is 'query'; .*, such as \('query',\)\."):
        LoRA(sites="query")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"layers is 1; .* or None, such as \(1,\)\."):
        LoRA(layers=1)  # type: ignore[arg-type]
