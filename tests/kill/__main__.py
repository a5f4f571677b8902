"""``python -m tests.kill``: stop work at random moments, resume it, compare."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1",
                  TQDM_DISABLE="1", MPLBACKEND="Agg")  # fmt: skip

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

COLUMNS = ("stopped", "finished", "resumed", "equal", "different")


def main() -> int:
    """Exit code 1 where something was lost or is different."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    parser.add_argument("--moments", type=int, default=50, help="how many pieces of work")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin none after these")
    given = parser.parse_args()
    from tests.fuzz import world
    from tests.kill import jobs

    chance = random.Random(given.seed)
    table: Counter[tuple[str, str, str]] = Counter()
    faults: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as spare:
        place = Path(spare)
        os.chdir(place)
        world.build(place)
        world.warm_up()
        whole = {job: jobs.undisturbed(job, place / f"whole-{job}") for job in jobs.JOBS}
        for number in range(given.moments):
            if time.monotonic() - began > given.seconds:
                break
            # In turn, so that few moments see every kind of work and every signal.
            job = jobs.JOBS[number % len(jobs.JOBS)]
            how = jobs.SIGNALS[number // len(jobs.JOBS) % len(jobs.SIGNALS)]
            seen = jobs.disturbed(job, how, place / f"store-{number}", chance, whole[job])
            for column in seen.columns:
                table[job, how.name, column] += 1
            faults += [f"{job}, {how.name}, moment {number}: {fault}" for fault in seen.faults]
    print(f"{'':24}" + "".join(f"{name:>11}" for name in COLUMNS))
    for job in jobs.JOBS:
        for how in jobs.SIGNALS:
            counts = "".join(f"{table[job, how.name, name]:11d}" for name in COLUMNS)
            print(f"{job:12}{how.name:12}{counts}")
    print("\n".join(faults) or "nothing was lost, and all numbers are the same")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
