"""A store of run records.

    <store>/<run id>/run.json              configuration, provenance, status, result
                     curve.parquet         one row per step
                     controls.safetensors  the trained controls, if any

A record is written to a temporary folder in the same store and renamed: it is there whole or not at
all. Hidden folders of a store (`.partial`, `.locks`) hold work in progress and are not records.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltacontrol.experiments.runs import provenance
from deltacontrol.experiments.runs.experiment import (
    Digests,
    Experiment,
    Outcome,
    Workspace,
    canonical_json,
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
)
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    import pandas as pd
    import torch

__all__ = ["Digests", "Experiment", "Outcome", "Record", "RunStore", "Workspace", "read", "run_id"]


@dataclass(frozen=True)
class RunStore:
    """A folder of records.

    Attributes:
        root: The folder; made at the first write.
        keep_controls: Whether `write` keeps the trained controls.
    """

    root: Path
    keep_controls: bool = True

    def __post_init__(self) -> None:
        """Accept a string for `root`."""
        object.__setattr__(self, "root", Path(self.root))

    def path(self, experiment: Experiment) -> Path:
        """The folder where the record of `experiment` is, or will be."""
        return self.root / run_id(experiment.kind, experiment.to_config(), experiment.digests())

    def partial(self, experiment: Experiment) -> Path:
        """The folder for the checkpoints of a run that has not finished."""
        return self.root / ".partial" / self.path(experiment).name

    def find(self, experiment: Experiment) -> Record | None:
        """The record of `experiment`, or None; raises `InputError` where it is damaged."""
        folder = self.path(experiment)
        return read(folder) if folder.exists() else None

    def matching(self, experiment: Experiment) -> list[Record]:
        """Records of the same configuration, whatever the digests: needs no model and no data."""
        wanted = (experiment.kind, canonical_json(experiment.to_config()))
        return [r for r in self.records() if (r.kind, canonical_json(r.config)) == wanted]

    def records(self) -> list[Record]:
        """All records, sorted by id; raises `InputError` at the first damaged one."""
        if not self.root.exists():
            return []
        try:
            folders = sorted(p for p in self.root.iterdir() if p.is_dir() and p.name[0] != ".")
        except OSError as error:
            raise unwritable(self.root, error) from error
        return [read(folder) for folder in folders]

    def get(self, beginning: str) -> Record:
        """The record whose id starts so; raises `InputError` where it is not exactly one."""
        records = self.records()
        found = [record for record in records if record.id.startswith(beginning)]
        if len(found) != 1:
            raise unknown("run", beginning, [record.id for record in records])
        return found[0]

    def write(
        self,
        experiment: Experiment,
        result: dict[str, Any],
        curve: pd.DataFrame,
        controls: dict[str, torch.Tensor] | None = None,
        wall_s: float | None = None,
        *,
        status: str = "completed",
        message: str = "",
        started: datetime | None = None,
    ) -> Record:
        """Write a record, whole or not at all, and return it.

        A record that appeared meanwhile is kept, and returned in place of this one.

        Raises:
            InputError: The folder cannot be written (permissions, disk full).
        """
        config, digests = experiment.to_config(), experiment.digests()
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
                "digests": {"model": digests.model, "data": digests.data},
                "provenance": {
                    "seeds": {k: v for k, v in config.items() if k.split("_")[-1] == "seed"},
                    "packages": provenance.package_versions(),
                    "project": provenance.project_commit(),
                    "hardware": provenance.hardware(),
                    "started": (started or finished).isoformat(timespec="seconds"),
                    "finished": finished.isoformat(timespec="seconds"),
                    "wall_seconds": wall_s,
                },
                "status": status,
                "message": message,
                "result": _finite(result),
                "files": {p.name: fingerprint(p) for p in sorted(temporary.iterdir())},
            }
            text = json.dumps(document, indent=2, allow_nan=False) + "\n"
            (temporary / RUN_FILE).write_text(text, encoding="utf-8")
            for path in temporary.iterdir():
                _flush(path)
            _rename(temporary, target)
        except OSError as error:
            raise unwritable(self.root, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return read(target)


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
