"""Predictors by name: found in the folder `predictors`, written as ``probe:steps=30``.

Users' own predictors are found as `deltacontrol.theory.plugins` says.
"""

from __future__ import annotations

from functools import cache

from deltacontrol.experiments.predicting import predictors
from deltacontrol.experiments.predicting.base import Predictor
from deltacontrol.theory import parsing, plugins

__all__ = ["available", "predictor_of"]


def available() -> dict[str, type[Predictor]]:
    """All predictors by name, in alphabetical order; users' own among them."""
    added = ((kind.name, kind) for kind in plugins.members(Predictor))
    return plugins.merged("predictor", _own(), added)


@cache
def _own() -> dict[str, type[Predictor]]:
    return {kind.name: kind for kind in plugins.defined(predictors, Predictor)}


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
    return parsing.built("predictor", given, available())
