"""The package's names and errors."""

from __future__ import annotations

import pytest

from deltacontrol import theory
from deltacontrol.theory.errors import InputError, unknown


def test_every_name_is_there() -> None:
    assert sorted(theory._MODULE_OF) == sorted(theory.__all__) == dir(theory)
    for name in theory.__all__:
        assert getattr(theory, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Adam'"):
        _ = theory.Adam


def test_unknown_names_the_nearest() -> None:
    error = unknown("delta", "lorra", ["lora", "bitfit"])
    assert isinstance(error, InputError) and isinstance(error, ValueError)
    assert str(error) == "unknown delta 'lorra'; nearest: lora; known: bitfit, lora"
    assert str(unknown("run", "zzz", [])) == "unknown run 'zzz'; known: none"
