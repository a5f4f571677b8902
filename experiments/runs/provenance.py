"""Where a result came from: package versions, the project's commit, the hardware.

Nothing here names a user, a host or a path, so that a record can be published as it is.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from deltacontrol.theory.errors import InputError

PACKAGES = (
    "deltacontrol",
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "pandas",
    "pyarrow",
    "scikit-learn",
    "scipy",
    "cvxpy",
    "sympy",
    "numba",
    "peft",
    "torchdiffeq",
)


def usable_cores() -> int:
    """Number of processor cores that this process may use (its affinity, not the machine's)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def modified_files() -> list[str]:
    """The files of the checkout that hold what no commit does, as git names them.

    Raises:
        InputError: This file is not in a checkout.
    """
    folder = Path(__file__).resolve().parent
    try:
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        lines = _git(folder, "status", "--porcelain").splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(
            "publishing changes files of a checkout, and this is an installed package: clone the "
            "project and publish from there"
        ) from error
    return [line[3:] for line in lines]


def require_clean() -> None:
    """Refuse to publish what was measured by code that no commit holds.

    Raises:
        InputError: A file of the checkout is modified or not tracked, or there is no checkout.
    """
    found = modified_files()
    if found:
        names = ", ".join(found[:5]) + ", ..." * (len(found) > 5)
        raise InputError(
            f"publishing needs a clean checkout, and {len(found)} of its files hold what no commit "
            f"does: {names}; commit or remove them first"
        )
    project_commit()  # keeps what it finds: the commit as it is before anything is published


@cache
def project_commit() -> dict[str, Any]:
    """Commit of the checkout that holds this file: ``{"commit": hash, "modified": bool}``.

    Both are ``None`` for an installed wheel, where there is no checkout. An environment inside
    someone else's repository does not count: the file must be tracked.
    """
    folder = Path(__file__).resolve().parent
    nothing = {"commit": None, "modified": None}
    try:
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return nothing
    return {"commit": commit.strip(), "modified": bool(changes.strip())}


def last_change(file: Path) -> str | None:
    """The last commit that changed a file; None where it is in no checkout, or has no commit."""
    folder = file.resolve().parent
    try:
        return _git(folder, "log", "-1", "--format=%H", "--", file.name).strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=30
    ).stdout


def processor_name() -> str:
    """The processor's model name, as the operating system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, threads, GPU. Asks torch only where the run has imported it."""
    import psutil

    torch = sys.modules.get("torch")
    return {
        "processor": processor_name(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads() if torch is not None else None,
        "gpu": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
    }
