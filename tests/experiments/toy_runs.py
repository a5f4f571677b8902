"""Runs without a model, for sweeps: they compute, wait, or fail in every way that runs fail in."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from deltacontrol.experiments.runs.experiment import Experiment, Outcome, Workspace
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.theory.errors import InputError

# What a run needs without a model, so that processes begin quickly.
PRELOADED = (
    "torch",
    "pyarrow.parquet",
    "deltacontrol.deltas.registry",
    "deltacontrol.experiments.models",
    "deltacontrol.experiments.tasks",
    "deltacontrol.theory.solvers.registry",
    "tests.experiments.toy_runs",
)
BEHAVIOURS = ("compute", "wait", "raise", "refuse", "nan", "hang", "exit", "die", "once")


@dataclass(frozen=True)
class Toy(Experiment):
    """A run; what it leaves in the log is no part of its identity.

    Attributes:
        seed: Of its numbers.
        behaviour: One of `BEHAVIOURS`; "once" waits at its first attempt only.
        seconds: How long it waits.
        log: A line for each beginning: seed and process.
    """

    kind: ClassVar[str] = "executor-toy"
    seed: int
    behaviour: str = "compute"
    seconds: float = 0.0
    log: str = ""

    def to_config(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "log"}

    @property
    def label(self) -> str:
        return f"toy {self.seed}"

    def execute(self, workspace: Workspace) -> Outcome:
        first = not workspace.folder.exists()
        workspace.folder.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{self.seed} {os.getpid()}\n")
        match self.behaviour:
            case "raise":
                raise KeyError("lost")
            case "refuse":
                raise InputError("no such thing; try another")
            case "exit":
                sys.exit(3)
            case "die":
                os._exit(9)
            case "hang":
                time.sleep(3600)
            case "wait":
                time.sleep(self.seconds)
            case "once" if first:
                time.sleep(self.seconds)
        loss = math.nan if self.behaviour == "nan" else self.seed / 7
        curve = pd.DataFrame({"step": [1, 2], "loss": [2 * loss, loss]})
        controls = None
        if "torch" in sys.modules:
            import torch

            generator = torch.Generator().manual_seed(self.seed)
            values = torch.randn(64, 64, generator=generator)
            controls = {"values": values @ values.T}
            loss += controls["values"].trace().item()
        status = "diverged" if self.behaviour == "nan" else "completed"
        return Outcome(status, {"seed": self.seed, "loss": loss}, curve, controls)


def toys(log: Path, *given: str) -> list[Toy]:
    """From texts such as ``compute`` or ``wait:2.5``, with the seeds 0, 1, ..."""
    pairs = [text.partition(":") for text in given]
    return [Toy(n, b, float(s or 0), str(log)) for n, (b, _, s) in enumerate(pairs)]


def logged(root: Path) -> list[tuple[int, int]]:
    """Seed and process of each beginning of a run."""
    log = root.with_suffix(".log")
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [(int(line.split()[0]), int(line.split()[1])) for line in lines]


def main() -> None:
    """A sweep of its own, which tests kill: exit code 2 where runs failed."""
    from deltacontrol.experiments.runs import sweep

    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("executor")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--limit-minutes", type=float, default=60.0)
    given = parser.parse_args()
    sweep.PRELOADED = PRELOADED
    log = given.root.with_suffix(".log")
    wanted = toys(log, *given.runs)
    limit = given.limit_minutes
    try:
        sweep.run_all(
            wanted, RunStore(given.root), 2, False, executor=given.executor, limit_minutes=limit
        )
    except InputError as error:
        print(error, flush=True)
        sys.exit(2)
