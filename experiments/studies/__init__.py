"""Studies: one question a folder, found by itself.

The module ``grid`` of a study defines ``experiments(preset)``, the list of its experiments for
"quick" (minutes on two cores) or "paper" (what the committed records hold). Beside it stands what
the study measures, where no other folder measures it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol, cast

from deltacontrol.experiments.runs.experiment import Experiment
from deltacontrol.theory import plugins
from deltacontrol.theory.errors import unknown

PRESETS = ("quick", "paper")


class Study(Protocol):
    """The module ``grid`` of a study."""

    __name__: str

    def experiments(self, preset: str) -> Sequence[Experiment]:
        """The experiments of a preset, in the order in which they are run."""
        ...


def available() -> dict[str, Study]:
    """All studies by name: the folders here, and users' files that define `experiments`."""
    added = (
        (Path(module.__file__ or module.__name__).stem, cast(Study, module))
        for module in plugins.modules()
        if hasattr(module, "experiments")
    )
    return plugins.merged("study", _own(), added)


@cache
def _own() -> dict[str, Study]:
    found = sorted(info.name for info in pkgutil.iter_modules(__path__) if info.ispkg)
    return {name: importlib.import_module(f"{__name__}.{name}.grid") for name in found}  # type: ignore[misc]


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
