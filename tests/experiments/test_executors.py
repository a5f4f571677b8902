"""Who makes the runs of a sweep makes no difference, and a death costs nothing that is done."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltacontrol.experiments.runs import failures, sweep
from deltacontrol.experiments.runs.executors import base
from deltacontrol.experiments.runs.executors.base import Work
from deltacontrol.experiments.runs.executors.registry import executor_of
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run_all
from deltacontrol.theory.errors import InputError
from tests.experiments.toy_runs import PRELOADED, Toy, logged, toys

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = {"ray": "ray", "slurm:cluster=local": "submitit"}
PACKAGES = [
    pytest.param(
        name,
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(
                importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
            ),
        ],
    )
    for name, package in CLUSTERS.items()
]


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "PRELOADED", PRELOADED)


def told(record: Record) -> dict[str, Any]:
    """A record without where, when and by whom."""
    provenance = {name: record.provenance[name] for name in ("digests", "seeds", "packages")}
    names = ("id", "kind", "config", "result", "status", "message", "files", "left_out")
    return {name: getattr(record, name) for name in names} | provenance


def started(root: Path, executor: str, *runs: str, **more: str) -> subprocess.Popen[str]:
    """A sweep in a process of its own."""
    code = "from tests.experiments.toy_runs import main; main()"
    options = [text for name, value in more.items() for text in (f"--{name}", value)]
    # What has been added to the search path here, such as packages of a cluster, is there too.
    paths = [str(ROOT), str(ROOT / "src"), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(root), executor, *runs, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=root.parent,
    )


def finished(root: Path, executor: str, *runs: str, **more: str) -> tuple[int, str]:
    process = started(root, executor, *runs, **more)
    said, _ = process.communicate(timeout=1500)
    return process.returncode, said


def wait_until(condition: Callable[[], object], seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of 24 runs that are made here one by one."""
    folder = tmp_path_factory.mktemp("reference")
    wanted = toys(folder / "runs.log", *["compute"] * 24)
    return [told(r) for r in run_all(wanted, RunStore(folder / "runs"), 1, False)]


@pytest.mark.parametrize("executor", ["in-process", "processes"])
def test_records_are_the_same_whoever_makes_them(
    executor: str, tmp_path: Path, reference: list[dict[str, Any]]
) -> None:
    wanted = toys(tmp_path / "runs.log", *["compute"] * 24)
    found = run_all(wanted, RunStore(tmp_path / "runs"), 2, False, executor=executor)
    assert [told(record) for record in found] == reference
    processes = {process for _, process in logged(tmp_path / "runs")}
    assert processes == {os.getpid()} if executor == "in-process" else len(processes) == 24


@pytest.mark.parametrize("executor", PACKAGES)
def test_records_are_the_same_on_a_cluster(
    executor: str, tmp_path: Path, reference: list[dict[str, Any]]
) -> None:
    root = tmp_path / "runs"
    code, said = finished(root, executor, *["compute"] * 24)
    assert code == 0, said
    store = RunStore(root)
    found = [store.find(toy) for toy in toys(root.with_suffix(".log"), *["compute"] * 24)]
    assert [told(record) for record in found if record] == reference
    assert {r.provenance["hardware"]["threads"] for r in found if r} == {1}
    assert Counter(seed for seed, _ in logged(root)) == Counter(range(24))
    assert len({process for _, process in logged(root)}) == 24
    assert not list((root / ".locks").iterdir())
    assert not list(root.glob(".jobs/*/*.pkl"))


