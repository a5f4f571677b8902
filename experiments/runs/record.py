"""Reading a run's record: a folder of run.json, curve.parquet and maybe controls.safetensors.

run.json is under a digest of its own, ``digest`` = SHA-256 of its canonical JSON without that
entry, and holds the size and SHA-256 of every other file under ``files``. ``left_out`` names the
files that were left out on purpose where a record was published. `read` checks run.json and the
curve; `Record.curve` and `Record.controls` check the file that they read.

Only these three names in the record's own folder are ever opened, and never through a link.
A record that is damaged is never passed over: the error names the file and says what to do.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltacontrol.experiments.runs.experiment import Digests, canonical_json, run_id
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from deltacontrol.deltas import DeltaModel
    from deltacontrol.experiments.setting import Setting
    from deltacontrol.theory.control.problem import ControlProblem

SCHEMA = 2
RUN_FILE, CURVE_FILE, CONTROLS_FILE = "run.json", "curve.parquet", "controls.safetensors"
_FIELDS = {
    "schema": int,
    "digest": str,
    "id": str,
    "kind": str,
    "config": dict,
    "digests": dict,
    "provenance": dict,
    "status": str,
    "message": str,
    "result": dict,
    "files": dict,
    "left_out": list,
}


@dataclass(frozen=True, repr=False)
class Record:
    """A finished run, as read from its folder.

    Attributes:
        id: The run id.
        kind: The experiment's kind, such as "fine-tuning".
        config: The configuration, with the defaults of fields that are younger than the record.
        result: The result; numbers that were not finite are None.
        provenance: Seeds, digests, versions, commit, hardware, times.
        status: How the run ended.
        message: A sentence on how it ended; may be empty.
        folder: Where the record lies.
        files: Size and SHA-256 digest of the curve and, where they were kept, of the controls.
        left_out: Those of `files` that are not in the folder, on purpose.
    """

    id: str
    kind: str
    config: dict[str, Any]
    result: dict[str, Any]
    provenance: dict[str, Any]
    status: str
    message: str = ""
    folder: Path = field(default=Path(), compare=False)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)
    left_out: tuple[str, ...] = field(default=(), compare=False)

    def __repr__(self) -> str:
        """One line: id, kind, what differs most between runs, how it ended, the first numbers."""
        shown = ", ".join(f"{name}={value}" for name, value in self._summary().items())
        return f"Record({self.id}, {self.kind}, {shown})"

    def _repr_html_(self) -> str:
        rows = {"id": self.id, "kind": self.kind, **self._summary()}
        cells = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in rows.items()
        )
        return f"<table>{cells}</table>"

    def _summary(self) -> dict[str, Any]:
        names = ("model", "task", "seed", "learning_rate")
        found = {name: self.config[name] for name in names if name in self.config}
        deltas = [d["name"] for d in self.config.get("deltas") or [] if isinstance(d, dict)]
        if deltas:
            found["deltas"] = "+".join(deltas)
        found["status"] = self.status
        numbers = {k: v for k, v in self.result.items() if isinstance(v, int | float)}
        return found | {k: f"{v:.4g}" for k, v in list(numbers.items())[:3]}

    def curve(self) -> pd.DataFrame:
        """The recorded curve, one row per step; raises `InputError` where it is damaged."""
        import pandas as pd

        path = self._checked(CURVE_FILE)
        try:
            return pd.read_parquet(path)
        except Exception as error:
            raise damaged(path, str(error)) from error

    def controls(self) -> dict[str, torch.Tensor]:
        """The trained controls; raises `InputError` where the record was kept without them."""
        from safetensors.torch import load_file

        if CONTROLS_FILE not in self.files:
            raise InputError(f"run {self.id} has no {CONTROLS_FILE}: it was kept without controls")
        if CONTROLS_FILE in self.left_out:
            raise InputError(
                f"run {self.id} was published without its {CONTROLS_FILE}; run its configuration "
                "anew to have them"
            )
        path = self._checked(CONTROLS_FILE)
        try:
            return load_file(path)
        except Exception as error:
            raise damaged(path, str(error)) from error

    def setting(self, **changes: Any) -> Setting:
        """The setting of the run, its controls those at the end of the run.

        Args:
            changes: other fields of the setting, such as ``dtype="float64"``.

        Raises:
            InputError: the run keeps no controls, is of a kind that leaves no model, or its model
                is not what it was.
        """
        from deltacontrol.experiments import models
        from deltacontrol.experiments.runs.kinds import experiment_of

        controls = self.controls()
        kind = experiment_of(self.kind)
        setting = kind.setting_of(self.config, self.result)
        recorded = self.provenance["digests"]
        now = kind.digests_now(self.config)
        for what, before, today in (
            ("data of its task are", recorded["data"], now.data),
            ("text of your classes is", recorded.get("code"), now.code),
        ):
            if before != today:
                raise InputError(
                    f"the {what} not what it was in run {self.id}; bring it back, or run again."
                )
        if models.digest(setting.model) != self.provenance["digests"]["model"]:
            raise InputError(
                f"the model {setting.model} is not what it was in run {self.id}; its controls mean "
                "nothing on another base. Bring the model back, or run again."
            )
        setting = replace(setting, **changes)
        setting.controlled.load(setting.controlled.state() | controls)
        return setting

    def model(self) -> DeltaModel:
        """The controlled model at the end of the run; raises `InputError` as `setting`."""
        return self.setting().controlled

    def control_problem(
        self,
        rows: Sequence[int] | None = None,
        *,
        split: str = "train",
        weight_decay: float = 0.0,
        dtype: str = "float64",
    ) -> ControlProblem:
        """The run's control problem, J(u) = mean loss + λ/2 Σ_t ‖u_t‖², at its trained controls.

        These are ``problem.initial_controls()``.

        Args:
            rows: numbers of the rows of the split; by default all that the run used, in one batch.
            split: train, validation or test.
            weight_decay: λ; that of a solve stands in its configuration.
            dtype: of the numbers; identities are exact in float64.

        Raises:
            InputError: as `setting` and `Setting.control_problem`.
        """
        setting = self.setting(dtype=dtype)
        return setting.control_problem(rows, split=split, weight_decay=weight_decay)

    def _checked(self, name: str) -> Path:
        path = self.folder / name
        if fingerprint(path) != self.files[name]:
            raise damaged(path, "its contents differ from what run.json recorded")
        return path


def read(folder: Path, *, whole: bool = True) -> Record:
    """Read and check one record's folder.

    Args:
        folder: The folder, named by the run id.
        whole: Whether to check the other files and the id as well. Without it only run.json is
            looked at, which its digest holds to what was written: for lists of many records.

    Raises:
        InputError: A file is missing, cut short, or not what run.json says.
    """
    if os.path.islink(folder):
        raise InputError(f"{folder} is a link, and no record is read through a link")
    path = folder / RUN_FILE
    document = _parsed(path)
    if document.get("schema") == 1:
        raise InputError(
            f"{path} is of version 0.1, which kept no digest of the result; take it over, as it "
            f"is, with: deltacontrol runs --upgrade --runs {folder.parent}"
        )
    if document.get("schema") != SCHEMA:
        raise InputError(
            f"{path} has schema {document.get('schema')!r}, this version reads schema {SCHEMA}; "
            "use the version that wrote it, or delete the folder and run again"
        )
    lacking = [n for n, kind in _FIELDS.items() if not isinstance(document.get(n), kind)]
    if lacking:
        raise damaged(path, f"it lacks {', '.join(lacking)}")
    if document["digest"] != _digest(path, document):
        raise damaged(path, "its contents differ from what its digest was taken of")
    identity = document["id"]
    if whole:
        identity = run_id(document["kind"], document["config"], _digests(path, document))
    if not identity == document["id"] == folder.name:
        raise damaged(path, f"its contents belong to run {identity}")
    completed = document.get("completed")
    if completed is not None and not _extends(completed, document["config"]):
        raise damaged(path, "its completed configuration contradicts the configuration")
    _check_names(path, document["files"], document["left_out"])
    record = Record(
        id=identity,
        kind=document["kind"],
        config=completed or document["config"],
        result=document["result"],
        provenance={"digests": document["digests"], **document["provenance"]},
        status=document["status"],
        message=document["message"],
        folder=folder,
        files=document["files"],
        left_out=tuple(document["left_out"]),
    )
    if whole:
        _check_files(record)
        record._checked(CURVE_FILE)
    return record


def digest_of(document: Mapping[str, Any]) -> str:
    """SHA-256 of a document's canonical JSON, without its entry ``digest``."""
    content = {name: value for name, value in document.items() if name != "digest"}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the digest of its contents."""
    return {**document, "digest": digest_of(document)}


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 digest of a file, as run.json keeps them; a link is not followed."""
    try:
        with open(path, "rb", opener=_opener) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": file.tell(), "sha256": digest}
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error


