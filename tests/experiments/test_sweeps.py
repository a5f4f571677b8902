"""Sweeps: every run once, failures that cost nobody else, and death at any moment."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deltacontrol.experiments.runs import failures
from deltacontrol.experiments.runs import sweep as sweeps
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run, run_all, threads_each
from deltacontrol.theory.errors import InputError

ROOT = Path(__file__).resolve().parents[2]

TOY = """
import os, time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar
import pandas as pd
from deltacontrol.experiments.runs.store import Experiment, Outcome
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class Toy(Experiment):
    kind: ClassVar[str] = "toy"
    name: str = "a"
    behaviour: str = "finish"
    log: str = ""

    def to_config(self):
        return asdict(self)

    @property
    def label(self):
        return f"toy {self.name}"

    def execute(self, workspace):
        with open(self.log, "a") as file:
            file.write(f"{self.name} {os.getpid()}\\n")
        if self.behaviour == "refuse":
            raise InputError("no such thing; try another")
        if self.behaviour == "fail":
            raise KeyError("lost")
        if self.behaviour == "exit":
            raise SystemExit(3)
        if self.behaviour == "die":
            os._exit(9)
        if self.behaviour == "sleep":
            time.sleep(2.0)
        if self.behaviour == "hang":
            time.sleep(300)
        return Outcome("completed", {"name": self.name}, pd.DataFrame({"step": [1]}))
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A class of experiments in a module that worker processes can import."""
    (tmp_path / "toy_experiments.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("toy_experiments", None)
    module = importlib.import_module("toy_experiments")
    log = tmp_path / "log"

    def make(name, behaviour="finish"):
        return module.Toy(name, behaviour, str(log))

    make.log = lambda: log.read_text().split("\n")[:-1] if log.exists() else []
    return make


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "runs")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float = 300.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def test_one_run(toy, store):
    record = run(toy("a"), store, progress=False)
    assert record.result == {"name": "a"} and record.provenance["wall_seconds"] > 0
    assert run(toy("a"), store, progress=False) == record
    assert len(toy.log()) == 1 and not list((store.root / ".partial").iterdir())


def test_every_run_once_in_its_own_process_in_order(toy, store):
    names = ["c", "a", "b", "a"]
    records = run_all([toy(n) for n in names], store, workers=2, progress=False)
    assert [r.result["name"] for r in records] == names
    pids = {line.split()[1] for line in toy.log()}
    assert len(toy.log()) == len(pids) == 3 and str(os.getpid()) not in pids
    times = [r.folder.stat().st_mtime_ns for r in records]
    again = run_all([toy(n) for n in [*names, "d"]], store, workers=2, progress=False)
    assert [r.folder.stat().st_mtime_ns for r in again[:4]] == times
    assert len(toy.log()) == 4
    assert {r.provenance["hardware"]["threads"] for r in again} == {threads_each(2)}


def test_failures_are_named_and_cost_nobody_else(toy, store):
    runs = [
        toy("good"),
        toy("refused", "refuse"),
        toy("failed", "fail"),
        toy("dead", "die"),
        toy("fine"),
        toy("last"),
    ]
    with pytest.raises(InputError) as raised:
        run_all(runs, store, workers=2, progress=False)
    text = str(raised.value)
    assert text.startswith("3 of 6 runs failed; the others are recorded")
    for part in (
        "toy refused",
        "no such thing; try another",
        "toy failed",
        "KeyError: 'lost'",
        "toy dead",
        "perhaps for lack of memory",
    ):
        assert part in text
    assert [r.result["name"] for r in map(store.find, runs) if r] == ["good", "fine", "last"]


def test_workers_must_be_positive(toy, store):
    with pytest.raises(InputError, match="workers is 0"):
        run_all([toy("a")], store, workers=0)


def script(tmp_path: Path, body: str) -> list[str]:
    path = tmp_path / "sweep_script.py"
    path.write_text(textwrap.dedent(body))
    return [sys.executable, str(path)]


def environment(tmp_path: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), str(tmp_path)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


SWEEP = """
    import sys
    from deltacontrol.experiments.runs.store import RunStore
    from deltacontrol.experiments.runs import sweep as sweeps
    from toy_experiments import Toy
    sweeps.PRELOADED = ("torch",)
    if __name__ == "__main__":
        pairs = [text.split(":") for text in sys.argv[3:]]
        experiments = [Toy(name, behaviour, sys.argv[2]) for name, behaviour in pairs]
        sweeps.run_all(experiments, RunStore(sys.argv[1]), workers=2, progress=False)
