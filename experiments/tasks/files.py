"""The user's own rows: CSV, TSV, JSON Lines, Parquet, Arrow and plain text.

`reading.read_rows` gives cells that are text or missing. Types are decided here, by these rules on
the column of labels, unless ``kind`` says what it is:

1. every label is a whole number (``-3``, ``17``, ``4.0``), without leading zeros or exponent, and
   there are few different ones (at most `MOST_INTEGER_CLASSES` and a fifth of the rows): classes,
   in the order of the numbers;
2. otherwise, every label is a decimal number, and labels that are written differently differ as
   numbers: a regression;
3. otherwise, classes, in the order of their names: ``01`` and ``1``, ``1.10`` and ``1.1``, ``NA``
   and ``None`` are four, and more, different names. Numbers that are written in two ways, ``1`` and
   ``1.0``, are refused.

`Task.reading` says what was decided.
"""

from __future__ import annotations

import json
import re
import unicodedata
import warnings
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from deltacontrol.experiments.sources import digest_of_file
from deltacontrol.experiments.tasks.base import CONVERSION, KINDS, Kind, Task, parts_of
from deltacontrol.experiments.tasks.reading import SUFFIXES, read_rows, refuse_swallowed, suffix_of
from deltacontrol.experiments.tasks.splits import (
    SPLIT_SEED,
    SPLITS,
    carve_validation,
    doubts,
    in_fair_order,
    split,
)
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    import pandas as pd

# Whole numbers with at most this many distinct values are read as classes, unless `kind` says else.
MOST_INTEGER_CLASSES = 50
# Rows of a split that by chance are hardly of one class, if training has several.
MANY = 10
# The column of the second text of a row, where it has two.
PAIR_COLUMN = "text_pair"
# Part of a file's digest: raise it when the same file is read as another task.
READING = 2

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"([+-]?[0-9]+)(\.0*)?")
_SIGNED_ZERO = re.compile(r"^\s*[+-](?=0+(\.0*)?\s*$)")
_LEADING_ZERO = re.compile(r"[+-]?0[0-9]")


