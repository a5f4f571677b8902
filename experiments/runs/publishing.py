"""Publishing run records: copies among the committed ones, without their trained controls."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from deltacontrol.experiments.runs.record import (
    CONTROLS_FILE,
    CURVE_FILE,
    RUN_FILE,
    Record,
    read,
    sealed,
)
from deltacontrol.experiments.runs.store import COMMITTED, RunStore
from deltacontrol.theory.errors import InputError


def publish(
    records: Sequence[Record], under: str, root: Path = COMMITTED, *, exactly: bool = False
) -> None:
    """Copy records to the folder `under` of the committed ones.

    A record that is committed already, in whatever folder, is left where it is. What is left out of
    a copy is named in its run.json.

    Args:
        records: The records.
        under: A folder in `root`, such as ``"figures/spectra"``.
        root: The folder of the committed records.
        exactly: Whether to remove every other record from that folder.

    Raises:
        InputError: A record is damaged, or was measured by code that no commit holds, or the folder
            cannot be written.
    """
    folder = root / under
    committed = {r.id for r in RunStore(folder, committed=root).records()}
    wanted = {record.id for record in records}
    modified = [
        record.id
        for record in records
        if record.id not in committed and record.provenance.get("project", {}).get("modified")
    ]
    if modified:
        raise InputError(
            f"{len(modified)} runs were computed from a modified checkout, the first of them "
            f"{modified[0]}; commit, compute them anew, and publish then"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if exactly:
            for old in RunStore(folder).records():
                if old.id not in wanted:
                    shutil.rmtree(old.folder)
        for record in records:
            if record.id not in committed:
                _copy(read(record.folder), folder / record.id)
    except OSError as error:
        raise InputError(
            f"cannot publish records to {folder}: {error.strerror or error}"
        ) from error


def _copy(record: Record, target: Path) -> None:
    document = json.loads((record.folder / RUN_FILE).read_text(encoding="utf-8"))
    document["left_out"] = [CONTROLS_FILE] if CONTROLS_FILE in record.files else []
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        shutil.copyfile(record.folder / CURVE_FILE, temporary / CURVE_FILE)
        text = json.dumps(sealed(document), indent=2, allow_nan=False) + "\n"
        (temporary / RUN_FILE).write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    read(target)