@pytest.mark.parametrize("executor", ["in-process", "processes"])
def test_failures_are_the_same_whoever_makes_the_runs(executor: str, tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    wanted = toys(tmp_path / "runs.log", "compute", "raise", "refuse", "exit", "nan")
    with pytest.raises(InputError, match="3 of 5 runs failed; the others are recorded") as raised:
        run_all(wanted, store, 2, False, executor=executor)
    for part in ("KeyError: 'lost'", "no such thing; try another", "called sys.exit(3)"):
        assert part in str(raised.value)
    assert [r.status for r in map(store.find, wanted) if r] == ["completed", "diverged"]
    assert len(failures.failures(store.root)) == 3


def test_in_process_leaves_threads_and_ctrl_c_to_its_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    store, wanted = RunStore(tmp_path / "runs"), toys(tmp_path / "runs.log", "compute", "compute")
    monkeypatch.setattr(base, "_SHARE", 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    record = run_all(wanted[:1], store, None, False, executor="in-process")[0]
    assert record.provenance["hardware"]["threads"] == 2 and torch.get_num_threads() == 1
    monkeypatch.setattr(Toy, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all(wanted, store, None, False, executor="in-process")
    assert torch.get_num_threads() == 1


def kill_all(root: Path, executor: str) -> None:
    """Kill a sweep; what it started on a cluster ends by itself, or goes on."""
    process = started(root, executor, *["compute"] * 3, *["wait:4"] * 3)
    try:
        wait_until(lambda: len(logged(root)) >= 5)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("executor", [pytest.param("processes", marks=pytest.mark.slow), *PACKAGES])
def test_a_killed_sweep_keeps_what_is_done_and_the_same_command_does_the_rest(
    executor: str, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    kill_all(root, executor)
    store, runs = RunStore(root), toys(root.with_suffix(".log"), *["compute"] * 3, *["wait:4"] * 3)
    assert all(store.find(toy) for toy in runs[:3])
    code, said = finished(root, executor, *["compute"] * 3, *["wait:4"] * 3)
    assert code == 0, said
    assert all(store.find(toy) for toy in runs)
    beginnings = Counter(seed for seed, _ in logged(root))
    assert all(beginnings[seed] == 1 for seed in range(3))  # what was recorded, once
    assert all(beginnings[seed] <= 2 for seed in range(6))


def killed_worker(root: Path) -> int:
    wait_until(lambda: any(seed == 1 for seed, _ in logged(root)))
    process = next(process for seed, process in logged(root) if seed == 1)
    time.sleep(0.5)
    os.kill(process, signal.SIGKILL)
    return process


@pytest.mark.slow
def test_a_killed_process_fails_alone_and_the_same_command_does_it(tmp_path: Path) -> None:
    root, runs = tmp_path / "runs", ("compute", "once:60", "compute")
    process = started(root, "processes", *runs)
    killed_worker(root)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 2 and "1 of 3 runs failed" in said
    assert "died without a message (signal 9)" in said
    assert finished(root, "processes", *runs)[0] == 0
    assert Counter(seed for seed, _ in logged(root)) == {0: 1, 1: 2, 2: 1}


@pytest.mark.parametrize("executor", PACKAGES)
def test_a_killed_worker_of_a_cluster_is_replaced(executor: str, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    process = started(root, executor, "compute", "once:60", "compute", "die")
    killed_worker(root)
    said, _ = process.communicate(timeout=1500)
    assert process.returncode == 2 and "1 of 4 runs failed" in said
    assert "(tried 3 times)" in said  # the one that kills each of its workers
    assert Counter(seed for seed, _ in logged(root)) == {0: 1, 1: 2, 2: 1, 3: 3}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_a_killed_head_of_ray_keeps_what_is_done(tmp_path: Path) -> None:
    import psutil

    root, runs = tmp_path / "runs", ("compute", "compute", "once:600", "compute")
    process = started(root, "ray", *runs)
    wait_until(lambda: any(seed == 2 for seed, _ in logged(root)))
    servers = [p for p in psutil.Process(process.pid).children(recursive=True)
               if p.name() in ("gcs_server", "raylet")]  # fmt: skip
    assert {server.name() for server in servers} == {"gcs_server", "raylet"}
    for server in servers:
        server.kill()
    try:
        process.communicate(timeout=300)
        assert process.returncode != 0
    finally:
        process.kill()
    store = RunStore(root)
    wanted = toys(root.with_suffix(".log"), *runs)
    assert all(store.find(toy) for toy in wanted[:2])
    code, said = finished(root, "ray", *runs)
    assert code == 0, said
    assert all(map(store.find, wanted))


@pytest.mark.slow  # a limit that a busy machine does not reach by itself is half a minute
def test_each_of_two_hundred_runs_is_accounted_for(tmp_path: Path) -> None:
    behaviours = ["compute"] * 182 + ["raise"] * 10 + ["nan"] * 4 + ["hang"] * 2 + ["exit"] * 2
    order = [behaviours[(37 * n) % 200] for n in range(200)]  # 37 and 200 have no common factor
    wanted, store = toys(tmp_path / "runs.log", *order), RunStore(tmp_path / "runs")
    with pytest.raises(InputError) as raised:
        run_all(wanted, store, 2, False, limit_minutes=0.5)
    said = str(raised.value)
    assert said.startswith("14 of 200 runs failed; the others are recorded")
    assert Counter(re.findall(r"KeyError|limit of 0.5 minutes|sys.exit\(3\)", said)) == {
        "KeyError": 10, "limit of 0.5 minutes": 2, "sys.exit(3)": 2
    }  # fmt: skip
    found = [store.find(toy) for toy in wanted]
    statuses = Counter(record.status if record else "failed" for record in found)
    assert statuses == {"completed": 182, "diverged": 4, "failed": 14}
    assert all((r.result["loss"] is None) == (r.status == "diverged") for r in found if r)
    kept = failures.failures(store.root)
    names = {store.path(toy).name for toy, r in zip(wanted, found, strict=True) if r is None}
    assert {failure.id for failure in kept} == names and all(f.reason for f in kept)
    assert len(logged(tmp_path / "runs")) == 200
    print(f"\n{dict(statuses)}; reasons: {Counter(f.reason.split(':')[0] for f in kept)}")


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="no submitit here")
def test_jobs_of_slurm_are_arrays_with_their_resources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be handed to Slurm, by commands that only write down what they were given."""
    handed = tmp_path / "handed"
    for name, line in {
        "sbatch": f'cat "$1" >> {handed}; n=$(grep -c "#SBATCH --time" {handed})\n'
        'echo "Submitted batch job $n"',
        "srun": "exit 1",
    }.items():
        command = tmp_path / name
        command.write_text(f"#!/bin/bash\n{line}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm = executor_of("slurm:partition=gpu,account=me,cpus=4,gpus=1,memory=8")
    seconds = {"a": 600.0, "b": 600.0, "c": 1200.0}
    work = Work(math.hypot, {n: base.Call((), s) for n, s in seconds.items()}, abs, (), tmp_path)
    with slurm.session(None):
        jobs = slurm.hand_over(work, dict.fromkeys(seconds, lambda: base.End(1)), 1)  # type: ignore[attr-defined]
    assert {name: job.job_id for name, job in jobs.items()} == {"a": "1_0", "b": "1_1", "c": "2"}
    lines = handed.read_text().splitlines()
    for option, times in {
        "--array=0-1%1": 1, "--partition=gpu": 2, "--account=me": 2, "--cpus-per-task=4": 2,
        "--gpus-per-node=1": 2, "--mem=8GB": 2, "--time=15": 1, "--time=25": 1,
    }.items():  # fmt: skip
        assert lines.count(f"#SBATCH {option}") == times, (option, lines)
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho no such partition >&2; exit 1\n")
    with pytest.raises(InputError, match="Slurm took no job: .*; try `sbatch` by hand"):
        slurm.hand_over(work, {"a": lambda: base.End(1)}, 16)  # type: ignore[attr-defined]
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="there is no sbatch here"), slurm.session(None):
        pass
