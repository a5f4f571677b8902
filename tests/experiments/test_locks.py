"""A lock has one owner: with slow calls, dead owners, other machines and lost answers."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deltacontrol.experiments.runs import locks
from deltacontrol.experiments.runs.locks import locked, owner

SOURCES = Path(__file__).resolve().parents[2] / "src"
NAME = "0123456789abcdef"


def lock(root: Path) -> Path:
    return root / locks.FOLDER / f"{NAME}.held"


def left(root: Path) -> list[str]:
    """What locks leave behind in a store."""
    drafts = [path.name for path in root.glob(".lock-*")]
    return drafts + [path.name for path in (root / locks.FOLDER).iterdir()]


def forge(root: Path, machine: str, process: int, seconds_ago: float) -> Path:
    """The lock of somebody who was here so long ago."""
    path = lock(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f'{{"machine": "{machine}", "process": {process}, "began": 1.0, "token": "old"}}'
    path.write_text(text, encoding="utf-8")
    age(path, seconds_ago)
    return path


def age(path: Path, seconds: float) -> None:
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


def taken(root: Path) -> bool:
    with locked(root, NAME, block=False) as mine:
        return mine


@pytest.fixture
def slow_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes every call of the file system take a random time, before and after."""

    def make(seconds: float) -> None:
        chance = random.Random(0)

        def slowed(function):
            def call(*given, **options):
                time.sleep(chance.uniform(0, seconds))
                try:
                    return function(*given, **options)
                finally:
                    time.sleep(chance.uniform(0, seconds))

            return call

        for name in ("link", "utime", "fstat"):
            monkeypatch.setattr(locks.os, name, slowed(getattr(os, name)))
        for name in ("unlink", "write_text"):
            monkeypatch.setattr(Path, name, slowed(getattr(Path, name)))

    return make


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """Each thread that names itself there is a machine of its own."""
    here = threading.local()
    monkeypatch.setattr(locks, "_machine", lambda: getattr(here, "name", "home"))
    return here


def test_a_lock_is_held_inside_and_leaves_nothing(tmp_path: Path) -> None:
    with locked(tmp_path, NAME, block=False) as mine:
        assert mine and not taken(tmp_path)
        found = owner(lock(tmp_path))
        assert found is not None and found[0].process == os.getpid()
        with locked(tmp_path, "another", block=False) as another:
            assert another
    with pytest.raises(RuntimeError, match="inside"), locked(tmp_path, NAME, block=False):
        raise RuntimeError("inside")
    assert taken(tmp_path)
    assert left(tmp_path) == []


def test_files_of_the_locks_of_earlier_versions_are_no_locks(tmp_path: Path) -> None:
    (tmp_path / locks.FOLDER).mkdir()
    (tmp_path / locks.FOLDER / f"{NAME}.lock").touch()
    assert taken(tmp_path)


