"""The pieces of work, each in a process that can be stopped, and what they leave."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from deltacontrol.experiments.measures.solving import Solve
from deltacontrol.experiments.runs.store import Experiment, Record, RunStore
from deltacontrol.experiments.runs.sweep import run, run_all
from deltacontrol.experiments.sources import CACHE_VARIABLE
from deltacontrol.experiments.studies.d90.fine_tuning import FineTuningDimension
from deltacontrol.experiments.training.finetune import FineTuning
from deltacontrol.experiments.training.pretraining.experiment import Pretraining
from deltacontrol.theory import plugins
from deltacontrol.theory.solvers import solving
from tests.experiments import tiny_text

JOBS = ("finetune", "solve", "dimension", "sweep", "pretrain")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WAIT_SECONDS = 180.0  # for a process that was asked to stop, and for one that resumes
CLOCKED = ("seconds", "memory", "per_second", "bytes")  # what no two runs have in common


@dataclass(frozen=True)
class Whole:
    """An undisturbed piece of work: how long it took, and what it recorded."""

    seconds: float
    records: dict[str, Record]


@dataclass
class Seen:
    """What became of a disturbed one: the columns of the table that it counts in, and faults."""

    columns: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def experiments(job: str) -> list[Experiment]:
    """What a piece of work records; paths are those of the present folder."""
    common: dict[str, Any] = {"model": "tiny", "task": "task.csv", "max_length": 8}
    trained = common | {"batch_size": 4, "learning_rate": 0.01, "eval_every": 50, "steps": 150}
    if job == "pretrain":
        return [Pretraining("encoder", width=16, steps=40)]
    if job == "finetune":
        return [FineTuning(deltas=("lora:rank=2",), **trained)]
    if job == "solve":
        return [Solve(deltas=("bitfit",), solver="newton-cg", rows=4, steps=6, tol=0.0,
                      weight_decay=0.1, **common)]  # fmt: skip
    if job == "dimension":
        return [FineTuningDimension(steps=4, batch_size=4, budget=3, eval_limit=8, seeds=2,
                                    target=0.6, largest=100, **common)]  # fmt: skip
    return [FineTuning(deltas=("bitfit",), seed=seed, **trained) for seed in range(3)]


def undisturbed(job: str, root: Path) -> Whole:
    """Run it to its end."""
    began = time.monotonic()
    code = _wait(_start(job, root), WAIT_SECONDS)
    seconds = time.monotonic() - began
    if code != 0:
        raise RuntimeError(f"{job} ends with {code} where nobody disturbs it")
    return Whole(seconds, _records(root))


def disturbed(
    job: str, how: signal.Signals, root: Path, chance: random.Random, whole: Whole
) -> Seen:
    """Stop it once or twice, run it to its end, and compare."""
    seen = Seen()
    for _ in range(chance.choice((1, 1, 2))):
        process = _start(job, root)
        moment = chance.uniform(0.0, 1.1 * whole.seconds)
        if chance.random() < 0.5:  # else most moments fall into the loading of the model
            _await_checkpoint(root, process)
            moment *= 0.3
        time.sleep(moment)
        os.kill(process, how)
        code = _wait(process, WAIT_SECONDS)
        if code is None:
            seen.faults.append(f"it went on for {WAIT_SECONDS:g} s after the signal")
        seen.columns.append("finished" if code == 0 else "stopped")
        if code not in (0, -how, 130):
            seen.faults.append(f"after the signal it ended with {code}: {_said(root)}")
        if code == 0:
            break
    before = {p: p.stat().st_mtime_ns for p in root.glob("[!.]*/*")}
    if any(path.is_file() for path in (root / ".partial").rglob("*")):
        seen.columns.append("resumed")
    code = _wait(_start(job, root), WAIT_SECONDS)
    if code != 0:
        seen.faults.append(f"resumed, it ended with {code}: {_said(root)}")
        return seen
    after = {p: p.stat().st_mtime_ns for p in root.glob("[!.]*/*")}
    if any(after.get(path) != stamp for path, stamp in before.items()):
        seen.faults.append("a finished record was written again")
    left = [*(root / ".partial").glob("*"), *(root / ".failed").glob("*")]
    if left:
        seen.faults.append(f"{left[0].relative_to(root)} is left")
    found = _records(root)
    names = sorted(whole.records.keys() ^ found.keys())
    wrong = [f"{n} is recorded once only" for n in names]
    wrong += [f"{n}: {w}" for n in found.keys() & whole.records.keys()
              for w in _differences(whole.records[n], found[n])]  # fmt: skip
    seen.columns.append("different" if wrong else "equal")
    seen.faults += wrong
    return seen


def _said(root: Path) -> str:
    """The last words of the last process."""
    return Path(f"{root}.said").read_text(errors="replace")[-600:]


def _records(root: Path) -> dict[str, Record]:
    return {record.id: record for record in RunStore(root).records()}


def _differences(whole: Record, found: Record) -> list[str]:
    """What two records of one run do not have in common."""
    wrong = []
    ours, theirs = _told(whole.result), _told(found.result)
    wrong += [name for name in sorted(ours.keys() | theirs.keys())
              if repr(ours.get(name)) != repr(theirs.get(name))]  # fmt: skip
    curves = [_told(record.curve().to_dict("list")) for record in (whole, found)]
    if not pd.DataFrame(curves[0]).equals(pd.DataFrame(curves[1])):
        wrong.append("the curve")
    if (whole.status, whole.message) != (found.status, found.message):
        wrong.append(f"status {found.status}, {found.message}")
    if (whole.folder / "controls.safetensors").exists():
        a, b = whole.controls(), found.controls()
        if a.keys() != b.keys() or not all(torch.equal(a[k], b[k]) for k in a):
            wrong.append("the controls")
    return wrong


def _told(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is read from clocks and meters, nor which steps were timed."""
    return {n: v for n, v in values.items() if n != "timed" and not any(c in n for c in CLOCKED)}


def _start(job: str, root: Path) -> int:
    """The work in a process of its own, which saves as often as it can; its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        said = os.open(f"{root}.said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream, target in enumerate((null, null, said)):
            os.dup2(target, stream)
        torch.set_num_threads(1)
        if job == "pretrain":  # in a cache of its own: a model that is there is not made again
            os.environ[CACHE_VARIABLE] = f"{root}-cache"
            plugins.load(tiny_text.__file__)
        solving.CHECKPOINT_SECONDS = 0.0
        store = RunStore(root)
        wanted = experiments(job)
        if job == "sweep":
            run_all(wanted, store, workers=2, progress=False, checkpoint_seconds=0.0)
        else:
            run(wanted[0], store, progress=False, checkpoint_seconds=0.0)
        code = 0
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _await_checkpoint(root: Path, process: int) -> None:
    """Until something is saved, or the process has ended, which is not waited for here."""
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end and not any(p.is_file() for p in (root / ".partial").rglob("*")):
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.01)


def _wait(process: int, seconds: float) -> int | None:
    """The exit code, negative for a signal; None where it had to be killed for its time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None
