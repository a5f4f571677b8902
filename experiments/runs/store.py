"""Where run records are kept, found and written.

    <store>/<run id>/run.json              configuration, provenance, status, result
                     curve.parquet         one row per step
                     controls.safetensors  the trained controls, if any

Records have two homes: a folder of the user's, ``runs`` beside their project, and the committed
records that come with the package, in sub-folders of ``experiments/records``. `both_homes` looks in
both, the user's first, and writes to the user's only.

A record is written to a temporary folder in the same store and renamed: it is there whole or not
at all. Hidden folders of a store (`.partial`, `.locks`) hold work in progress and are not records;
neither are `claims`, where judged claims are kept, and `tracking`, which is the trackers'.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltacontrol.experiments import tracking
from deltacontrol.experiments.runs import index, provenance
from deltacontrol.experiments.runs.experiment import (
    Digests,
    Experiment,
    Outcome,
    Workspace,
    canonical_json,
    digests_of,
    run_id,
)
from deltacontrol.experiments.runs.record import (
    CONTROLS_FILE,
    CURVE_FILE,
    RUN_FILE,
    SCHEMA,
    Record,
    fingerprint,
    read,
    sealed,
)
from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import torch

__all__ = [
    "COMMITTED",
    "Digests",
    "Experiment",
    "Outcome",
    "Record",
    "RunStore",
    "Workspace",
    "both_homes",
    "configuration",
    "read",
    "run_id",
]

COMMITTED = next(p for p in Path(__file__).resolve().parents if p.name == "experiments") / "records"
CLAIMS = "claims"  # the folder of judged claims, in either home
_IDENTITY = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class RunStore:
    """A folder of records to write to, and perhaps another one that is only read.

    Attributes:
        root: The folder; made at the first write.
        keep_controls: Whether `write` keeps the trained controls.
        committed: A folder whose sub-folders, at any depth, hold further records.
    """

    root: Path
    keep_controls: bool = True
    committed: Path | None = None

    def __post_init__(self) -> None:
        """Accept a string for `root`.

        Raises:
            InputError: it is no path.
        """
        if not isinstance(self.root, str | os.PathLike):
            raise InputError(f"the folder of runs is {self.root!r}; expected a path, such as runs")
        object.__setattr__(self, "root", Path(self.root))

    def path(self, experiment: Experiment) -> Path:
        """The folder in `root` where the record of `experiment` is, or will be."""
        return self.root / run_id(experiment.kind, experiment.to_config(), digests_of(experiment))

    def partial(self, experiment: Experiment) -> Path:
        """The folder for the checkpoints of a run that has not finished."""
        return self.root / ".partial" / self.path(experiment).name

    def find(self, experiment: Experiment) -> Record | None:
        """The record of `experiment`, or None; raises `InputError` where it is damaged."""
        own = self.path(experiment)
        if os.path.lexists(own):
            return read(own)
        folder = self._committed().get(own.name)
        return None if folder is None else read(folder)

    def lookup(self, experiments: Sequence[Experiment]) -> list[Record | None]:
        """For each experiment the record of its configuration, whatever the digests, or None.

        The user's record goes before the committed one.

        Raises:
            InputError: A home has two records of one of the configurations.
        """
        found: dict[str, Record] = {}
        wanted = [configuration(experiment) for experiment in experiments]
        relevant = set(wanted)
        for record in self.listed():
            key = configuration(record)
            other = found.setdefault(key, record)
            if other is not record and key in relevant and self._own(other) == self._own(record):
                raise InputError(
                    f"there are two records of one configuration, {other.folder} and "
                    f"{record.folder}, from different model or data files; delete the one that is "
                    "out of date"
                )
        return [read(found[key].folder, whole=False) if key in found else None for key in wanted]

    def records(self) -> list[Record]:
        """All records by id, those in `root` first; what is no whole record is skipped with a note.

        Every run.json is checked; the files beside it are checked when they are read.
        """
        return self._all(indexed=False)

    def listed(self, *, warn: bool = True) -> list[Record]:
        """As `records`, sooner: what an index of `root` remembers is not read again.

        It remembers that a run.json of this very size and these times was checked
        (`deltacontrol.experiments.runs.index`). Whoever uses a record's numbers, and does not only
        list them, takes `find`, `get`, `lookup` or `records`.
        """
        return self._all(indexed=True, warn=warn)

    def _all(self, *, indexed: bool, warn: bool = True) -> list[Record]:
        folders = self._folders(warn=warn)
        found, skipped = {}, []
        if indexed:
            own = {name: path for name, path in folders.items() if path.parent == self.root}
            found, skipped = index.listed(self.root, own)
            folders = {name: path for name, path in folders.items() if name not in own}
        for name, folder in folders.items():
            try:
                found[name] = read(folder, whole=False)
            except (InputError, OSError):
                skipped.append(folder)
        if skipped and warn:
            names = ", ".join(map(str, skipped[:3])) + ", ..." * (len(skipped) > 3)
            where = "" if self.root == Path("runs") else f" --runs {self.root}"
            warnings.warn(
                f"skipped {len(skipped)} folders that hold no whole record of this version: "
                f"{names}; `deltacontrol runs --show {skipped[0].name}{where}` says what is wrong",
                stacklevel=3,
            )
        return list(found.values())

    def folders(self) -> list[Path]:
        """The folders in `root` that are named as records are, whole or not."""
        return list(replace(self, committed=None)._folders(warn=False).values())

    @typed
    def get(self, beginning: str) -> Record:
        """The record whose id starts so, in `root` before the committed ones.

        Raises:
            InputError: No id starts so, or several do, or the record is damaged.
        """
        folders = self._folders(warn=False)
        found = [folder for name, folder in folders.items() if name.startswith(beginning)]
        found = [folder for folder in found if folder.parent == self.root] or found
        if not found:
            package = "" if self.committed is None else " or of those that come with the package"
            raise InputError(
                f"unknown run {beginning!r}: no id of the records in {self.root}{package} begins "
                "so; `deltacontrol runs --committed` lists them"
            )
        if len(found) > 1:
            names = ", ".join(folder.name for folder in found[:3]) + ", ..." * (len(found) > 3)
            raise InputError(
                f"{len(found)} runs have an id that begins with {beginning!r} ({names}); give more "
                "of the id"
            )
        return read(found[0])

    def _own(self, record: Record) -> bool:
        return record.folder.parent == self.root

    def _folders(self, *, warn: bool) -> dict[str, Path]:
        """The folders that are named as records are, by id; in `root` before the committed ones."""
        try:
            names = sorted(_entries(self.root)) if self.root.exists() else []
        except OSError as error:
            raise unwritable(self.root, error) from error
        known = (CLAIMS, tracking.FOLDER)
        strays = [n for n in names if not _IDENTITY.fullmatch(n) and n[0] != "." and n not in known]
        if strays and warn:
            shown = ", ".join(map(repr, strays[:3])) + ", ..." * (len(strays) > 3)
            warnings.warn(
                f"skipped {len(strays)} folders in {self.root} that are not records: {shown}",
                stacklevel=4,
            )
        own = {name: self.root / name for name in names if _IDENTITY.fullmatch(name)}
        return own | {n: path for n, path in self._committed().items() if n not in own}

    def _committed(self) -> dict[str, Path]:
        if self.committed is None:
            return {}
        found = sorted(_nested(os.fspath(self.committed)), reverse=True)
        return {os.path.basename(path): Path(path) for path in found}

    def write(
        self,
        experiment: Experiment,
        result: dict[str, Any],
        curve: pd.DataFrame,
        controls: dict[str, torch.Tensor] | None = None,
        wall_s: float | None = None,
        processor_s: float | None = None,
        *,
        status: str = "completed",
        message: str = "",
        started: datetime | None = None,
        digests: Digests | None = None,
    ) -> Record:
        """Write a record, whole or not at all, and return it.

        A record that appeared meanwhile is kept, and returned in place of this one. `digests` are
        those of what the run read, taken before it began; by default they are taken now.

        Raises:
            InputError: The folder cannot be written (permissions, disk full).
        """
        config, digests = experiment.to_config(), digests or digests_of(experiment)
        identity = run_id(experiment.kind, config, digests)
        target = self.root / identity
        temporary = self.root / ".partial" / identity / f"record-{uuid.uuid4().hex[:8]}"
        finished = datetime.now(UTC)
        try:
            temporary.mkdir(parents=True)
            curve.to_parquet(temporary / CURVE_FILE, index=False)
            if controls and self.keep_controls:
                write_tensors(temporary / CONTROLS_FILE, controls)
            document = {
                "schema": SCHEMA,
                "id": identity,
                "kind": experiment.kind,
                "config": config,
                "digests": digests.to_dict(),
                "provenance": {
                    "seeds": {k: v for k, v in config.items() if k.split("_")[-1] == "seed"},
                    "packages": provenance.package_versions(),
                    "project": provenance.project_commit(),
                    "hardware": provenance.hardware(),
                    "started": (started or finished).isoformat(timespec="seconds"),
                    "finished": finished.isoformat(timespec="seconds"),
                    "wall_seconds": wall_s,
                    "processor_seconds": processor_s,
                },
                "status": status,
                "message": message,
                "result": _finite(result),
                "files": {p.name: fingerprint(p) for p in sorted(temporary.iterdir())},
                "left_out": [],
            }
            text = json.dumps(sealed(document), indent=2, allow_nan=False) + "\n"
            (temporary / RUN_FILE).write_text(text, encoding="utf-8")
            for path in temporary.iterdir():
                _flush(path)
            _rename(temporary, target)
        except OSError as error:
            raise unwritable(self.root, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return read(target)


def both_homes(root: Path | str = "runs", *, keep_controls: bool = True) -> RunStore:
    """The user's folder `root` together with the records that come with the package.

    Raises:
        InputError: there is a file of that name.
    """
    if Path(root).is_file():
        raise InputError(f"{root} is a file; --runs takes a folder of records")
    return RunStore(Path(root), keep_controls, COMMITTED)


def configuration(run: Experiment | Record) -> str:
    """One text per kind, configuration and users' code, whatever the model's and data's files."""
    if isinstance(run, Record):
        config, code = run.config, run.provenance.get("digests", {}).get("code")
    else:
        config, code = run.to_config(), run.code()
    return canonical_json([run.kind, config, *filter(None, [code])])


def _entries(folder: Path | str) -> Iterator[str]:
    """Names of the folders and links in `folder`; no link is followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) or entry.is_symlink():
                yield entry.name


def _nested(folder: str) -> Iterator[str]:
    """Folders below `folder`, at any depth, that are named as records are."""
    if os.path.isdir(folder) and not os.path.islink(folder):
        for name in _entries(folder):
            path = os.path.join(folder, name)
            if _IDENTITY.fullmatch(name):
                yield path
            elif name[0] != ".":
                yield from _nested(path)


def unwritable(folder: Path, error: OSError) -> InputError:
    """The message for a run folder that cannot be used."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space there, or choose another run folder"
    else:
        advice = "choose a run folder that this user can write to"
    return InputError(f"cannot use the run folder {folder}: {reason}; {advice}")


def _finite(value: Any) -> Any:
    """`value` with every non-finite number replaced by None, since JSON has no NaN."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; any failure is an `OSError`, with its number where it has one."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    copies = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    try:
        save_file(copies, path, metadata=metadata)
    except SafetensorError as error:  # keeps the system's error as text: "... (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(str(error)) from error
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError:
        if not target.is_dir():
            raise
