"""Deleting a user's own records; what comes with the package is never deleted."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from deltacontrol.experiments.runs.store import COMMITTED, RunStore, both_homes, unwritable
from deltacontrol.theory.errors import InputError


def own_folders(root: Path, beginnings: Sequence[str]) -> list[Path]:
    """The folders of the user's records whose ids begin so, whole or damaged.

    Raises:
        InputError: no id or several begin so, the record comes with the package, or `root` itself
            is among the committed evidence.
    """
    if root.resolve().is_relative_to(COMMITTED.resolve()):
        raise InputError(f"{root} holds evidence that comes with the package; it is never deleted")
    found: dict[Path, None] = {}
    own = {folder.name: folder for folder in RunStore(root).folders()}
    for beginning in beginnings:
        fitting = [name for name in own if name.startswith(beginning)]
        if len(fitting) == 1 and beginning:
            found.setdefault(own[fitting[0]])
            continue
        if fitting:
            names = ", ".join(fitting[:3]) + ", ..." * (len(fitting) > 3)
            raise InputError(
                f"{len(fitting)} run{'s have' if len(fitting) > 1 else ' has'} an id that begins "
                f"with {beginning!r} ({names}); give more of the id"
            )
        record = both_homes(root).get(beginning)  # which says where there is none
        raise InputError(
            f"run {record.id} is evidence that comes with the package; it is never deleted"
        )
    return list(found)


def delete(root: Path, folders: Sequence[Path]) -> None:
    """Delete records of `root`, each whole or not at all; a link alone, not what it points to.

    Raises:
        InputError: one cannot be deleted.
    """
    for folder in folders:
        aside = root / ".partial" / f"deleted-{uuid.uuid4().hex[:8]}"
        try:
            if folder.is_symlink():
                folder.unlink()
                continue
            aside.parent.mkdir(exist_ok=True)
            os.rename(folder, aside)
            shutil.rmtree(aside)
        except OSError as error:
            raise unwritable(root, error) from error
