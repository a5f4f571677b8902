"""The support matrix of the README, measured: every method is attached to every architecture.

    python -m tests.deltas.support_matrix

rewrites it. A refusal keeps the reason that the README gives already, where the error still says
so; the reason of a new one is the first clause of its error, which may be shortened in the README.
"""

from __future__ import annotations

import re

from deltacontrol.deltas import attach
from deltacontrol.theory.errors import InputError
from tests.deltas import support_table
from tests.deltas.zoo import FAMILIES, METHODS, REFUSED, build


def refusal(family: str, method: str, known: set[str]) -> str | None:
    """Why the architecture cannot take the method; None where it can.

    Args:
        family: the architecture.
        method: the method.
        known: reasons to be kept, where the error says so.
    """
    model = build(family)
    try:
        attach(model, METHODS[method][0]).detach()
    except InputError as error:
        message = str(error)
        found = sorted((reason for reason in known if reason in message), key=len)
        return found[-1] if found else short(message, type(model).__name__, method)
    return None


def short(message: str, model: str, method: str) -> str:
    """The first clause of an error, without the names of the model and of the method."""
    text = message.removeprefix(f"{method}: ").removeprefix(f"{model} ")
    return re.split(r", |; |: |\. |\.$", text)[0]


def measure() -> dict[tuple[str, str], str]:
    """The reason of every refused cell."""
    known = set(REFUSED.values())
    cells = [(f, m) for f in FAMILIES for m in METHODS]
    reasons = {cell: refusal(*cell, known) for cell in cells}
    return {cell: reason for cell, reason in reasons.items() if reason is not None}


if __name__ == "__main__":
    support_table.write(measure())