def is_file_name(name: str) -> bool:
    """Whether a task's name is meant as a path."""
    return suffix_of(name) is not None or "/" in name or "\\" in name


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
    the same side. A column `text_pair` holds the second text of each row, as in entailment. What
    the labels are is decided as the module says; `kind="causal-lm"` needs no labels, and plain text
    (.txt) has none.

    Raises:
        InputError: no such file, unreadable (`reading.read_rows`), empty, a column missing, rows
            without text or label, a single class, names of classes that differ only in white space,
            a test class that training lacks, too few rows, or labels that do not fit `kind`.
    """
    if kind not in (None, *KINDS):
        raise unknown("kind of task", kind, KINDS)
    digest = file_digest(name, text_column=text_column, label_column=label_column, kind=kind)
    path = _existing(name)
    if suffix_of(path) == ".txt":
        if kind not in (None, "causal-lm"):
            raise InputError(
                f"{path} is plain text, which has no labels for a {kind}; give a .csv or .jsonl "
                "file with a column of labels, or kind='causal-lm'."
            )
        kind, text_column = "causal-lm", "text"
    frame = read_rows(path, {text_column, label_column, PAIR_COLUMN, "split"})
    _refuse_misspelt(frame, path)
    if frame.empty:
        raise InputError(f"{path} has no rows; one row per example is expected.")
    columns = {"text": _column(frame, text_column, "text", path)}
    pairs = PAIR_COLUMN in frame and PAIR_COLUMN not in (text_column, label_column)
    if pairs:
        if kind == "causal-lm":
            raise InputError(
                f"{path} has a column '{PAIR_COLUMN}', and a language model reads one text a row; "
                "join both, or leave the column out."
            )
        columns[PAIR_COLUMN] = PAIR_COLUMN
    if kind != "causal-lm":
        if text_column == label_column:
            raise InputError(
                f"{path}: text_column and label_column are both {text_column!r}, so that a text "
                "would hold its label; name two columns, or give kind='causal-lm', without labels."
            )
        columns["label"] = _column(frame, label_column, "label", path)
    _refuse_blank(frame, columns, path)
    refuse_swallowed(frame, columns["text"], columns.get("label"), path)
    rows = frame[list(columns.values())].set_axis(list(columns), axis=1)
    if pairs:
        rows = rows.assign(text_pair=rows[PAIR_COLUMN].fillna(""))
    if "label" in rows:  # zero has no sign, as in the other kinds of files
        rows = rows.assign(label=rows["label"].str.replace(_SIGNED_ZERO, "", regex=True))
    labels: tuple[str, ...] = ()
    told = [f"{path.name}: {len(rows):,d} rows", f"text: '{text_column}'"]
    if pairs:
        told.append(f"second text: '{PAIR_COLUMN}'")
    if kind != "causal-lm":
        inferred = "" if kind else ", inferred"
        kind, numeric = _infer(rows["label"], kind, path)
        rows, labels = _label(rows, kind, label_column, path, numeric=numeric)
        told.append(f"label: '{label_column}', {_described(rows, labels)}{inferred}")
    given = "split" in frame and "split" not in columns.values()
    if given:
        rows = _given_split(rows.assign(split=frame["split"]), path)
        told.append("split: as the file says")
    else:
        rows = split(rows)
        told.append("split: seeded, stratified")
    parts = parts_of(rows)
    for part_name, part in zip(SPLITS, parts, strict=True):
        if part.empty and given:
            raise InputError(
                f"{path}: the {part_name} split is empty: no row of the column 'split' says "
                f"{part_name}."
            )
        if part.empty:
            raise InputError(
                f"{path}: {len(rows)} rows with {rows['text'].nunique()} different texts leave the "
                f"{part_name} split empty (equal texts stay together); give at least 20 different "
                "texts, or a column 'split' with the values train, validation and test."
            )
    _refuse_withheld(rows, path, labels)
    told[-1] += " " + "/".join(f"{len(part):,d}" for part in parts)
    if several := int(rows["text"].str.contains("\n", regex=False).sum()):
        told.append(f"{several:,d} texts of several lines")
    told += doubts(rows)
    return Task(_stem(path), kind, labels, *parts, digest, f"the file {path.name}", "; ".join(told))


def file_digest(
    name: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    kind: Kind | None = None,
) -> str:
    """Digest of a file's content, of the columns used, of how it is read and of the split.

    Raises:
        InputError: no such file.
    """
    path = _existing(name)
    identity = [
        digest_of_file(path), suffix_of(path), text_column, label_column, kind, CONVERSION, READING,
        SPLIT_SEED,
    ]  # fmt: skip
    return sha256(json.dumps(identity).encode()).hexdigest()


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    known = f"{', '.join(SUFFIXES)}, and .gz, .bz2 or .xz behind those of text"
    if path.is_dir():
        raise InputError(f"{path} is a folder; a task is one file ({known}).")
    if not path.is_file():
        raise InputError(f"there is no file {path} (looked from {Path.cwd()}).")
    if suffix_of(path) is None:
        raise InputError(f"{path}: the kind of file is not known; expected {known}.")
    return path


def _stem(path: Path) -> str:
    return path.name[: path.name.lower().rindex(str(suffix_of(path)))]


def _column(frame: pd.DataFrame, name: str, role: str, path: Path) -> str:
    if name in frame:
        return name
    nearest = unknown(f"{role} column", name, frame.columns)
    raise InputError(f"{path}: {nearest}. Name it with {role}_column.")


def _refuse_misspelt(frame: pd.DataFrame, path: Path) -> None:
    """A column that would be read if its name were written in small letters, without blanks."""
    for name in ("split", PAIR_COLUMN):
        other = [c for c in frame if c != name and str(c).strip().lower() == name]
        if other and name not in frame:
            raise InputError(
                f"{path}: the column {other[0]!r} is not read by that name; call it {name!r}, or "
                "something else if it is not meant as such."
            )


def _refuse_blank(frame: pd.DataFrame, columns: dict[str, str], path: Path) -> None:
    for role, column in columns.items():
        if role == PAIR_COLUMN:  # a second text may be empty, or null
            continue
        blank = frame[column].fillna("").str.strip() == ""
        if blank.any():
            raise InputError(
                f"{path}: {int(blank.sum())} of {len(frame)} rows have no {role} in the column "
                f"'{column}' (first: row {int(blank.to_numpy().argmax()) + 1}). "
                "Fill them or leave them out."
            )


def _infer(label: pd.Series, kind: Kind | None, path: Path) -> tuple[Kind, bool]:
    """What the labels are, and whether classes are numbers; see the module.

    Raises:
        InputError: one number is written in two ways, which may or may not be two classes.
    """
    import math

    different = label.str.strip().unique().tolist()
    plain = all(_NUMBER.fullmatch(v) and not _LEADING_ZERO.match(v) for v in different)
    if plain and kind != "regression":
        _refuse_two_ways(different, path)
    numbers = [float(v) for v in different] if plain else []
    if not (plain and len(set(numbers)) == len(different) and all(map(math.isfinite, numbers))):
        return kind or "classification", False
    whole = all(_WHOLE.fullmatch(v) for v in different)
    few = len(different) <= min(MOST_INTEGER_CLASSES, max(2, len(label) // 5))
    if kind is None and not whole and few and all(number.is_integer() for number in numbers):
        return "classification", False  # 1e5 and 2e3 are names
    return kind or ("classification" if whole and few else "regression"), whole


def _refuse_two_ways(different: list[str], path: Path) -> None:
    seen: dict[int, str] = {}
    for value in different:
        found = _WHOLE.fullmatch(value)
        if found is None:
            continue
        number = int(found[1])
        if number in seen:
            raise InputError(
                f"{path}: the labels {seen[number]!r} and {value!r} are one number, written in two "
                "ways; write it one way, or give kind='regression'."
            )
        seen[number] = value


def _label(
    rows: pd.DataFrame, kind: Kind, column: str, path: Path, *, numeric: bool
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    import numpy as np

    label = rows["label"]
    if kind == "regression":
        texts = [str(value).strip() for value in label]
        numbers = np.array([float(t) if _NUMBER.fullmatch(t) else np.nan for t in texts])
        wrong = ~np.isfinite(numbers)
        if wrong.any():
            raise InputError(
                f"{path}: regression needs numbers, but {int(wrong.sum())} rows of '{column}' are "
                f"not finite numbers (first: {label[wrong].iloc[0]!r})."
            )
        return rows.assign(label=numbers), ()
    different = label.unique().tolist()
    _refuse_alike(different, column, path)
    values = sorted(different, key=_whole) if numeric else sorted(different)
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
    names = tuple(str(_whole(v)) if numeric else v for v in values)
    return rows.assign(label=codes.astype("int64")), names


def _whole(number: str) -> int:
    return int(number.partition(".")[0])


def _refuse_alike(classes: list[str], column: str, path: Path) -> None:
    """Classes that look alike are one class, misspelt; where case tells them apart, it is said."""
    seen: dict[str, str] = {}
    folded: dict[str, str] = {}
    for name in classes:
        plain = " ".join(_visible(name).split())
        if plain in seen:
            raise InputError(
                f"{path}: '{column}' has the classes {seen[plain]!r} and {name!r}, which differ "
                "only in white space or in characters that are not seen; write them alike."
            )
        seen[plain] = name
        other = folded.setdefault(plain.casefold(), name)
        if other != name:
            warnings.warn(
                f"{path}: '{column}' has the classes {other!r} and {name!r}, which only case "
                "tells apart",
                stacklevel=4,
            )


def _visible(name: str) -> str:
    """Composed, and without format characters such as a zero-width space."""
    composed = unicodedata.normalize("NFC", name)
    return "".join(letter for letter in composed if unicodedata.category(letter) != "Cf")


def _described(rows: pd.DataFrame, labels: tuple[str, ...]) -> str:
    if not labels:
        values = rows["label"]
        return f"numbers from {values.min():g} to {values.max():g} (regression)"
    names = ", ".join(labels[:6]) + ", …" * (len(labels) > 6)
    return f"{len(labels)} classes ({names})"


def _given_split(rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    named = rows["split"].fillna("").str.strip().str.lower()
    wrong = sorted(set(named) - set(SPLITS))
    if wrong:
        raise InputError(
            f"{path}: the column 'split' holds {', '.join(w or 'blanks' for w in wrong)}; "
            f"expected {', '.join(SPLITS)}."
        )
    rows = rows.assign(split=named)
    train = rows.index[rows["split"] == "train"]
    if len(train) and not (rows["split"] == "validation").any():
        chosen = carve_validation(rows.loc[train].drop(columns="split"))
        rows.loc[train[chosen], "split"] = "validation"
    return in_fair_order(rows)


def _refuse_withheld(rows: pd.DataFrame, path: Path, labels: tuple[str, ...]) -> None:
    """Labels of validation or test that training cannot know are not the task's."""
    if "label" not in rows:
        return
    of_train = rows.loc[rows["split"] == "train", "label"]
    for name in ("validation", "test"):
        part = rows.loc[rows["split"] == name, "label"]
        lacking = sorted(set(part) - set(of_train)) if labels else []
        if lacking:
            names = ", ".join(repr(labels[code]) for code in lacking[:5])
            raise InputError(
                f"{path}: the {name} split has the class {names}, which no row of train has; "
                "labels that are withheld are not labels. Leave these rows out, or add to train."
            )
        if labels and part.nunique() == 1 and of_train.nunique() > 1 and len(part) >= MANY:
            warnings.warn(
                f"{path}: all {len(part)} rows of the {name} split have the label "
                f"{labels[part.iloc[0]]!r}, and those of train have {of_train.nunique()} labels; "
                "are they withheld?",
                stacklevel=3,
            )
        if not labels and part.nunique() == 1 and of_train.nunique() > 1 and len(part) > 1:
            raise InputError(
                f"{path}: every row of the {name} split has the label {part.iloc[0]:g}; "
                "labels that are withheld are not labels. Leave these rows out."
            )
