"""The quick preset of claims: fewer cases, by constants that a module names in ``QUICK``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deltacontrol.theory.claims import Claim
from deltacontrol.theory.errors import InputError


def sizes(claim: Claim) -> dict[str, Any]:
    """The constants of the quick preset by name; empty where a claim has none."""
    return dict(getattr(_module(claim), "QUICK", {}))


def _module(claim: Claim) -> Any:
    module: Any = sys.modules[claim.predict.__module__]
    for part in claim.parts:  # `predict` may be of another module, such as `dict`
        found = getattr(getattr(part.measure, "func", part.measure), "__module__", "")
        module = sys.modules.get(found, module)
    return module


@contextmanager
def acting(claim: Claim) -> Iterator[None]:
    """The constants of the quick preset in the place of the claim's own, inside."""
    module, chosen = _module(claim), sizes(claim)
    unknown_names = [name for name in chosen if not hasattr(module, name)]
    if unknown_names:
        raise InputError(f"QUICK of claim {claim.id} names {unknown_names[0]}, which is not there")
    kept = {name: getattr(module, name) for name in chosen}
    _forget(module)
    try:
        for name, value in chosen.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)
        _forget(module)


def _forget(module: Any) -> None:
    """Empty what the functions of a module remember."""
    for value in list(vars(module).values()):
        if hasattr(value, "cache_clear") and getattr(value, "__module__", "") == module.__name__:
            value.cache_clear()
