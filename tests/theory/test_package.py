"""The package's names, errors and examples."""

from __future__ import annotations

import doctest
import importlib

import pytest

from deltacontrol import theory
from deltacontrol.theory.errors import InputError, unknown


def test_every_name_is_there() -> None:
    assert sorted(theory._MODULE_OF) == sorted(theory.__all__) == dir(theory)
    for name in theory.__all__:
        assert getattr(theory, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Adam'"):
        _ = theory.Adam


@pytest.mark.parametrize(
    "module",
    [
        "deltacontrol.theory.errors",
        "deltacontrol.theory.claims",
        "deltacontrol.theory.solvers.solve",
    ],
)
def test_examples(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0 and results.failed == 0


def test_unknown_names_the_nearest() -> None:
    error = unknown("delta", "lorra", ["lora", "bitfit"])
    assert isinstance(error, InputError) and isinstance(error, ValueError)
    assert str(error) == "unknown delta 'lorra'; nearest: lora; known: bitfit, lora"
    assert str(unknown("run", "zzz", [])) == "unknown run 'zzz'; known: none"
