"""All cases of a seed, and the table of their answers."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from tests.fuzz import calls, commands, world
from tests.fuzz.answers import SORTS, Answer, Case, answers


def keys(num_commands: int, num_calls: int, first: int = 0) -> list[str]:
    """Commands and calls in turn."""
    ordered = itertools.zip_longest(
        (f"command:{first + i}" for i in range(num_commands)),
        (f"call:{first + i}" for i in range(num_calls)),
    )
    return [key for pair in ordered for key in pair if key is not None]


def run(
    wanted: Sequence[str], seed: int, place: Path, seconds: float, only: str = ""
) -> list[Answer]:
    """The answers to cases, until the seconds are over.

    Args:
        wanted: keys of the cases.
        seed: of all cases.
        place: a folder for files; what `world.build` needs is built where it is not there.
        seconds: no case begins after these; the building does not count.
        only: run cases alone whose name begins like this.
    """
    torch.set_num_threads(1)
    here = Path.cwd()
    if not (place / "runs").is_dir():
        place.mkdir(parents=True, exist_ok=True)
        os.chdir(place)
        world.build(place)
    os.chdir(here)
    world.warm_up()

    def draw(key: str) -> Case:
        kind = commands if key.startswith("command:") else calls
        case = kind.draw(key, seed, place)
        if not case.name.startswith(only):
            return Case(key, "", "", (), lambda: 0)
        return case

    found, began = [], time.monotonic()
    for one in answers(wanted, draw):
        if one.name:
            found.append(one)
        if time.monotonic() - began > seconds:
            break
    return found


def text(found: Iterable[Answer], seed: int) -> str:
    """Counts by command and call, and each traceback and hang with what gives it again."""
    found = list(found)
    table = Counter((a.key.partition(":")[0], a.sort) for a in found)
    names = sorted({a.name for a in found})
    by_name = Counter((a.name, a.sort) for a in found)
    lines = [f"{'':28}" + "".join(f"{sort:>11}" for sort in SORTS)]
    for kind in ("command", "call"):
        lines.append(f"{kind + 's':28}" + "".join(f"{table[kind, s]:11d}" for s in SORTS))
    lines.append("")
    for name in names:
        lines.append(f"{name[:28]:28}" + "".join(f"{by_name[name, s]:11d}" for s in SORTS))
    for one in found:
        if one.sort in ("traceback", "hang"):
            again = f"python -m tests.fuzz --seed {seed} --case {one.key}"
            lines += ["", f"{one.sort}: {one.text}", f"  again: {again}"]
            lines += [f"  | {line}" for line in one.detail.splitlines()]
    return "\n".join(lines)


def write(found: Iterable[Answer], sort: str, path: Path) -> None:
    """One line of JSON a case that was answered so."""
    lines = [one.line() for one in found if one.sort == sort]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
