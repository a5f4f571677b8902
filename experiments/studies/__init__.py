"""Studies: which experiments a figure needs. One study a file, found by itself.

A study defines ``experiments(preset)``, the list of its experiments for "quick" (minutes on two
cores) or "paper" (what the committed records hold).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from typing import Protocol

from deltacontrol.experiments.runs.experiment import Experiment
from deltacontrol.theory.errors import unknown

PRESETS = ("quick", "paper")


class Study(Protocol):
    """A module of this package."""

    __name__: str

    def experiments(self, preset: str) -> Sequence[Experiment]:
        """The experiments of a preset, in the order in which they are run."""
        ...


@cache
def available() -> dict[str, Study]:
    """All studies by name."""
    found = (info.name for info in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in sorted(found)}  # type: ignore[misc]


def experiments(study: str, preset: str) -> Sequence[Experiment]:
    """The experiments of a study.

    Raises:
        InputError: no such study or preset.
    """
    if study not in available():
        raise unknown("study", study, available())
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    return available()[study].experiments(preset)