def test_who_waits_gets_it_next(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path, NAME, block=False):
            waiting = pool.submit(lambda: locked(tmp_path, NAME, block=True).__enter__())
            time.sleep(0.2)
            assert not waiting.done()
        assert waiting.result(60) is True


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_one_at_a_time_among_machines_with_slow_calls(
    tmp_path: Path,
    slow_calls: Callable[[float], None],
    machines: threading.local,
    monkeypatch: pytest.MonkeyPatch,
    links: bool,
) -> None:
    if not links:

        def refused(*_: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(locks.os, "link", refused)
    slow_calls(0.002)
    inside, times = [], []

    def work(number: int) -> None:
        machines.name = f"machine {number}"
        for _ in range(5):
            with locked(tmp_path, NAME, block=True):
                inside.append(number)
                assert inside == [number]
                time.sleep(0.001)
                inside.clear()
                times.append(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert sorted(times) == sorted([*range(4)] * 5) and left(tmp_path) == []


@pytest.mark.parametrize("seed", range(3))
def test_one_of_many_takes_a_stale_lock_over(
    tmp_path: Path, slow_calls: Callable[[float], None], machines: threading.local, seed: int
) -> None:
    forge(tmp_path, "away", 1, locks.STALE_SECONDS + 60)
    slow_calls(0.003 * (seed + 1))
    start, over = threading.Barrier(6), threading.Barrier(6)

    def work(number: int) -> bool:
        machines.name = f"machine {number}"
        start.wait(60)
        with locked(tmp_path, NAME, block=False) as mine:
            over.wait(60)  # nobody gives it back before everybody has tried
            return mine

    with ThreadPoolExecutor(6) as pool:
        held = list(pool.map(work, range(6)))
    assert sum(held) <= 1  # none where each of them met another one's guard
    assert sum(held) == 1 or taken(tmp_path)
    assert left(tmp_path) == []


def test_a_lock_of_another_machine_is_stale_by_the_age_of_its_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = forge(tmp_path, "away", os.getpid(), locks.STALE_SECONDS - 60)
    monkeypatch.setattr(time, "time", lambda: 1e12)  # clocks of machines differ
    assert not taken(tmp_path)
    age(path, 120)
    assert taken(tmp_path)


def test_a_dead_owner_of_this_machine_costs_no_wait(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from deltacontrol.experiments.runs import locks;"
        f"held = locks.locked(Path(sys.argv[1]), '{NAME}', block=False);"
        "held.__enter__(); os._exit(9)"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False)
    found = owner(lock(tmp_path))
    assert found is not None and found[0].process != os.getpid()
    assert taken(tmp_path) and left(tmp_path) == []


def test_a_live_owner_of_this_machine_keeps_it_however_old(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        began = locks._began(other.pid)
        path = forge(tmp_path, locks._machine(), other.pid, 10 * locks.STALE_SECONDS)
        path.write_text(path.read_text().replace("1.0", repr(began)))
        age(path, 10 * locks.STALE_SECONDS)
        assert not taken(tmp_path)
        path.write_text(path.read_text().replace(repr(began), "1.0"))  # a number that is used again
        assert taken(tmp_path)
        other.communicate(b"\n")


def test_a_killed_owner_whose_parent_has_not_asked_for_it_is_over(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        began = locks._began(other.pid)
        assert began is not None and locks._is_running(other.pid, began)
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert not locks._is_running(other.pid, began)


def test_a_thief_that_died_at_it_is_no_obstacle(tmp_path: Path) -> None:
    path = forge(tmp_path, "away", 1, 2 * locks.STALE_SECONDS)
    guard = path.with_name(f"{path.name}.old")
    guard.write_text(path.read_text().replace('"old"', '"older"'))
    assert not taken(tmp_path)  # the guard is young: somebody may be at it
    age(guard, 2 * locks.STALE_SECONDS)
    assert taken(tmp_path) or taken(tmp_path)
    assert left(tmp_path) == []


def test_an_owner_that_lost_its_lock_leaves_the_new_one_alone(tmp_path: Path) -> None:
    with locked(tmp_path, NAME, block=False):
        path = forge(tmp_path, "away", 1, 0.0)
    assert path.exists() and not taken(tmp_path)


def test_a_lost_answer_of_the_server_is_no_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def told_twice(source: str, target: str) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "it is there")

    monkeypatch.setattr(locks.os, "link", told_twice)
    with locked(tmp_path, NAME, block=False) as mine:
        assert mine
    assert left(tmp_path) == []


def test_a_held_lock_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.02)
    with locked(tmp_path, NAME, block=False):
        age(lock(tmp_path), 1000)
        before = lock(tmp_path).stat().st_mtime
        end = time.monotonic() + 60
        while lock(tmp_path).stat().st_mtime == before:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert lock(tmp_path).stat().st_mtime - before > 500


def test_a_damaged_lock_is_nobodys_until_it_is_old(tmp_path: Path) -> None:
    path = forge(tmp_path, "away", 1, 0.0)
    path.write_text("")
    assert not taken(tmp_path)
    age(path, 2 * locks.STALE_SECONDS)
    assert taken(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError), locked(tmp_path / "file", NAME, block=False):
        pass
