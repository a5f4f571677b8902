"""The user's own rows: CSV, TSV, JSON Lines and Parquet."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from deltacontrol.experiments.sources import digest_of_file
from deltacontrol.experiments.tasks.base import CONVERSION, KINDS, Kind, Task, parts_of
from deltacontrol.experiments.tasks.splits import SPLIT_SEED, SPLITS, carve_validation, split
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
# Whole numbers with at most this many distinct values are read as classes, unless `kind` says else.
MOST_INTEGER_CLASSES = 50


def is_file_name(name: str) -> bool:
    """Whether a task's name is meant as a path."""
    return name.lower().endswith(SUFFIXES) or "/" in name or "\\" in name


def load_file(
    name: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    kind: Kind | None = None,
) -> Task:
    """Return the task in a file.

    A column `split` with the values train, validation and test is obeyed (validation is carved
    from train when absent); without it rows go 80/10/10, seeded and stratified, and equal texts to
    the same side. Labels that are strings, booleans or few whole numbers make a classification,
    other numbers a regression; `kind="causal-lm"` needs no labels.

    Raises:
        InputError: no such file, unreadable, empty, a column missing, rows without text or label, a
            single class, too few rows, or labels that do not fit `kind`.
    """
    if kind not in (None, *KINDS):
        raise unknown("kind of task", kind, KINDS)
    digest = file_digest(name, text_column=text_column, label_column=label_column, kind=kind)
    path = _existing(name)
    frame = _read(path)
    frame.columns = [str(column) for column in frame.columns]
    if frame.empty:
        raise InputError(f"{path} has no rows; one row per example is expected.")
    columns = {"text": _column(frame, text_column, "text", path)}
    if kind != "causal-lm":
        columns["label"] = _column(frame, label_column, "label", path)
    for role, column in columns.items():
        blank = frame[column].isna()
        if role == "text":
            blank |= frame[column].astype(str).str.strip() == ""
        if blank.any():
            raise InputError(
                f"{path}: {int(blank.sum())} of {len(frame)} rows have no {role} in the column "
                f"'{column}' (first: row {int(blank.to_numpy().argmax()) + 1}). "
                "Fill them or leave them out."
            )
    rows = frame[list(columns.values())].set_axis(list(columns), axis=1)
    rows = rows.assign(text=rows["text"].astype(str))
    labels: tuple[str, ...] = ()
    if kind is None:
        kind = _infer(rows["label"])
    if kind != "causal-lm":
        rows, labels = _label(rows, kind, label_column, path)
    if "split" in frame and "split" not in columns.values():
        rows = _given_split(rows.assign(split=frame["split"].astype(str).str.lower()), path)
    else:
        rows = split(rows)
    for part_name, part in zip(SPLITS, parts := parts_of(rows), strict=True):
        if part.empty:
            raise InputError(
                f"{path}: {len(rows)} rows with {rows['text'].nunique()} different texts leave the "
                f"{part_name} split empty (equal texts stay together); give at least 20 different "
                "texts, or a column 'split' with the values train, validation and test."
            )
    return Task(path.stem, kind, labels, *parts, digest, f"the file {path.name}")


def file_digest(
    name: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    kind: Kind | None = None,
) -> str:
    """Digest of a file's content, of the columns used and of the split.

    Raises:
        InputError: no such file.
    """
    content = digest_of_file(_existing(name))
    identity = [content, text_column, label_column, kind, CONVERSION, SPLIT_SEED]
    return sha256(json.dumps(identity).encode()).hexdigest()


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        raise InputError(f"{path} is a folder; a task is one file ({', '.join(SUFFIXES)}).")
    if not path.is_file():
        raise InputError(f"there is no file {path} (looked from {Path.cwd()}).")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: the kind of file is not known; expected {', '.join(SUFFIXES)}.")
    return path


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd
    import pyarrow

    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            return pd.read_csv(path, sep="," if suffix == ".csv" else "\t")
        if suffix == ".parquet":
            return pd.read_parquet(path)
        return pd.read_json(path, lines=suffix != ".json")
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    # UnicodeDecodeError and the parsers' own errors are ValueErrors.
    except (ValueError, pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{path} cannot be read as {suffix[1:]}: {reason}. Expected UTF-8 text with one row "
            "per example (or a Parquet table)."
        ) from error


def _column(frame: pd.DataFrame, name: str, role: str, path: Path) -> str:
    if name in frame:
        return name
    nearest = unknown(f"{role} column", name, frame.columns)
    raise InputError(f"{path}: {nearest}. Name it with {role}_column.")


def _infer(label: pd.Series) -> Kind:
    import pandas as pd

    if not pd.api.types.is_numeric_dtype(label) or pd.api.types.is_bool_dtype(label):
        return "classification"
    whole = bool((label == label.round()).all())
    # A float column of whole numbers is what a reader makes of integers beside a missing value.
    few = label.nunique() <= min(MOST_INTEGER_CLASSES, max(2, len(label) // 5))
    return "classification" if whole and few else "regression"


def _label(
    rows: pd.DataFrame, kind: Kind, column: str, path: Path
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    import numpy as np
    import pandas as pd

    if kind == "regression":
        numbers = pd.to_numeric(rows["label"], errors="coerce").astype(float)
        wrong = ~np.isfinite(numbers)
        if wrong.any():
            raise InputError(
                f"{path}: regression needs numbers, but {int(wrong.sum())} rows of '{column}' are "
                f"not finite numbers (first: {rows['label'][wrong].iloc[0]!r})."
            )
        return rows.assign(label=numbers), ()
    label = rows["label"]
    if pd.api.types.is_float_dtype(label) and bool((label == label.round()).all()):
        label = label.astype("int64")
    values = sorted(label.unique().tolist(), key=lambda value: (isinstance(value, str), value))
    if len(values) < 2:
        raise InputError(
            f"{path}: every row has the label {values[0]!r} in '{column}'; a classification needs "
            "at least two classes."
        )
    if len(values) > len(rows) // 2:
        raise InputError(
            f"{path}: '{column}' has {len(values)} different labels in {len(rows)} rows; that is "
            "no classification. Another column, or kind='regression'?"
        )
    codes = label.map({value: number for number, value in enumerate(values)})
    return rows.assign(label=codes.astype("int64")), tuple(str(value) for value in values)


def _given_split(rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    wrong = sorted(set(rows["split"]) - set(SPLITS))
    if wrong:
        raise InputError(
            f"{path}: the column 'split' holds {', '.join(wrong)}; expected {', '.join(SPLITS)}."
        )
    if not (rows["split"] == "validation").any():
        train = rows.index[rows["split"] == "train"]
        chosen = carve_validation(rows.loc[train].drop(columns="split"))
        rows.loc[train[chosen], "split"] = "validation"
    return rows
