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
    """Processor, cores, threads in use and GPU. Asks torch only where the run has imported it."""
    torch = sys.modules.get("torch")
    return {
        "processor": processor_name(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads() if torch is not None else None,
        "gpu": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
    }