"""


def start(tmp_path, store, *pairs) -> subprocess.Popen:
    command = [*script(tmp_path, SWEEP), str(store.root), str(tmp_path / "log"), *pairs]
    return subprocess.Popen(
        command,
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background ignore Ctrl-C, which a child inherits.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.one_in(2)
def test_workers_end_with_their_parent(toy, store, tmp_path, how):
    parent = start(tmp_path, store, "a:hang", "b:hang")
    wait_until(lambda: len(toy.log()) == 2)
    pids = [int(line.split()[1]) for line in toy.log()]
    assert all(map(alive, pids))
    parent.send_signal(how)
    assert parent.wait(120) != 0
    parent.stderr.close()
    wait_until(lambda: not any(map(alive, pids)))
    assert store.records() == []


def test_two_sweeps_on_one_store_compute_each_run_once(toy, store):
    def sweep(_):
        return run_all([toy(name, "sleep") for name in "abc"], store, workers=2, progress=False)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(sweep, range(2))
    assert first == second and len(first) == 3
    assert sorted(line.split()[0] for line in toy.log()) == ["a", "b", "c"]


def test_waiting_for_another_sweep_takes_no_process_and_no_time_of_the_limit(
    toy, store, monkeypatch
):
    others = sweeps.locked(store, store.path(toy("b")).name, block=False)
    assert others.__enter__()
    alive_then = []

    def is_free(sweep, name):
        alive_then.append(len(multiprocessing.active_children()))
        if len(alive_then) == 3:
            others.__exit__(None, None, None)
        return free(sweep, name)

    free = sweeps._Sweep._is_free
    monkeypatch.setattr(sweeps._Sweep, "_is_free", is_free)
    monkeypatch.setattr(sweeps, "WAIT_SECONDS", 0.0)
    records = run_all([toy("a"), toy("b")], store, workers=2, progress=False)
    assert [record.result["name"] for record in records] == ["a", "b"]
    assert alive_then == [0, 0, 0]


@pytest.mark.slow  # a limit that a busy machine does not reach by itself is half a minute
def test_a_run_that_exits_dies_or_hangs_fails_alone_and_is_listed(toy, store, capsys):
    from deltacontrol.experiments.cli import main as cli

    runs = [toy("good"), toy("left", "exit"), toy("stuck", "hang"), toy("dead", "die"), toy("last")]
    with pytest.raises(InputError, match=r"3 of 5 runs failed; the others are recorded"):
        run_all(runs, store, workers=2, progress=False, limit_minutes=0.4)
    assert [r.result["name"] for r in map(store.find, runs) if r] == ["good", "last"]
    capsys.readouterr()
    assert cli._main(["runs", "--runs", str(store.root), "--failed"]) == 0
    said = capsys.readouterr().out
    for label, reason in (
        ("toy left", "it called sys.exit(3)"),
        ("toy stuck", "stopped at its limit of 0.4 minutes"),
        ("toy dead", "died without a message (exit code 9)"),
    ):
        assert label in said and reason in said
    assert len(toy.log()) == 5  # each once

    failed = failures.failures(store.root)
    failures.keep(store.root, store.path(runs[0]).name, runs[0], "once")
    assert failures.failures(store.root) == failed  # it is recorded
    (store.root / ".failed" / "x.json").write_text("[")
    store.path(runs[0]).rename(store.root.parent / "away")
    assert len(failures.failures(store.root)) == 4
    run(runs[0], store, progress=False)
    assert failures.failures(store.root) == failed


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("inf"), float("nan")])
def test_the_limit_is_finite(toy, store, minutes):
    with pytest.raises(InputError, match="limit_minutes is"):
        run_all([toy("a")], store, limit_minutes=minutes)
    with pytest.raises(InputError, match="limit_minutes is"):
        run(toy("a"), store, limit_minutes=minutes)


@pytest.mark.slow
def test_a_killed_fork_server_costs_no_run(toy, store):
    from multiprocessing import forkserver

    def killed():
        wait_until(lambda: len(toy.log()) == 1)
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(killed)
        records = run_all([toy("a", "sleep"), toy("b"), toy("c")], store, workers=1, progress=False)
        waiting.result()
    assert [record.result["name"] for record in records] == ["a", "b", "c"]
