"""Reading a run's record: a folder of run.json, curve.parquet and maybe controls.safetensors.

A record that is damaged is never passed over: the error names the file and says what to do.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltacontrol.experiments.runs.experiment import Digests, run_id
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import torch

SCHEMA = 1
RUN_FILE, CURVE_FILE, CONTROLS_FILE = "run.json", "curve.parquet", "controls.safetensors"
_FIELDS = ("schema", "id", "kind", "config", "digests", "provenance", "status", "result", "files")


@dataclass(frozen=True)
class Record:
    """A finished run, as read from its folder.

    Attributes:
        id: The run id.
        kind: The experiment's kind, such as "fine-tuning".
        config: The configuration.
        result: The result; numbers that were not finite are None.
        provenance: Seeds, digests, versions, commit, hardware, times.
        status: How the run ended.
        message: A sentence on how it ended; may be empty.
        folder: Where the record lies.
    """

    id: str
    kind: str
    config: dict[str, Any]
    result: dict[str, Any]
    provenance: dict[str, Any]
    status: str
    message: str = ""
    folder: Path = field(default=Path(), compare=False, repr=False)

    def curve(self) -> pd.DataFrame:
        """The recorded curve, one row per step."""
        import pandas as pd

        try:
            return pd.read_parquet(self.folder / CURVE_FILE)
        except Exception as error:
            raise damaged(self.folder / CURVE_FILE, str(error)) from error

    def controls(self) -> dict[str, torch.Tensor]:
        """The trained controls; raises `InputError` where the record was kept without them."""
        from safetensors.torch import load_file

        path = self.folder / CONTROLS_FILE
        if not path.exists():
            raise InputError(f"run {self.id} has no {CONTROLS_FILE}: it was kept without controls")
        try:
            return load_file(path)
        except Exception as error:
            raise damaged(path, str(error)) from error


def read(folder: Path) -> Record:
    """Read and check one record's folder.

    Raises:
        InputError: A file is missing, cut short, or not what run.json says.
    """
    path = folder / RUN_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise damaged(path, "the file is missing") from error
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    missing = [f for f in _FIELDS if not isinstance(document, dict) or f not in document]
    if missing:
        raise damaged(path, f"it lacks {', '.join(missing)}")
    if document["schema"] != SCHEMA:
        raise InputError(
            f"{path} has schema {document['schema']}, this version reads schema {SCHEMA}; "
            "use the version that wrote it, or delete the folder and run again"
        )
    digests = Digests(**document["digests"])
    identity = run_id(document["kind"], document["config"], digests)
    if not identity == document["id"] == folder.name:
        raise damaged(path, f"its contents belong to run {identity}")
    for name, expected in document["files"].items():
        file = folder / name
        if name == CONTROLS_FILE and not file.exists():
            continue  # left out on purpose where records are published
        if not file.exists():
            raise damaged(file, "the file is missing")
        if file.stat().st_size != expected["bytes"] or (
            name != CONTROLS_FILE and fingerprint(file) != expected
        ):
            raise damaged(file, "its contents differ from what run.json recorded")
    return Record(
        id=identity,
        kind=document["kind"],
        config=document["config"],
        result=document["result"],
        provenance={"digests": document["digests"], **document["provenance"]},
        status=document["status"],
        message=document.get("message", ""),
        folder=folder,
    )


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 digest of a file, as run.json keeps them."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def damaged(path: Path, why: str) -> InputError:
    """The message for a record file that cannot be trusted."""
    return InputError(
        f"the record file {path} is damaged: {why}; "
        f"delete the folder {path.parent} and run again to compute it anew"
    )
