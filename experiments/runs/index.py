"""An index of a folder of records: lists of thousands of them, without reading each again.

    <store>/.index.json    line 1: SHA-256 of the rest
                           line 2: {"version": ..., "shared": [parts], "records": {id: ENTRY}}

    ENTRY = [size, mtime_ns, ctime_ns, fields, {name of a part of the provenance: its place}]

Parts of the provenance that many records have in common, such as the packages, stand there once.

An entry says that the very file run.json of this size and with these times was read and checked
against its digest, and what stood in it. It is used while size and both times are unchanged; else
the file is read and checked anew. Nothing else is taken from the index: whoever uses the numbers of
a record, rather than lists it, reads the record itself.

The index can be deleted at any time. Where it is absent, damaged or cannot be written, a list only
takes longer. It is written anew once `LEAST` records had to be read, whole or not at all.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from deltacontrol.experiments.runs.experiment import canonical_json
from deltacontrol.experiments.runs.record import RUN_FILE, SCHEMA, Record, read
from deltacontrol.theory.errors import InputError

INDEX_FILE = ".index.json"
VERSION = [1, SCHEMA]
LEAST = 100
# A file that has only just changed may change again within one tick of the file system's clock.
_SETTLED_NS = 2_000_000_000
_FIELDS = tuple(f.name for f in fields(Record) if f.name not in ("id", "folder"))


def listed(root: Path, folders: Mapping[str, Path]) -> tuple[dict[str, Record], list[Path]]:
    """The records in folders of `root`, and the folders that hold no whole record.

    Args:
        root: The folder of the index.
        folders: The folders by the records' ids, all of them directly in `root`.

    Returns:
        Records by id, as ``read(folder, whole=False)`` gives them, and the other folders.
    """
    with no_collection():
        known, shared = _load(root)
        parts = _Parts(shared)
        found, skipped, kept, num_read = {}, [], {}, 0
        for name, folder in folders.items():
            entry, stamp = known.get(name), _stamp(f"{folder}")
            if entry is not None and entry[:3] == stamp:
                try:
                    found[name] = _record(name, folder, entry, shared)
                    kept[name] = entry
                    continue
                except (LookupError, TypeError, ValueError):
                    pass  # an entry of another form; the file is read
            try:
                found[name] = read(folder, whole=False)
            except (InputError, OSError):
                skipped.append(folder)
                continue
            num_read += 1
            if stamp is not None and time.time_ns() - stamp[2] > _SETTLED_NS:
                # The same before and after reading: what was read is what had this stamp.
                if _stamp(f"{folder}") == stamp:
                    kept[name] = [*stamp, *parts.divided(found[name])]
        if num_read >= LEAST:
            _save(root, kept, shared)
    return found, skipped


def _stamp(folder: str) -> list[int] | None:
    """Size and times of run.json; None where it is not there, or is behind a link."""
    try:
        if os.path.islink(folder):
            return None
        found = os.lstat(f"{folder}/{RUN_FILE}")
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _record(name: str, folder: Path, entry: Sequence[Any], shared: Sequence[Any]) -> Record:
    """The record of an entry; records have the parts that are shared as one object each."""
    values, places = entry[3:]
    provenance = values["provenance"] | {part: shared[i] for part, i in places.items()}
    left_out = tuple(values["left_out"])
    return Record(
        name, folder=folder, **(values | {"provenance": provenance, "left_out": left_out})
    )


class _Parts:
    """Dictionaries of records' provenance, each once, in the list `shared`, which grows."""

    def __init__(self, shared: list[Any]) -> None:
        self.shared = shared
        self.places = {canonical_json(part): i for i, part in enumerate(shared)}

    def divided(self, record: Record) -> tuple[dict[str, Any], dict[str, int]]:
        """The record's fields without the dictionaries of its provenance, and their places."""
        places, rest = {}, {}
        for name, value in record.provenance.items():
            if not isinstance(value, dict):
                rest[name] = value
                continue
            places[name] = self.places.setdefault(canonical_json(value), len(self.shared))
            if places[name] == len(self.shared):
                self.shared.append(value)
        return {n: getattr(record, n) for n in _FIELDS} | {"provenance": rest}, places


def _load(root: Path) -> tuple[dict[str, Any], list[Any]]:
    """Entries and shared parts; none where the index is absent, damaged or of another version."""
    try:
        digest, _, text = (root / INDEX_FILE).read_bytes().partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() == digest:
            document = json.loads(text)
            if document["version"] == VERSION:
                return dict(document["records"]), list(document["shared"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return {}, []


def _save(root: Path, entries: Mapping[str, Any], shared: Sequence[Any]) -> None:
    temporary = root / f"{INDEX_FILE}.{uuid.uuid4().hex[:8]}"
    document = {"version": VERSION, "shared": shared, "records": entries}
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    try:
        temporary.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
        os.replace(temporary, root / INDEX_FILE)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without the garbage collector, which would walk all that is read again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
