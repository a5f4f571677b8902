"""What ends a run before its end: Ctrl-C, SIGTERM and a time limit, which all wait for a step.

A training or a solve works in `deferred`: the first signal, or the limit, lets its present step
end, so that what was computed is saved. `limited` sets the limit of a run.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from deltacontrol.theory.errors import InputError

LIMIT_MINUTES = 24.0 * 60.0  # that one run may take, unless somebody says otherwise
GRACE_SECONDS = 60.0  # that a step may go on behind the limit
_LONGEST_SECONDS = 1e8  # that a timer of the system takes


def require_minutes(limit: float) -> None:
    """Refuse a time limit that is none.

    Raises:
        InputError: unless it is above 0 and finite.
    """
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
        raise InputError(
            f"limit_minutes is {limit!r}; expected a number of minutes above 0, such as "
            f"{LIMIT_MINUTES:g}"
        )


@dataclass(eq=False)
class Limit:
    """The time limit of a run.

    Attributes:
        minutes: how long the run may take.
        ends: when it is over, on the clock of `time.monotonic`.
        stepping: whether `deferred` will look at it when the present step ends.
    """

    minutes: float
    ends: float
    stepping: bool = False

    @property
    def over(self) -> bool:
        """Whether the run has had its time."""
        return time.monotonic() >= self.ends


class LimitError(BaseException):
    """A run reached its limit; no handler of ordinary errors takes it for one.

    Attributes:
        limit: which one, where runs are made of runs.
        saved: what of the run is saved, in a few words, or empty.
    """

    def __init__(self, limit: Limit, saved: str = "") -> None:
        super().__init__(saved)
        self.limit, self.saved = limit, saved

    @property
    def reason(self) -> str:
        """Why the run ended, and how it goes on."""
        saved = f"; {self.saved}" if self.saved else ""
        return (
            f"it was stopped at its limit of {self.limit.minutes:g} minutes{saved}; if it was not "
            "hanging, give it a larger --limit-minutes: it goes on from its checkpoint"
        )


_LIMIT: ContextVar[Limit | None] = ContextVar("limit", default=None)


@contextmanager
def limited(minutes: float) -> Iterator[Limit]:
    """A time limit for what runs inside; inside of another limit the earlier end counts.

    Work inside of `deferred` ends its step, for `GRACE_SECONDS` at most; other work stops at once.
    Outside of the main thread only `deferred` looks at the limit.

    Raises:
        LimitError: from the work inside.
    """
    outer = _LIMIT.get()
    limit = Limit(minutes, time.monotonic() + 60.0 * minutes)
    first = limit if outer is None or limit.ends < outer.ends else outer
    token = _LIMIT.set(first)
    before = _alarm(first)
    try:
        yield limit
    finally:
        _LIMIT.reset(token)
        if before is not None:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
            if outer is not None:
                _alarm(outer)


def _alarm(limit: Limit) -> Any:
    """Have the system call at the end of a limit; the handler of before, None where it cannot."""
    own = threading.current_thread() is threading.main_thread()
    if not own or not hasattr(signal, "setitimer"):
        return None

    def ring(_number: int, _frame: FrameType | None) -> None:
        late = time.monotonic() >= limit.ends + GRACE_SECONDS
        if limit.stepping and not late:
            return
        if not limit.over:
            return
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        raise LimitError(limit)

    before = signal.signal(signal.SIGALRM, ring)
    # It rings on, for a step that does not end.
    seconds = min(max(limit.ends - time.monotonic(), 1e-3), _LONGEST_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    return before if before is not None else signal.SIG_DFL


@dataclass
class Interrupts:
    """Whether to stop was asked for since `deferred` began.

    Attributes:
        signalled: a signal came.
        limit: the limit of the run, or None.
    """

    signalled: bool = False
    limit: Limit | None = None

    @property
    def asked(self) -> bool:
        """Whether a signal came or the time is over."""
        return self.signalled or (self.limit is not None and self.limit.over)

    def stop(self, saved: str) -> NoReturn:
        """End the work.

        Args:
            saved: what is saved, for the message.

        Raises:
            KeyboardInterrupt: after a signal.
            LimitError: at the limit.
        """
        if self.limit is not None and not self.signalled:
            raise LimitError(self.limit, saved)
        raise KeyboardInterrupt(saved)


@contextmanager
def deferred() -> Iterator[Interrupts]:
    """Note the first Ctrl-C or SIGTERM, or the limit, instead of stopping; a second signal stops.

    Signals that the process ignores stay ignored. Outside of the main thread signals go on as they
    did.
    """
    found = Interrupts(limit=_LIMIT.get())

    def note(number: int, frame: FrameType | None) -> None:
        if found.signalled:
            raise KeyboardInterrupt
        found.signalled = True
        print("interrupted: this step ends and is saved; again to stop at once", file=sys.stderr)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, note)
    if found.limit is not None:
        found.limit.stepping = True
    try:
        yield found
    finally:
        if found.limit is not None:
            found.limit.stepping = False
        for number, handler in before.items():
            signal.signal(number, handler)
