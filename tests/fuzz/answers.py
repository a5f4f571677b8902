"""A case, what may answer it, and a process for each."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from types import FrameType
from typing import Any, NoReturn

from deltacontrol.theory.errors import InputError

SORTS = ("message", "accepted", "traceback", "hang")
LIMIT = 20.0  # seconds of computing that a case may take
WALL_LIMIT = 90.0  # seconds by the clock, after which its process is stopped
MEMORY = 12 * 2**30  # bytes of addresses that the process may ask for
KEPT = 600  # letters of an output that are kept


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        key: kind and number, such as ``command:17``.
        name: the command or the call.
        text: what somebody would write to get the same.
        marks: what is odd about it; empty where it is valid.
        run: does it; the exit code of a command, None of a call.
    """

    key: str
    name: str
    text: str
    marks: tuple[str, ...]
    run: Callable[[], int | None]


@dataclass(frozen=True)
class Answer:
    """What came back of a case."""

    key: str
    name: str
    text: str
    marks: tuple[str, ...]
    sort: str
    detail: str
    seconds: float

    def line(self) -> str:
        """As a line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=True)


class _OverTimeError(BaseException):
    """The limit is reached; no handler of ordinary errors takes it for one."""


def answer(case: Case, limit: float = LIMIT) -> Answer:
    """Run a case in this process, at most ``limit`` seconds of computing."""
    over = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal over
        over = True
        raise _OverTimeError

    out, err = StringIO(), StringIO()
    sort, detail = "traceback", ""
    began = time.perf_counter()
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit, 1.0)  # again, where a handler swallowed it
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = case.run()
        sort = "accepted" if code in (None, 0, 1) else "message" if code == 2 else "traceback"
        detail = out.getvalue()[-KEPT:] if sort == "accepted" else err.getvalue()[-KEPT:]
        if sort == "message" and not detail.strip():
            sort, detail = "traceback", "exit code 2 without a message"
        if sort == "accepted" and code:
            detail = f"exit code {code}: {detail}"
    except InputError as error:
        sort, detail = "message", str(error)[:KEPT]
        if len(detail) < 20:
            sort, detail = "traceback", f"a message that says nothing: {error!r}"
    except BaseException as error:
        lines = traceback.format_exception(error)
        detail = "".join(_own_lines(lines))[-3 * KEPT :]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)
    sort = "hang" if over else sort
    seconds = round(time.perf_counter() - began, 3)
    return Answer(case.key, case.name, case.text, case.marks, sort, detail, seconds)


def _own_lines(lines: Sequence[str]) -> list[str]:
    """The frames of this project, and the error."""
    frames = [line for line in lines if line.startswith("  File") and "/tests/fuzz/" not in line]
    own = [line for line in frames if "site-packages" not in line and "/lib/python" not in line]
    kept = ["\n".join(line.splitlines()[:2]) + "\n" for line in own[-4:]]
    return [*kept, lines[-1]]


def answers(keys: Sequence[str], draw: Callable[[str], Case]) -> Iterator[Answer]:
    """The answer to each case, in a process of its own: nothing that one leaves meets another.

    Args:
        keys: of the cases.
        draw: gives a case by its key; called in that process.
    """
    for key in keys:
        receive, send = multiprocessing.Pipe(duplex=False)
        process = os.fork()
        if not process:
            _work(key, draw, send)
        send.close()
        found: Any = (key, "", "", ())
        try:
            while not isinstance(found, Answer):
                if not receive.poll(WALL_LIMIT):
                    found = Answer(*found, "hang", f"nothing came in {WALL_LIMIT:g} s", WALL_LIMIT)
                else:
                    found = receive.recv()
        except EOFError:
            found = Answer(*found, "traceback", "the process ended without an answer", 0.0)
        finally:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            receive.close()
        yield found


def _work(key: str, draw: Callable[[str], Case], send: Any) -> NoReturn:
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # what libraries print beside Python
            os.dup2(null, stream)
        case = draw(key)
        send.send((case.key, case.name, case.text, case.marks))
        send.send(answer(case))
    finally:
        os._exit(0)