def damaged(path: Path, why: str) -> InputError:
    """The message for a record file that cannot be trusted."""
    return InputError(
        f"the record file {path} is damaged: {why}; "
        f"delete the folder {path.parent} and run again to compute it anew"
    )


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _parsed(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb", opener=_opener) as file:
            document = json.loads(file.read())
    except FileNotFoundError as error:
        raise damaged(path, "the file is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, str(getattr(error, "strerror", None) or error)) from error
    if not isinstance(document, dict):
        raise damaged(path, "it is not a JSON object")
    return document


def _digest(path: Path, document: Mapping[str, Any]) -> str:
    try:
        return digest_of(document)
    except InputError as error:  # NaN and infinity, which json reads, are not JSON
        raise damaged(path, "it holds numbers that are not JSON") from error


def _digests(path: Path, document: Mapping[str, Any]) -> Digests:
    try:
        return Digests(**document["digests"])
    except TypeError as error:
        raise damaged(path, "its digests are not those of a model and data") from error


def _extends(longer: Any, shorter: Any) -> bool:
    """Whether a configuration only adds fields to another one."""
    if isinstance(longer, dict) and isinstance(shorter, dict):
        return all(k in longer and _extends(longer[k], v) for k, v in shorter.items())
    if isinstance(longer, list) and isinstance(shorter, list):
        pairs = zip(longer, shorter, strict=False)
        return len(longer) == len(shorter) and all(_extends(a, b) for a, b in pairs)
    return type(longer) is type(shorter) and longer == shorter


def _check_names(path: Path, files: Mapping[str, Any], left_out: list[Any]) -> None:
    """Check what run.json names: other names than a record's own are refused without a look."""
    if not set(files) <= {CURVE_FILE, CONTROLS_FILE}:
        raise damaged(path, f"it names files other than {CURVE_FILE} and {CONTROLS_FILE}")
    if CURVE_FILE not in files:
        raise damaged(path, f"it names no {CURVE_FILE}, which every record has")
    if left_out and (left_out != [CONTROLS_FILE] or CONTROLS_FILE not in files):
        raise damaged(path, f"of its files only {CONTROLS_FILE} can be left out")
    for name, expected in files.items():
        if not isinstance(expected, dict) or set(expected) != {"bytes", "sha256"}:
            raise damaged(path, f"it keeps no size and digest of {name}")


def _check_files(record: Record) -> None:
    """Check that the folder holds the files of the record, in their sizes, and no other of them."""
    present = {}
    with os.scandir(record.folder) as entries:
        for entry in entries:
            if entry.name in (CURVE_FILE, CONTROLS_FILE):
                present[entry.name] = entry.stat(follow_symlinks=False)
    wanted = set(record.files) - set(record.left_out)
    for name in set(present) - wanted:
        raise damaged(record.folder / name, "run.json does not say that it is there")
    for name in wanted:
        path = record.folder / name
        if name not in present:
            raise damaged(path, "the file is missing")
        if not stat.S_ISREG(present[name].st_mode):
            raise damaged(path, "it is not a plain file")
        if present[name].st_size != record.files[name]["bytes"]:
            raise damaged(path, "its size differs from what run.json recorded")
