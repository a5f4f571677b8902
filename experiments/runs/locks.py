"""A lock a run, which also holds on a network file system: one file, made by one atomic call.

    <store>/.locks/<run id>.held    {"machine", "process", "began", "token"}

Locks of the system (`flock`) are left alone: on NFS and the like they may hold on one machine only,
or nowhere, without a word. What every file system does on its server, for all of its clients, is to
make a second name for a file (`link`), or a new file, only where there is none of that name. So a
lock is a file that its owner wrote elsewhere and linked to the lock's name.

A thread of the owner touches the file every `HEARTBEAT_SECONDS`. A lock is taken over

- of a process of this machine where that process is over (its number, and when it began), and never
  before: a killed sweep costs no wait, and one that is stopped for a while loses nothing;
- of another machine where nobody touched it for `STALE_SECONDS`, by the clock of the file system
  alone: its age is the difference to a file that was written a moment ago, and no two machines'
  clocks are compared.

Only who holds the guard of a lock, a lock of its own whose name ends in the token of the lock that
is there, may remove it, its owner too; the guard in hand, the token is read again. Tokens are never
used twice, so what is removed is the lock that was found stale, and never a younger one. With this
a lock has one owner at a time, unless a machine stands still for `STALE_SECONDS` and goes on later:
then two may compute one run, and the record that is there first is kept.

The draft of a lock is written to the store's own folder. After that a client of NFS knows what
changed in there, so that a record which another machine wrote before it gave the lock back is seen.
"""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

FOLDER = ".locks"
HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 180.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0  # between two looks of who waits for a lock
# What `link` says where a file system has no second names; a new file serves there.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        machine: Name of the machine, its boot, and the space of its process numbers.
        process: Number of the process there.
        began: When that process began, on the machine's own clock; None where it is not known.
        token: Names this one holding of a lock.
    """

    machine: str
    process: int
    began: float | None
    token: str

    def is_gone(self, age: float) -> bool:
        """Whether nobody holds a lock of this owner any more that was touched so long ago."""
        if self.machine != _machine():
            return age > STALE_SECONDS
        if self.process == os.getpid():
            return not _HEART.knows(self.token)
        return not _is_running(self.process, self.began)


@contextmanager
def locked(root: Path, name: str, *, block: bool) -> Iterator[bool]:
    """Hold a lock inside; whether it could be had, which is certain with ``block``.

    Args:
        root: The folder of the store.
        name: Of the lock.
        block: Wait until it can be had.

    Raises:
        OSError: The folder cannot be written.
    """
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.held"
    mine = _own()
    pause, chance = _FIRST_PAUSE, random.Random()
    held = False
    _HEART.begin(path, mine.token)
    try:
        while not (held := _acquired(root, path, mine)) and block:
            time.sleep(pause * chance.uniform(0.5, 1.0))
            pause = min(1.5 * pause, _LONGEST_PAUSE)
        if held:
            _HEART.start()
        yield held
    finally:
        _HEART.end(mine.token)
        if held:
            with suppress(OSError):  # what cannot be removed now is of nobody from here on
                with _draft(root, mine) as (draft, now):
                    _remove(path, mine.token, mine, draft, now)


def owner(path: Path) -> tuple[Owner, float] | None:
    """Who holds a lock, and when it was touched last; None where nobody does.

    The owner of a file that is not written yet, or damaged, is nobody's process.
    """
    try:
        with open(path, encoding="utf-8") as file:  # opening asks the server, a look need not
            touched = os.fstat(file.fileno()).st_mtime
            text = file.read()
    except FileNotFoundError:
        return None
    try:
        document = json.loads(text)
        return Owner(**{f.name: document[f.name] for f in fields(Owner)}), touched
    except (ValueError, KeyError, TypeError):
        return Owner("", 0, None, "unknown"), touched


def _acquired(root: Path, path: Path, mine: Owner) -> bool:
    """Whether the lock is `mine` now."""
    with _draft(root, mine) as (draft, now):
        while not _linked(draft, path):
            found = owner(path)
            if found is None:
                continue  # given back a moment ago
            if found[0].token == mine.token:
                return True  # the first answer of the server was lost on its way
            if not _is_stale(found, now) or not _remove(path, found[0].token, mine, draft, now):
                return False
    return True


def _remove(path: Path, token: str, mine: Owner, draft: Path, now: float) -> bool:
    """Remove the lock of this token, unless somebody else is about to; whether it is not there."""
    guard = path.with_name(f"{path.name}.{token}")
    if not _linked(draft, guard):
        found = owner(guard)
        if found is not None and found[0].token != mine.token:
            if _is_stale(found, now):  # its owner died in between two lines of this function
                _remove(guard, found[0].token, mine, draft, now)
            return False
    try:
        found = owner(path)
        if found is not None and found[0].token == token:
            path.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)
    return True


def _is_stale(found: tuple[Owner, float], now: float) -> bool:
    holder, touched = found
    return holder.is_gone(now - touched)


@contextmanager
def _draft(root: Path, mine: Owner) -> Iterator[tuple[Path, float]]:
    """A file that says whose lock it is, and when it was written by the file system's clock."""
    path = root / f".lock-{uuid.uuid4().hex}"
    path.write_text(json.dumps(asdict(mine)), encoding="utf-8")
    try:
        yield path, path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)


