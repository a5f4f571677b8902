"""Many workers on one store whose file system is slow: is a run made twice, and what does it cost?

    python -m tests.experiments.crowd --workers 1 4 16 64

Each worker goes through all runs in an order of its own and makes those that nobody makes or has
made, as a sweep does on its machine. Every call that changes the store, and every look at a lock,
takes a random time before it and behind it, 2 ms on average together with what it takes itself. A
run waits `WORK_SECONDS` and computes nothing, so that what is measured beyond is what the store
costs: its lock, its record, looking for them, and the processor that all workers share here.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltacontrol.experiments.runs import locks
from deltacontrol.experiments.runs.running import run
from deltacontrol.experiments.runs.store import RunStore
from tests.experiments.toy_runs import Toy

MEAN_DELAY, WORK_SECONDS, RUNS_EACH = 0.001, 2.0, 4


@dataclass(frozen=True)
class Crowd:
    """What was measured of so many workers.

    Attributes:
        workers: How many there were.
        runs: How many runs were wanted.
        twice: Runs that began more than once.
        lost: Runs without a record.
        overhead: Of each run, the seconds that it took its worker beyond its work.
        wall: Seconds until all were done.
    """

    workers: int
    runs: int
    twice: int
    lost: int
    overhead: list[float]
    wall: float

    @property
    def text(self) -> str:
        """A row of the table."""
        cuts = statistics.quantiles(self.overhead, n=20)
        return (
            f"{self.workers:7d} {self.runs:5d} {self.twice:5d} {self.lost:4d} "
            f"{1000 * statistics.median(self.overhead):13.0f} {1000 * cuts[-1]:9.0f} "
            f"{self.wall:6.1f}"
        )


HEADING = "workers  runs twice lost  ms a run more  95 % at  wall s"


def delayed(function: Any, chance: random.Random) -> Any:
    def call(*given: Any, **options: Any) -> Any:
        time.sleep(chance.expovariate(1 / MEAN_DELAY))
        try:
            return function(*given, **options)
        finally:
            time.sleep(chance.expovariate(1 / MEAN_DELAY))

    return call


def work(root: Path, number: int, wanted: list[Toy], gate: Any, found: Any) -> None:
    """One worker: makes what it can, and looks again after what others were making."""
    assert "torch" not in sys.modules  # many of them fit on one machine
    chance, store = random.Random(number), RunStore(root)
    for name in ("link", "unlink", "rename", "mkdir", "fsync"):
        setattr(os, name, delayed(getattr(os, name), chance))
    locks.owner = delayed(locks.owner, chance)
    overhead = []
    gate.wait()
    mine = chance.sample(wanted, len(wanted))
    while mine:
        others = []
        for toy in mine:
            began = time.perf_counter()
            known = store.find(toy) is not None
            if known:
                continue
            record = run(toy, store, progress=False, block=False)
            if record is None:
                others.append(toy)
            elif record.provenance["processor_seconds"] is not None and _is_mine(toy):
                overhead.append(time.perf_counter() - began - WORK_SECONDS)
        mine = others
        time.sleep(0.2 * bool(mine))
    found.put(overhead)


def _is_mine(toy: Toy) -> bool:
    """Whether this process made the run, and not another one meanwhile."""
    lines = Path(toy.log).read_text(encoding="utf-8").splitlines()
    return f"{toy.seed} {os.getpid()}" in lines


def crowd(workers: int, folder: Path) -> Crowd:
    """So many workers on one store in a new folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.experiments.toy_runs", "pyarrow.parquet"])
    root, log = folder / "runs", folder / "log"
    wanted = [Toy(n, "wait", WORK_SECONDS, str(log)) for n in range(RUNS_EACH * workers)]
    gate, found = context.Barrier(workers + 1), context.Queue()
    processes = [
        context.Process(target=work, args=(root, number, wanted, gate, found))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    gate.wait()
    began = time.perf_counter()
    overhead = [seconds for _ in processes for seconds in found.get(timeout=1200)]
    wall = time.perf_counter() - began
    for process in processes:
        process.join()
    begun = Counter(int(line.split()[0]) for line in log.read_text("utf-8").splitlines())
    store = RunStore(root)
    lost = sum(store.find(toy) is None for toy in wanted)
    twice = sum(count > 1 for count in begun.values())
    return Crowd(workers, len(wanted), twice, lost, overhead, wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    print(HEADING)
    for workers in parser.parse_args().workers:
        with tempfile.TemporaryDirectory() as folder:
            print(crowd(workers, Path(folder)).text, flush=True)


if __name__ == "__main__":
    main()
