"""Calls in Python: valid arguments of each, of which one or two are changed."""

from __future__ import annotations

import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from deltacontrol.deltas import registry
from deltacontrol.theory.solvers import registry as solver_registry
from tests.fuzz import odd, recipes_product, recipes_theory, world
from tests.fuzz.answers import Case
from tests.fuzz.recipes_theory import Recipe


@cache
def recipes() -> tuple[Recipe, ...]:
    """All, in a fixed order."""
    return (*recipes_product.recipes(), *recipes_theory.recipes())


def draw(key: str, seed: int, place: Path) -> Case:
    """The call of a key.

    Args:
        key: ``call:N``.
        seed: of all cases.
        place: where `world.build` wrote; the folder of the case is in it.
    """
    chance = random.Random(f"{seed} {key}")
    name, call, make = recipes()[chance.randrange(len(recipes()))]
    here = world.folder(place)
    for file in place.iterdir():
        if file.name not in ("case", "runs"):
            (here / file.name).symlink_to(file)
    if name in ("runs", "finetune", "claims", "estimate_dimension"):
        shutil.copytree(place / "runs", here / "runs")
    given = make(here)
    marks = []
    spoilt = recipes_product.spoil(chance, place, here, given) if chance.random() < 0.9 else ""
    if spoilt:
        marks.append(spoilt)
    number = chance.choice((0, 1)) if spoilt else chance.choice((0, 1, 1, 1, 2))
    for argument in chance.sample(sorted(given), min(number, len(given))):
        if argument == "text":
            known = registry if name.startswith("deltas") else solver_registry
            texts = {n: {k: d for k, (_, d) in known.fields(n).items()} for n in known.available()}
            given[argument] = odd.spec(chance, texts)
            marks.append(repr(given[argument]))
            continue
        if argument == "path" and isinstance(given[argument], Path) and name != "load_plugin":
            continue  # the folder of the case
        label, value = odd.values(chance, given[argument])
        if argument in odd.WORK and isinstance(value, int | float) and not value < 10:
            continue
        given[argument] = value
        marks.append(f"{argument}={label}")
    text = f"{name}({', '.join(marks)})"
    return Case(key, name, text, tuple(marks), lambda: _run(call, given, here))


def _run(call: Any, given: dict[str, Any], here: Path) -> None:
    import os

    os.chdir(here)
    result = call(**given)
    repr(result)