def _linked(draft: Path, path: Path) -> bool:
    """Whether `path` was made a name of the file, or a copy of it; False where there is one."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            with open(path, "xb") as file:
                file.write(draft.read_bytes())
        except FileExistsError:
            return False
    return True


class _Heart:
    """Knows the locks of this process, and touches them in a thread while it holds any."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._known: dict[str, Path] = {}
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def begin(self, path: Path, token: str) -> None:
        """Know a lock that is about to be taken."""
        with self._mutex:
            self._known[token] = path

    def start(self) -> None:
        """Touch all that are known from now on."""
        with self._mutex:
            if self._thread is None:
                self._over = threading.Event()
                self._thread = threading.Thread(target=self._beat, args=(self._over,), daemon=True)
                self._thread.start()

    def end(self, token: str) -> None:
        """Forget a lock."""
        with self._mutex:
            self._known.pop(token, None)
            if not self._known and self._thread is not None:
                self._over.set()
                self._thread = None

    def knows(self, token: str) -> bool:
        """Whether a lock of this token is held here, or is being taken."""
        with self._mutex:
            return token in self._known

    def _beat(self, over: threading.Event) -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            with self._mutex:
                known = dict(self._known)
            for token, path in known.items():
                with suppress(OSError):  # a server that does not answer may do so the next time
                    found = owner(path)
                    if found is not None and found[0].token == token:
                        os.utime(path)


_HEART = _Heart()


def _in_child() -> None:
    """A forked process holds no lock of its parent."""
    global _HEART
    _HEART = _Heart()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _own() -> Owner:
    return Owner(_machine(), os.getpid(), _began(os.getpid()), uuid.uuid4().hex)


@cache
def _machine() -> str:
    """What tells machines apart, and containers of one machine, which number processes anew."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # no Linux
        import psutil

        boot, space = f"{psutil.boot_time():.0f}", uuid.getnode()
    return f"{socket.gethostname()} {boot} {space}"


def _is_running(process: int, began: float | None) -> bool:
    """Whether that very process is there; a later one of its number began at another time."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # another user's
    now = _began(process)
    if now is None:  # it is over and nobody has asked for its exit code, or it is hidden
        return not _is_zombie(process)
    return began is None or now == began


def _began(process: int) -> float | None:
    """When a process began, in ticks since the boot, or in seconds elsewhere than on Linux."""
    try:
        values = _status(process)
        return None if values[0] in ("Z", "X") else float(values[19])
    except OSError:
        pass
    import psutil

    try:
        return psutil.Process(process).create_time()
    except psutil.Error:
        return None


def _is_zombie(process: int) -> bool:
    with suppress(OSError):
        return _status(process)[0] in ("Z", "X")
    return False


def _status(process: int) -> list[str]:
    """The fields of the system's line on a process, from the third on, which is its state."""
    text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()
