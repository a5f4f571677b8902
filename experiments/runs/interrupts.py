"""Ctrl-C and SIGTERM that wait for a step to end, so that what was computed can be saved."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from deltacontrol.theory.errors import InputError

LIMIT_MINUTES = 24.0 * 60.0  # that one run may take, unless somebody says otherwise


def require_minutes(limit: float) -> None:
    """Refuse a time limit that is none.

    Raises:
        InputError: unless it is above 0 and finite.
    """
    if not 0 < limit < math.inf:
        raise InputError(
            f"limit_minutes is {limit}; expected a number of minutes above 0, such as "
            f"{LIMIT_MINUTES:g}"
        )


@dataclass
class Interrupts:
    """Whether an interrupt was asked for since `deferred` began."""

    asked: bool = False


@contextmanager
def deferred() -> Iterator[Interrupts]:
    """Note the first Ctrl-C or SIGTERM instead of stopping; the second one stops at once.

    Signals that the process ignores stay ignored. Outside of the main thread nothing changes.
    """
    found = Interrupts()

    def note(number: int, frame: FrameType | None) -> None:
        if found.asked:
            raise KeyboardInterrupt
        found.asked = True
        print("interrupted: this step ends and is saved; again to stop at once", file=sys.stderr)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, note)
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
