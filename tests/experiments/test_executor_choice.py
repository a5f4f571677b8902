"""Executors by name, which one sweeps take, the order of runs, and what a worker may say."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.runs import failures, sweep
from deltacontrol.experiments.runs.executors import base, calls, hosting, registry
from deltacontrol.experiments.runs.executors.base import Executor, Look, Work
from deltacontrol.experiments.runs.executors.registry import executor_of, using
from deltacontrol.experiments.runs.store import RunStore
from deltacontrol.experiments.runs.sweep import run_all
from deltacontrol.theory.errors import InputError
from tests.experiments.toy_runs import PRELOADED, Toy, logged, toys


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "PRELOADED", PRELOADED)


def test_an_executor_is_a_text_with_options() -> None:
    assert set(registry.available()) == {"in-process", "processes", "ray", "slurm"}
    ray = executor_of("ray:cpus=2,gpus=0.5,memory=8,retries=0,address=10.0.0.1:6379,order=longest")
    assert (ray.cpus, ray.gpus, ray.memory, ray.retries) == (2, 0.5, 8.0, 0)  # type: ignore[attr-defined]
    assert ray.address == "10.0.0.1:6379" and ray.order == "longest"  # type: ignore[attr-defined]
    assert ray.threads(7) == 2
    for text, message in (
        ("rae", "unknown executor 'rae'; nearest: ray"),
        ("ray:gpu=1", "unknown field of the executor ray 'gpu'; nearest: gpus"),
        ("ray:cpus=0", "ray: cpus is 0; expected a number from 1 on"),
        ("slurm:retries=-1", "slurm: retries is -1; expected a number from 0 on"),
        ("processes:order=quick", "unknown order of the executor processes 'quick'"),
        (3, "the executor is 3; expected a text such as in-process"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            executor_of(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_what_is_not_installed_is_said_once(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = f'needs the package {package}, which is not installed: pip install "deltacontrol'
    with pytest.raises(InputError, match=re.escape(message)):
        run_all(toys(tmp_path / "log", "compute"), RunStore(tmp_path), 1, False, executor=name)


def test_the_command_line_names_executors(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("figures", "claims run", "tune", "compare lora bitfit", "dimension",
                    "pretrain --plan"):  # fmt: skip
        code = cli._main([*command.split(), "--executor", "cloud"])
        said = capsys.readouterr().err
        assert code == 2 and "unknown executor 'cloud'; known: in-process" in said, command
    assert cli._main(["claims", "list", "--executor", "processes"]) == 2
    assert "go with run" in capsys.readouterr().err


class Counting(Executor):
    """Makes calls here, and says what it was asked for."""

    name = "counting"
    asked: list[tuple[list[str], int]] = []

    def places(self) -> int:
        return 5

    def threads(self, workers: int) -> int:
        return 1

    def ends(self, work: Work, workers: int) -> Iterator[Look]:
        self.asked.append(
            ([work.calls[name].arguments[0][0].label for name in work.calls], workers)
        )
        for name in work.calls:
            end = calls.made(lambda: None, lambda name=name: work.function(
                *work.calls[name].arguments))  # fmt: skip
            yield Look({name: end}, [])


def test_sweeps_take_the_executor_that_is_being_used(tmp_path: Path) -> None:
    store, wanted = RunStore(tmp_path / "runs"), toys(tmp_path / "runs.log", *["compute"] * 9)
    mine = Counting()
    Counting.asked.clear()
    with using(mine):
        run_all(wanted[:7], store, progress=False)
        assert sweep.default_workers() == 5
    with using(mine, 2):
        run_all(wanted[7:8], store, progress=False)
        assert sweep.default_workers() == 2
    run_all(wanted[8:], store, 3, progress=False, executor=mine)
    assert [(len(labels), workers) for labels, workers in mine.asked] == [(7, 5), (1, 1), (1, 1)]
    with pytest.raises(InputError, match="workers is 0"), using(mine, 0):
        pass


def test_runs_begin_in_the_order_that_is_wanted(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    known = toys(tmp_path / "runs.log", "wait:0.3", "wait:0", "wait:0.15")
    run_all(known, store, 1, False, executor="in-process")
    # Like these but for the seed.
    again = [Toy(toy.seed + 10, toy.behaviour, toy.seconds, toy.log) for toy in known]
    for order, expected in (
        ("given", ["toy 10", "toy 11", "toy 12"]),
        ("longest", ["toy 10", "toy 12", "toy 11"]),
        ("shortest", ["toy 11", "toy 12", "toy 10"]),
    ):
        Counting.asked.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sweep, "worker", Nothing)
            with pytest.raises(InputError, match="3 of 3 runs failed"):
                run_all(again, store, 2, False, executor=Counting(order=order))  # type: ignore[arg-type]
        assert Counting.asked[0][0] == expected


class Nothing:
    """In the place of what workers call: runs that are never made."""

    @staticmethod
    def begin(*_: object) -> None:
        pass

    @staticmethod
    def record(wanted: list[Toy], *_: object) -> list[str]:
        return ["not made"] * len(wanted)


def test_a_run_without_its_record_says_that_the_folder_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Nothing, "record", lambda wanted, *_: [True] * len(wanted))
    monkeypatch.setattr(sweep, "worker", Nothing)
    with pytest.raises(InputError, match="must be one folder for this machine and for the workers"):
        run_all(
            toys(tmp_path / "log", "compute"), RunStore(tmp_path), 1, False, executor=Counting()
        )


def test_a_run_that_is_recorded_did_not_fail_whatever_its_worker_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_then_lost(wanted: list[Toy], names: list[str], store: RunStore, *_: object) -> None:
        sweep.run(wanted[0], store, progress=False)
        raise FileNotFoundError("the checkpoints were taken away by who was quicker")

    monkeypatch.setattr(Nothing, "record", made_then_lost)
    monkeypatch.setattr(sweep, "worker", Nothing)
    wanted = toys(tmp_path / "log", "compute")
    found = run_all(wanted, RunStore(tmp_path / "runs"), 1, False, executor=Counting())
    assert len(found) == 1 and not failures.failures(tmp_path / "runs")


def test_a_worker_with_other_files_does_not_record_another_run(tmp_path: Path) -> None:
    from deltacontrol.experiments.runs.scheduling import worker

    wanted, store = toys(tmp_path / "log", "compute"), RunStore(tmp_path / "runs")
    with pytest.raises(InputError, match="are others for its worker than they were where"):
        worker.record(list(wanted), ["0" * 16], store, 30.0, 1.0)
    assert not logged(tmp_path / "log") and not store.records()


def test_a_call_is_sent_as_a_text_that_needs_no_module(tmp_path: Path) -> None:
    """As a worker of a cluster gets it, which does not know where this project lies."""
    cloudpickle = pytest.importorskip("cloudpickle")
    work = Work(math.hypot, {"a": base.Call((3.0, 4.0), 60.0)}, abs)
    served = cloudpickle.dumps(hosting.sent(work, "a", 1))
    (tmp_path / "call").write_bytes(served)
    code = (
        "import pickle, sys; call = pickle.loads(open(sys.argv[1], 'rb').read());"
        "assert not [m for m in sys.modules if m.startswith('deltacontrol')];"
        "print(call().value)"
    )
    site = str(Path(cloudpickle.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "call")],
        env={"PYTHONPATH": site, "PATH": os.environ["PATH"]},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "5.0", done.stderr
