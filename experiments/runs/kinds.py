"""Kinds of experiments by name, for what only a record's kind tells of.

The modules of `deltacontrol.experiments` are not imported to be searched: their texts say which of
them defines a kind, and that one is imported. Users' own kinds are found as
`deltacontrol.theory.plugins` says.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

from deltacontrol import experiments
from deltacontrol.experiments.runs.experiment import Experiment
from deltacontrol.theory import plugins
from deltacontrol.theory.errors import unknown

__all__ = ["experiment_of", "places"]

_KIND = re.compile(r'^    kind: ClassVar(?:\[str\])? = "([^"]+)"$', re.MULTILINE)


@cache
def places() -> dict[str, str]:
    """The module of each kind of this project."""
    root = Path(experiments.__path__[0])
    found = {}
    for file in sorted(root.rglob("*.py")):
        module = ".".join((experiments.__name__, *file.relative_to(root).with_suffix("").parts))
        found |= dict.fromkeys(_KIND.findall(file.read_text(encoding="utf-8")), module)
    return found


def experiment_of(kind: str) -> type[Experiment]:
    """The class of a kind.

    Raises:
        InputError: no such kind is known, for example because a user's file is not loaded.
    """
    own = [k for k in plugins.members(Experiment) if vars(k).get("kind") == kind]
    if own:
        return own[0]
    if kind not in places():
        raise unknown("kind of run", kind, places())
    module = importlib.import_module(places()[kind])
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Experiment)
        and vars(value).get("kind") == kind
    )
