"""``python -m tests.fuzz``: draw cases, run them, count the answers."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1",
                  MPLBACKEND="Agg", COLUMNS="100", TQDM_DISABLE="1")  # fmt: skip

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> int:
    """Exit code 1 where a case gave a traceback or a hang."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of all cases")
    parser.add_argument("--seconds", type=float, default=60.0, help="begin no case after these")
    parser.add_argument("--commands", type=int, default=200, help="command lines at most")
    parser.add_argument("--calls", type=int, default=200, help="calls at most")
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first case of each kind"
    )
    parser.add_argument("--only", default="", help="those whose name begins like this")
    parser.add_argument("--case", action="append", help="one case alone, such as command:17")
    parser.add_argument("--world", type=Path, help="the folder of files; kept where it is named")
    parser.add_argument("--accepted", type=Path, default=Path("fuzz-accepted.jsonl"),
                        help="file for what was accepted")  # fmt: skip
    parser.add_argument("--messages", type=Path, help="file for what was refused, and how")
    given = parser.parse_args()
    from tests.fuzz import report

    with tempfile.TemporaryDirectory() as spare:
        world = (given.world or Path(spare) / "world").resolve()
        keys = given.case or report.keys(given.commands, given.calls, given.first)
        found = report.run(keys, given.seed, world, given.seconds, given.only)
        print(report.text(found, given.seed))
        report.write(found, "accepted", given.accepted)
        if given.messages is not None:
            report.write(found, "message", given.messages)
    return int(any(a.sort in ("traceback", "hang") for a in found))


if __name__ == "__main__":
    sys.exit(main())
