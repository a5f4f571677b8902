"""Runs that failed, and why: one file a run, until the run is recorded.

<store>/.failed/<run id>.json    {"id", "kind", "label", "reason", "date"}
"""

from __future__ import annotations

import json
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from deltacontrol.experiments.runs.experiment import Experiment

FOLDER = ".failed"


@dataclass(frozen=True)
class Failure:
    """A run that failed.

    Attributes:
        id: The id that its record would have.
        kind: Its kind.
        label: What it is of, in a few words.
        reason: What happened.
        date: When.
    """

    id: str
    kind: str
    label: str
    reason: str
    date: str


def keep(root: Path, identity: str, experiment: Experiment, reason: str) -> None:
    """Keep the reason of a failure; an `OSError` where the folder cannot be written."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    failure = Failure(identity, experiment.kind, experiment.label, reason, now)
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{identity}.{uuid.uuid4().hex[:8]}"
    temporary.write_text(json.dumps(asdict(failure), indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / f"{identity}.json")


def forget(root: Path, identity: str) -> None:
    """Forget the failure of a run that is recorded now; what stays is passed over by `failures`."""
    with suppress(OSError):
        (root / FOLDER / f"{identity}.json").unlink(missing_ok=True)


def failures(root: Path) -> list[Failure]:
    """Those of runs without a record, the newest first; what is no such file is passed over."""
    found = []
    for path in sorted((root / FOLDER).glob("*.json")):
        if (root / path.stem).is_dir():
            continue
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            found.append(Failure(**{f.name: str(document[f.name]) for f in fields(Failure)}))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda failure: failure.date, reverse=True)
