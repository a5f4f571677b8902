"""Bringing older records to today's form: schema 1 to 2, and fields that deltas have since gained.

A record's id, configuration, result and provenance stay as they are. Of schema 1 nothing held the
result to what was measured; an upgraded record is under a digest from then on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltacontrol.experiments.runs.record import (
    CONTROLS_FILE,
    RUN_FILE,
    SCHEMA,
    Record,
    read,
    sealed,
)
from deltacontrol.theory.errors import InputError


def upgrade(folder: Path) -> Record:
    """Rewrite a record's run.json where it is not in today's form, and return the record.

    Raises:
        InputError: The record is damaged, or of a schema that is not known here.
    """
    path = folder / RUN_FILE
    if folder.is_symlink() or path.is_symlink():
        raise InputError(f"{folder} is a link, or holds one, and is left as it is")
    try:
        before = path.read_text(encoding="utf-8")
        document = json.loads(before)
        if document["schema"] != 1:
            read(folder)  # what is damaged must not be given a new digest
        after = json.dumps(upgraded(document, folder), indent=2, allow_nan=False) + "\n"
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no record of a run: {error}") from error
    temporary = folder / f".{RUN_FILE}"
    temporary.write_text(after, encoding="utf-8")
    try:
        os.replace(temporary, path)
        return read(folder)
    except InputError:
        path.write_text(before, encoding="utf-8")
        raise


def upgraded(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A record's document in today's form."""
    from deltacontrol.deltas.registry import completed  # imports torch

    found = {name: value for name, value in document.items() if name != "completed"}
    if document["schema"] == 1:
        missing = CONTROLS_FILE in document["files"] and not (folder / CONTROLS_FILE).exists()
        found |= {
            "schema": SCHEMA,
            "message": document.get("message", ""),
            "left_out": [CONTROLS_FILE] if missing else [],
        }
    whole = completed(document["config"])
    if whole != document["config"]:
        found["completed"] = whole
    return sealed(found)
