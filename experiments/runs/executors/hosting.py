"""A worker of a cluster: it has the process of a call as a sweep of this machine has it.

The worker itself is a thin host. It forks a process for each call from a server that has the large
modules, keeps the time limit and tells how the process ended, so that a call has memory, random
numbers and an end of its own on a cluster too. A host that makes several calls has its server for
all of them.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing import spawn
from types import SimpleNamespace
from typing import Any

from deltacontrol.experiments.runs.executors import calls
from deltacontrol.experiments.runs.executors.base import Call, End, Work, be_worker
from deltacontrol.experiments.runs.executors.processes import Processes


def sent(work: Work, name: str, threads: int) -> Callable[[], End]:
    """A whole call as a function for a worker that may know nothing of this project yet.

    It is a closure over plain values, so that it is sent by its text and no module is needed to
    read it. The worker gets this process's folder, search path and script, which a shared file
    system has in the same place.

    Raises:
        UnsendableError: It cannot be sent.
    """
    paths, folder = [os.path.abspath(path) for path in sys.path], os.getcwd()
    found = spawn.get_preparation_data("")
    script = found.get("init_main_from_path"), found.get("init_main_from_name")
    call = calls.packed(work, name), work.calls[name].seconds
    begin, preload = calls.as_bytes(work.begin), list(work.preload)

    def serve() -> Any:
        import importlib
        import os
        import sys

        os.chdir(folder)
        sys.path[:] = list(dict.fromkeys([*filter(os.path.exists, paths), *sys.path]))
        importlib.invalidate_caches()
        hosting = importlib.import_module("deltacontrol.experiments.runs.executors.hosting")
        return hosting.hosted(*call, begin, threads, preload, script)

    return serve


def hosted(
    call: bytes,
    seconds: float,
    begin: bytes,
    threads: int,
    preload: list[str],
    script: tuple[str | None, str | None],
) -> End:
    """Make a call in a process of its own, whose end is this one's value."""
    _be_script(*script)
    work = Work(calls.unpacked, {"": Call((call,), seconds)}, partial(_begin, begin), preload)
    ended: dict[str, End] = {}
    for look in Processes().ends(work, 1, threads):
        ended |= look.ended
    return ended[""]


def _begin(begin: bytes, threads: int) -> None:
    be_worker(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    pickle.loads(begin)(threads)


def _be_script(path: str | None, name: str | None) -> None:
    """Have processes of this one take the sweep's script for theirs, and not that of the worker."""
    main: Any = sys.modules["__main__"]
    main.__spec__ = None if name is None else SimpleNamespace(name=name)
    main.__file__ = path
